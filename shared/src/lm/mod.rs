//! The transformer: one decoder with taps, generic over the arithmetic it runs on, and its tokenizers.
//!
//! [`decoder`] is written once over the blocks of [`ops`]; [`candle`] implements them. A family file ([`llama`],
//! [`gemma2`], [`gemma3`], [`gpt2`], [`gpt_neox`]) maps configurations and tensor names onto a [`Spec`] and [`names`];
//! [`weights`] builds a decoder from them and any [`TensorSource`]. [`gguf`] and [`safetensors`] parse the headers of weight files without reading the weights.

mod candle;
mod config;
mod decoder;
mod error;
mod gemma2;
mod gemma3;
mod gguf;
mod gguf_tokenizer;
mod gpt2;
mod gpt_neox;
mod kernels;
mod llama;
mod math;
mod names;
mod ops;
mod packed;
mod parallel;
mod products;
mod safetensors;
mod spec;
mod tap;
mod tokenizer;
mod tokens;
mod weights;

pub use self::candle::{CandleOps, RopeTable};
pub use crate::tap::{Site, TapParseError, TapPoint};
pub use decoder::{Decoder, LanguageModel};
pub use error::LmError;
pub use gguf::{Gguf, GgufTensor, GgufValue, dequantise};
pub use kernels::masked_softmax;
pub use names::{Names, Qkv};
pub use ops::{Affine, Heads, Ops, Projection, QkNorm};
pub use packed::Matrix;
pub use parallel::{Parallel, Serial};
pub use products::{CandleProducts, Packed, Products, QueryKeyValue};
pub use safetensors::{FloatFormat, SafetensorsHeader, StoredTensor};
pub use spec::{AttentionSpec, MlpActivation, MlpSpec, NormKind, NormSpec, RopeScaling, RopeSpec, Spec};
pub use tap::{NoTap, Splicer, Steerer, Tap, TapAction, Taps, Until};
pub use tokenizer::{BosHints, Tokenizer};
pub use tokens::{Divergence, TokenBatch, nll};
pub use weights::{Blueprint, TensorSource};
