//! Measurements of this program by itself: speed of a harvest's forward pass and of a training step, and
//! what lower precision and several layers cost.
//!
//! `cargo xtask bench` runs the first two beside other programs, round by round in turn, so that a busy machine slows both.

mod cuda;
mod harvest;
mod mlsae_step;
mod precision;
mod train_step;

pub use cuda::{CudaBench, CudaPeaks, CudaRoutes, CudaStep};
pub use harvest::{HarvestBench, HarvestReady, HarvestRound};
pub use mlsae_step::{MlsaeStepBench, MlsaeStepRound, Shape};
pub use precision::{PrecisionReport, TapError, compare};
pub use train_step::{TrainStepBench, TrainStepReady, TrainStepRound};

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use shared::lm::Tokenizer;

/// `batch` sequences of `length` tokens from the beginning of a text, without a BOS token.
///
/// # Errors
/// If the text cannot be read or is too short.
pub fn ids_of(text: &Path, tokenizer: &Tokenizer, batch: usize, length: usize) -> Result<Vec<u32>> {
    let read = fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
    let mut ids = tokenizer.encode(&read)?;
    let wanted = batch.checked_mul(length).context("batch times length is too large")?;
    ensure!(ids.len() >= wanted, "{} has {} tokens, wanted {wanted}", text.display(), ids.len());
    ids.truncate(wanted);
    Ok(ids)
}

/// Lets [`peak_memory_mib`] begin anew, where the system can.
fn forget_peak_memory() {
    // proc(5): 5 sets the peak to what is held now. Without it the peak is that of the whole process, as documented.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The most memory this process ever held, in MiB; `None` where the system does not say.
#[must_use]
pub fn peak_memory_mib() -> Option<f64> {
    crate::train::speed::memory_mib("VmHWM:")
}
