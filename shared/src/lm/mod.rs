//! The transformer: one decoder with taps, generic over the arithmetic it runs on, and its tokenizers.

mod error;
mod math;
mod model;
mod parallel;
mod spec;
mod tap;
mod tokenizer;
mod tokens;

pub use crate::tap::{Site, TapParseError, TapPoint};
pub use error::LmError;
pub use model::LanguageModel;
pub use parallel::{Parallel, Serial};
pub use spec::{AttentionSpec, GateActivation, MlpSpec, NormSpec, RopeScaling, RopeSpec, Spec};
pub use tap::{NoTap, Splicer, Tap, TapAction, Until};
pub use tokenizer::Tokenizer;
pub use tokens::{TokenBatch, nll};
