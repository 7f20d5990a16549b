//! Streaming metrics: each is fed batches, merges with another of its kind, and is read at the end.
//!
//! One file a metric. All sums are f64 or integers, so the result does not drift with the number of
//! batches, and integer metrics do not depend on how rows were batched at all.

pub mod adjacent;
pub mod dead;
pub mod density;
pub mod fvu;
pub mod l0;
pub mod layer_use;
pub mod layer_variance;

pub use adjacent::{LayerCosine, LayerOverlap};
pub use dead::Dead;
pub use density::{Density, Log10Histogram};
pub use fvu::Fvu;
pub use l0::L0;
pub use layer_use::{LayerProfile, LayerUse, profile};
pub use layer_variance::{Decomposition, LayerVariance, OnToken};

/// `a / b` of two counts, `None` when `b` is zero.
fn ratio(a: u64, b: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let (a, b) = (a as f64, b as f64);
    (b > 0.0).then(|| a / b)
}
