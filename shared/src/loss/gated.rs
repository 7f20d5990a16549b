//! The gated autoencoder (arXiv 2404.16014 §3): which latents are active, and how much, are decided on two paths that share
//! the encoder's directions.

/// Both paths' pre-activations of a latent, from `z = π_gate`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Paths {
    pub(super) gate: f64,
    pub(super) magnitude: f64,
    /// `exp(r_mag) · (z − b_enc)`, what the magnitude's scale multiplies.
    pub(super) scaled: f64,
}

impl Paths {
    pub(super) fn new(z: f64, b_enc: f64, r_mag: f64, b_mag: f64) -> Self {
        let scaled = r_mag.exp() * (z - b_enc);
        Self { gate: z, magnitude: scaled + b_mag, scaled }
    }

    /// `f = H(π_gate) · max(π_mag, 0)` (eq. 5).
    pub(super) fn value(self) -> f64 {
        if self.is_active() { self.magnitude } else { 0.0 }
    }

    pub(super) fn is_active(self) -> bool {
        self.gate > 0.0 && self.magnitude > 0.0
    }
}
