//! How a fast f32 backend reaches exactly the active set of the f64 reference.
//!
//! A backend computes `ẑ ≈ w·x + b` in f32, in whatever order suits it. The classical bound on a sum
//! of `n` products (Higham, *Accuracy and Stability of Numerical Algorithms*, §3.1, with
//! Cauchy–Schwarz for Σ|wᵢxᵢ|) gives a margin `δ` with `|ẑ − z| ≤ δ`. Pre-activations farther than `δ`
//! from the threshold are decided by `ẑ`; the few inside are decided by [`crate::reference`], in f64.

use crate::reference;
use crate::sae::Sae;

/// Unit roundoff of f32, `2⁻²⁴`.
const UNIT_ROUNDOFF: f32 = 5.960_464_5e-8;

/// Margins of a dictionary: `δ = scale_i · ‖x‖ + offset_i` bounds the f32 error of latent `i`.
#[derive(Debug, Clone, PartialEq)]
pub struct Margins {
    scale: Vec<f32>,
    offset: Vec<f32>,
}

impl Margins {
    /// Precomputes per-latent margins from encoder row norms and biases.
    #[must_use]
    pub fn new(sae: &Sae) -> Self {
        let n_terms = sae.dims().d_in + 1;
        // Twice γₙ ≈ n·u: once for the sum, once more for devices that round products before adding
        // and for the rounding of the margin itself.
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let gamma = 2.0 * n_terms as f32 * UNIT_ROUNDOFF;
        let scale = (0..sae.dims().n_latents).map(|i| gamma * norm(sae.encoder_row(i))).collect();
        let offset = sae.b_enc().iter().map(|b| gamma * b.abs() + f32::MIN_POSITIVE).collect();
        Self { scale, offset }
    }

    /// The margin of `latent` for an input of norm `x_norm`.
    #[must_use]
    pub fn margin(&self, latent: usize, x_norm: f32) -> f32 {
        self.scale[latent] * x_norm + self.offset[latent]
    }

    /// Per-latent factors of the input's norm, `[n]`, for backends that screen on a device.
    #[must_use]
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Per-latent constant parts, `[n]`, for backends that screen on a device.
    #[must_use]
    pub fn offset(&self) -> &[f32] {
        &self.offset
    }
}

/// Decides latent `latent` of a thresholded dictionary given its f32 estimate `z_estimate`:
/// the value to store when active, `None` when not. Inside the margin the f64 reference decides.
#[must_use]
pub fn decide(
    sae: &Sae,
    x: &[f32],
    latent: usize,
    z_estimate: f32,
    margin: f32,
    threshold: f32,
) -> Option<f32> {
    if z_estimate > threshold + margin {
        return Some(z_estimate);
    }
    if z_estimate <= threshold - margin {
        return None;
    }
    let z = reference::pre_activation(sae, x, latent);
    #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
    (z > f64::from(threshold)).then_some(z as f32)
}

/// Euclidean norm, summed in f64 and rounded up a little so that it can stand in a bound.
#[must_use]
pub fn norm(v: &[f32]) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "rounded up by the factor")]
    let norm = (reference::dot(v, v).sqrt() * (1.0 + 1e-6)) as f32;
    norm
}
