//! What training changes: f32 master parameters and the second moments of Adam.

use anyhow::{Result, ensure};
use shared::Sae;
use shared::fold::{Training, fold};
use shared::loss::Parametrisation;

/// Master parameters, latent-major, in units of the normalised data; f32 whatever computes with them.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Width of the vectors.
    pub d_in: usize,
    /// Encoder rows `[n, d_in]`.
    pub w_enc: Vec<f32>,
    /// Encoder bias `[n]`.
    pub b_enc: Vec<f32>,
    /// Decoder directions `[n, d_in]`, each of norm 1.
    pub w_dec: Vec<f32>,
    /// Decoder bias `[d_in]`.
    pub b_dec: Vec<f32>,
    /// Threshold parameter `[n]`: log θ or θ.
    pub threshold: Vec<f32>,
    /// What [`Params::threshold`] holds.
    pub parametrisation: Parametrisation,
    /// Whether the encoder reads `x − b_dec`.
    pub pre_bias: bool,
}

impl Params {
    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.b_enc.len()
    }

    /// θ of every latent `[n]`: the exponential is taken in f64 and rounded once.
    #[must_use]
    pub fn thetas(&self) -> Vec<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "thresholds are f32")]
        let theta = |&p: &f32| self.parametrisation.threshold(f64::from(p)) as f32;
        self.threshold.iter().map(theta).collect()
    }

    /// The released form for raw activations `scale` times as large.
    ///
    /// # Errors
    /// If a parameter is not finite.
    pub fn release(&self, scale: f64) -> Result<Sae> {
        let training = Training {
            w_enc: &self.w_enc,
            b_enc: &self.b_enc,
            w_dec: &self.w_dec,
            b_dec: &self.b_dec,
            threshold: &self.thetas(),
            pre_bias: self.pre_bias,
        };
        Ok(fold(&training, scale)?)
    }

    /// Checks that all lengths agree; what a file claims to hold is not trusted.
    ///
    /// # Errors
    /// Names the tensor that does not fit.
    pub fn check(&self) -> Result<()> {
        let (n, d) = (self.n_latents(), self.d_in);
        let lengths = [
            ("w_enc", self.w_enc.len(), n.checked_mul(d)),
            ("w_dec", self.w_dec.len(), n.checked_mul(d)),
            ("b_dec", self.b_dec.len(), Some(d)),
            ("threshold", self.threshold.len(), Some(n)),
        ];
        ensure!(n > 0 && d > 0, "an autoencoder of {n} latents over {d} values cannot be trained");
        for (name, found, wanted) in lengths {
            ensure!(Some(found) == wanted, "{name}: expected {wanted:?} values for width {n}, found {found}");
        }
        Ok(())
    }
}

/// Second moments of Adam, shaped as the parameters, and the step in which each latent last moved.
///
/// A latent without gradient in a step does not move under Adam with β₁ = 0; its second moment only
/// decays by β₂. So moments are left alone and caught up by β₂ to the number of steps missed when the
/// latent is next used.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// `[n, d_in]`.
    pub w_enc: Vec<f32>,
    /// `[n]`.
    pub b_enc: Vec<f32>,
    /// `[n, d_in]`.
    pub w_dec: Vec<f32>,
    /// `[d_in]`.
    pub b_dec: Vec<f32>,
    /// `[n]`.
    pub threshold: Vec<f32>,
    /// The step that last changed encoder row, bias and direction, `[n]`; 0 = none.
    pub weights_step: Vec<u64>,
    /// The step that last changed the threshold, `[n]`; 0 = none.
    pub threshold_step: Vec<u64>,
}

impl Moments {
    /// All zero, before the first step.
    #[must_use]
    pub fn new(n_latents: usize, d_in: usize) -> Self {
        Self {
            w_enc: vec![0.0; n_latents * d_in],
            b_enc: vec![0.0; n_latents],
            w_dec: vec![0.0; n_latents * d_in],
            b_dec: vec![0.0; d_in],
            threshold: vec![0.0; n_latents],
            weights_step: vec![0; n_latents],
            threshold_step: vec![0; n_latents],
        }
    }
}
