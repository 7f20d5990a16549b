//! The JumpReLU and its pseudo-derivatives (Rajamanoharan et al., arXiv 2407.14435v3, eqs. 3, 9, 11, 12).
//!
//! The activation and the step are not differentiable in the threshold, so training replaces those
//! derivatives by straight-through estimates with the rectangle kernel `K(u) = 1[|u| < ½]`:
//!
//! ```text
//! JumpReLU_θ(z) = z · H(z − θ)              H(u) = 1[u > 0]
//! ∂JumpReLU/∂z  = H(z − θ)                  ∂H/∂z = 0
//! ð JumpReLU/ðθ = −(θ/ε) · K((z − θ)/ε)     ð H/ðθ = −(1/ε) · K((z − θ)/ε)
//! ```

/// `H(z − θ)`, strictly greater: 1 when the latent is active, else 0.
#[must_use]
pub fn step(z: f64, threshold: f64) -> f64 {
    if z > threshold { 1.0 } else { 0.0 }
}

/// `JumpReLU_θ(z) = z · H(z − θ)` (eq. 3).
#[must_use]
pub fn jumprelu(z: f64, threshold: f64) -> f64 {
    if z > threshold { z } else { 0.0 }
}

/// `∂JumpReLU_θ(z)/∂z = H(z − θ)`, the true derivative; there is no straight-through term in `z`.
#[must_use]
pub fn jumprelu_dz(z: f64, threshold: f64) -> f64 {
    step(z, threshold)
}

/// Whether `z` lies in the window of the estimator, `|z − θ| < ε/2`, on either side of the threshold.
#[must_use]
pub fn in_window(z: f64, threshold: f64, bandwidth: f64) -> bool {
    (z - threshold).abs() < bandwidth / 2.0
}

/// `ð JumpReLU_θ(z)/ðθ = −(θ/ε) · K((z − θ)/ε)` (eq. 11).
#[must_use]
pub fn jumprelu_dthreshold(z: f64, threshold: f64, bandwidth: f64) -> f64 {
    if in_window(z, threshold, bandwidth) { -threshold / bandwidth } else { 0.0 }
}

/// `ð H(z − θ)/ðθ = −(1/ε) · K((z − θ)/ε)` (eq. 12).
#[must_use]
pub fn step_dthreshold(z: f64, threshold: f64, bandwidth: f64) -> f64 {
    if in_window(z, threshold, bandwidth) { -1.0 / bandwidth } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_itself_is_inactive_but_in_the_window() {
        assert_eq!((step(0.5, 0.5), jumprelu(0.5, 0.5), jumprelu_dz(0.5, 0.5)), (0.0, 0.0, 0.0));
        assert_eq!((step(0.75, 0.5), jumprelu(0.75, 0.5), jumprelu_dz(0.75, 0.5)), (1.0, 0.75, 1.0));
        assert_eq!(jumprelu_dthreshold(0.5, 0.5, 0.25), -2.0);
        assert_eq!(step_dthreshold(0.5, 0.5, 0.25), -4.0);
    }

    #[test]
    fn the_window_is_two_sided_and_open() {
        let (threshold, bandwidth) = (0.5, 0.25);
        for (z, inside) in [(0.375, false), (0.376, true), (0.624, true), (0.625, false), (-0.5, false)] {
            assert_eq!(in_window(z, threshold, bandwidth), inside, "z = {z}");
            assert_eq!(step_dthreshold(z, threshold, bandwidth) != 0.0, inside, "z = {z}");
        }
    }

    /// Averaged over a uniform z, the estimate equals the derivative of the expected step and activation.
    #[test]
    fn the_estimator_is_unbiased_for_a_flat_density() {
        let (threshold, bandwidth, n) = (0.5, 0.2, 200_000);
        let grid = (0..n).map(|i| (f64::from(i) + 0.5) / f64::from(n));
        let mean = |f: &dyn Fn(f64) -> f64| grid.clone().map(f).sum::<f64>() / f64::from(n);
        // E[H] = 1 − θ and E[JumpReLU] = (1 − θ²)/2 for z uniform on [0, 1].
        assert!((mean(&|z| step_dthreshold(z, threshold, bandwidth)) + 1.0).abs() < 1e-4);
        assert!((mean(&|z| jumprelu_dthreshold(z, threshold, bandwidth)) + threshold).abs() < 1e-4);
    }
}
