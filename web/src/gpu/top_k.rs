//! Top-k made exact: which of the estimated pre-activations are the reference's `k` largest.

use shared::certify::Margins;
use shared::{Sae, reference};

/// A latent, its estimated pre-activation, and the bound on the estimate's error.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    latent: u32,
    z: f32,
    margin: f32,
}

/// The active latents of row `x` and their values, given estimates for every latent that may be positive.
///
/// Estimates whose interval reaches the `k`-th largest lower bound are computed again in f64, then the
/// reference's rule decides: larger first, ties to the lower latent, positive only.
#[must_use]
pub fn exact_top_k(
    sae: &Sae,
    margins: &Margins,
    k: usize,
    x: &[f32],
    x_norm: f32,
    estimates: &[(u32, f32)],
) -> Vec<(u32, f32)> {
    let mut candidates: Vec<Candidate> = estimates
        .iter()
        .map(|&(latent, z)| Candidate { latent, z, margin: margins.margin(latent as usize, x_norm) })
        .collect();
    if candidates.len() > k {
        let mut lower: Vec<f32> = candidates.iter().map(|c| c.z - c.margin).collect();
        let (_, &mut bound, _) = lower.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        candidates.retain(|c| c.z + c.margin >= bound);
    }
    let mut exact: Vec<(u32, f64)> = candidates
        .iter()
        .map(|c| (c.latent, reference::pre_activation(sae, x, c.latent as usize)))
        .filter(|&(_, z)| z > 0.0)
        .collect();
    exact.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    exact.truncate(k);
    #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
    exact.into_iter().map(|(latent, z)| (latent, z as f32)).collect()
}
