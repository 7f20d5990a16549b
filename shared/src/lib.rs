//! The mathematics and the file formats of Stratascope, without I/O, threads or a clock.
//!
//! Everything here builds natively and for `wasm32-unknown-unknown`. One module owns one idea:
//!
//! - [`rows`]: checked row-major matrix views; [`codes`]: sparse latent activations.
//! - [`sae`]: the one in-memory form of released weights, latent-major; [`row_scaling`]: vectors normalised one by one.
//! - [`forward`]: the seam every backend implements; [`reference`]: its f64 meaning.
//! - [`jumprelu`]: the activation and its pseudo-derivatives; [`loss`]: the training objective and its
//!   backward pass; [`fold`]: training parameters to released weights.
//! - [`metrics`]: streaming accumulators (L0, FVU, dead latents, density).
//! - [`tap`]: where activations are read; `lm` (feature `lm`): the transformer with those taps.
//! - [`precision`]: the number formats a language model runs in.
//! - [`lens`]: linear maps that bring all layers into one space.
//! - [`pack`]: the files of a feature pack, in both directions.
//! - [`config`]: strict TOML run configurations.
//! - [`certify`]: how a fast backend reaches exactly the reference's active set.
//! - [`cpu`]: the portable fast path; [`format`]: weight files.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")
)]

pub mod certify;
pub mod codes;
pub mod config;
pub mod cpu;
pub mod error;
pub mod fold;
pub mod format;
pub mod forward;
pub mod jumprelu;
pub mod layer_thresholds;
pub mod lens;
#[cfg(feature = "lm")]
pub mod lm;
pub mod loss;
pub mod metrics;
pub mod multi_layer;
pub mod pack;
pub mod precision;
pub mod reference;
pub mod row_scaling;
pub mod rows;
pub mod sae;
pub mod tap;
pub mod top_k;

pub use codes::{Codes, CodesBuilder};
pub use error::ShapeError;
pub use forward::{Dims, Forward};
pub use precision::Precision;
pub use row_scaling::RowScaling;
pub use rows::Rows;
pub use sae::{Activation, Sae, SaeParts};
pub use tap::{Site, TapPoint};
