//! The training objective and its complete backward pass in f64: what every training step is judged by.
//!
//! With `X' = X − b_dec` when the encoder has a pre-bias, else `X`, and means over the `N` rows:
//!
//! ```text
//! Z = X' W_encᵀ + b_enc    A = 1[Z > θ]    F = Z∘A    X̂ = F W_dec + b_dec    R = X̂ − X
//! L = (1/N) Σ‖R_n‖² + S(L̄0),   L̄0 = (1/N) Σ A,   S = λ L̄0   or   S = λ (L̄0/L0* − 1)²
//! ```
//! (arXiv 2407.14435 eq. 9; the second form is the target-L0 objective of its appendix, on the batch
//! mean.) Only θ feels the sparsity term, and it feels it through the pseudo-derivatives of
//! [`crate::jumprelu`]. Weights are latent-major, `[n, d]`, as everywhere.

use crate::error::{ShapeError, check_len};
use crate::jumprelu::{in_window, jumprelu, step};
use crate::rows::Rows;

/// What the trained threshold parameter means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parametrisation {
    /// The parameter is `log θ`, so θ stays positive.
    Log,
    /// The parameter is θ.
    Raw,
}

impl Parametrisation {
    /// θ of a parameter value.
    #[must_use]
    pub fn threshold(self, parameter: f64) -> f64 {
        match self {
            Self::Log => parameter.exp(),
            Self::Raw => parameter,
        }
    }

    /// The parameter value of a θ (for [`Parametrisation::Log`], θ > 0).
    #[must_use]
    pub fn parameter(self, threshold: f64) -> f64 {
        match self {
            Self::Log => threshold.ln(),
            Self::Raw => threshold,
        }
    }

    /// dθ/dparameter at a θ.
    #[must_use]
    pub fn derivative(self, threshold: f64) -> f64 {
        match self {
            Self::Log => threshold,
            Self::Raw => 1.0,
        }
    }
}

/// The sparsity term of the objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// `λ L̄0`.
    Fixed {
        /// λ.
        lambda: f64,
    },
    /// `λ (L̄0/L0* − 1)²` on the batch mean.
    Target {
        /// λ, the weight of the square.
        lambda: f64,
        /// L0*.
        target: f64,
    },
}

impl Sparsity {
    /// The term itself.
    #[must_use]
    pub fn value(&self, mean_l0: f64) -> f64 {
        match *self {
            Self::Fixed { lambda } => lambda * mean_l0,
            Self::Target { lambda, target } => lambda * (mean_l0 / target - 1.0).powi(2),
        }
    }

    /// Its derivative in L̄0: the λ that a fixed term would need to pull equally at this L0.
    #[must_use]
    pub fn effective_lambda(&self, mean_l0: f64) -> f64 {
        match *self {
            Self::Fixed { lambda } => lambda,
            Self::Target { lambda, target } => 2.0 * lambda * (mean_l0 / target - 1.0) / target,
        }
    }
}

/// Training parameters in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSae {
    /// Width of the vectors.
    pub d_in: usize,
    /// Encoder rows `[n, d_in]`.
    pub w_enc: Vec<f64>,
    /// Encoder bias `[n]`.
    pub b_enc: Vec<f64>,
    /// Decoder directions `[n, d_in]`.
    pub w_dec: Vec<f64>,
    /// Decoder bias `[d_in]`.
    pub b_dec: Vec<f64>,
    /// Threshold parameters `[n]`, log θ or θ.
    pub threshold: Vec<f64>,
    /// What [`TrainSae::threshold`] holds.
    pub parametrisation: Parametrisation,
    /// Whether the encoder reads `x − b_dec` instead of `x`.
    pub pre_bias: bool,
}

/// The parts of the loss of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// `mean ‖x − x̂‖²`, summed over the width.
    pub mse: f64,
    /// The sparsity term.
    pub sparsity: f64,
    /// Mean active latents a row.
    pub l0: f64,
}

impl Losses {
    /// The objective.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.mse + self.sparsity
    }
}

/// Gradients of the objective, shaped as the parameters of [`TrainSae`].
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[n, d_in]`.
    pub w_enc: Vec<f64>,
    /// `[n]`.
    pub b_enc: Vec<f64>,
    /// `[n, d_in]`, before the part along each direction is removed.
    pub w_dec: Vec<f64>,
    /// `[d_in]`.
    pub b_dec: Vec<f64>,
    /// `[n]`, of the threshold parameter (pseudo-gradient).
    pub threshold: Vec<f64>,
}

/// Everything the forward pass computes, kept for the backward pass and for tests.
#[derive(Debug, Clone, PartialEq)]
pub struct Pass {
    /// Pre-activations `[N, n]`.
    pub z: Vec<f64>,
    /// Latent activations `[N, n]`.
    pub f: Vec<f64>,
    /// Reconstruction error `x̂ − x`, `[N, d_in]`.
    pub residual: Vec<f64>,
    /// The loss.
    pub losses: Losses,
}

impl TrainSae {
    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.b_enc.len()
    }

    /// θ of one latent.
    #[must_use]
    pub fn theta(&self, latent: usize) -> f64 {
        self.parametrisation.threshold(self.threshold[latent])
    }

    fn check(&self, x: Rows<'_>) -> Result<(), ShapeError> {
        let (n, d) = (self.n_latents(), self.d_in);
        x.expect_width("x", d)?;
        check_len("w_enc", &[n, d], self.w_enc.len())?;
        check_len("w_dec", &[n, d], self.w_dec.len())?;
        check_len("b_dec", &[d], self.b_dec.len())?;
        check_len("threshold", &[n], self.threshold.len())?;
        if x.n_rows() == 0 {
            return Err(ShapeError::Dimension { name: "x", dimension: "n_rows", value: 0 });
        }
        Ok(())
    }

    /// What the encoder reads of row `x`: `x − b_dec` with a pre-bias, else `x`.
    #[must_use]
    pub fn encoder_input(&self, x: &[f32]) -> Vec<f64> {
        let bias = if self.pre_bias { 1.0 } else { 0.0 };
        x.iter().zip(&self.b_dec).map(|(&x, &b)| f64::from(x) - bias * b).collect()
    }

    /// Forward pass over rows `x [N, d_in]`.
    ///
    /// # Errors
    /// If shapes disagree or there are no rows.
    pub fn forward(&self, x: Rows<'_>, sparsity: &Sparsity) -> Result<Pass, ShapeError> {
        self.check(x)?;
        let (n, d) = (self.n_latents(), self.d_in);
        let (mut z, mut f, mut residual) = (Vec::new(), Vec::new(), Vec::new());
        let (mut squared_error, mut active) = (0.0, 0.0);
        for row in x {
            let input = self.encoder_input(row);
            let mut error: Vec<f64> = row.iter().zip(&self.b_dec).map(|(&x, &b)| b - f64::from(x)).collect();
            for i in 0..n {
                let pre = dot(&self.w_enc[i * d..(i + 1) * d], &input) + self.b_enc[i];
                let value = jumprelu(pre, self.theta(i));
                add_scaled(&mut error, value, &self.w_dec[i * d..(i + 1) * d]);
                active += step(pre, self.theta(i));
                z.push(pre);
                f.push(value);
            }
            squared_error += dot(&error, &error);
            residual.extend(error);
        }
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
        let n_rows = x.n_rows() as f64;
        let l0 = active / n_rows;
        let losses = Losses { mse: squared_error / n_rows, sparsity: sparsity.value(l0), l0 };
        Ok(Pass { z, f, residual, losses })
    }

    /// Forward and backward pass over rows `x [N, d_in]`, with straight-through bandwidth ε.
    ///
    /// # Errors
    /// If shapes disagree or there are no rows.
    pub fn backward(
        &self,
        x: Rows<'_>,
        sparsity: &Sparsity,
        bandwidth: f64,
    ) -> Result<(Losses, Gradients), ShapeError> {
        let pass = self.forward(x, sparsity)?;
        let (n, d) = (self.n_latents(), self.d_in);
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
        let n_rows = x.n_rows() as f64;
        let lambda = sparsity.effective_lambda(pass.losses.l0);
        let mut gradients = Gradients {
            w_enc: vec![0.0; n * d],
            b_enc: vec![0.0; n],
            w_dec: vec![0.0; n * d],
            b_dec: vec![0.0; d],
            threshold: vec![0.0; n],
        };
        for (row_index, row) in x.iter().enumerate() {
            let input = self.encoder_input(row);
            // G_X̂ = (2/N) R
            let g_out: Vec<f64> =
                pass.residual[row_index * d..(row_index + 1) * d].iter().map(|r| 2.0 / n_rows * r).collect();
            add_scaled(&mut gradients.b_dec, 1.0, &g_out);
            for i in 0..n {
                let (z, theta) = (pass.z[row_index * n + i], self.theta(i));
                let (encoder, direction) = (i * d..(i + 1) * d, i * d..(i + 1) * d);
                let g_f = dot(&g_out, &self.w_dec[direction.clone()]);
                add_scaled(&mut gradients.w_dec[direction], pass.f[row_index * n + i], &g_out);
                let g_z = g_f * step(z, theta);
                add_scaled(&mut gradients.w_enc[encoder.clone()], g_z, &input);
                gradients.b_enc[i] += g_z;
                if self.pre_bias {
                    add_scaled(&mut gradients.b_dec, -g_z, &self.w_enc[encoder]);
                }
                // The window holds inactive latents too: g_f is not masked here.
                if in_window(z, theta, bandwidth) {
                    let g_theta = -(theta * g_f + lambda / n_rows) / bandwidth;
                    gradients.threshold[i] += self.parametrisation.derivative(theta) * g_theta;
                }
            }
        }
        Ok((pass.losses, gradients))
    }
}

/// Removes from gradient `g` its part along the unit `direction` (arXiv 2408.05147 §3.2):
/// `g ← g − (g·d) d`, before the optimiser sees it.
pub fn remove_parallel(g: &mut [f64], direction: &[f64]) {
    let along = dot(g, direction);
    add_scaled(g, -along, direction);
}

/// Scales `direction` to norm 1, after the optimiser moved it; a zero vector stays zero.
pub fn normalise(direction: &mut [f64]) {
    let norm = dot(direction, direction).sqrt();
    if norm > 0.0 {
        direction.iter_mut().for_each(|v| *v /= norm);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f64], factor: f64, v: &[f64]) {
    for (to, v) in to.iter_mut().zip(v) {
        *to += factor * v;
    }
}
