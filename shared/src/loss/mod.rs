//! The training objectives and their complete backward passes in f64: what every training step is judged by.
//!
//! One form covers every variant. With `X' = X − b_dec` when the encoder has a pre-bias, else `X`, targets `Y` (`X` itself,
//! unless a transcoder is trained), and means over the `N` rows:
//!
//! ```text
//! Z = X' W_encᵀ + b_enc      F = latent function of Z      X̂_m = F[..m] W_dec[..m] + b_dec + X W_skipᵀ
//! L = (1/ν) Σ_m w_m mean‖X̂_m − Y‖² + sparsity + auxiliary terms
//! ```
//! - [`Latents`] is the latent function: ReLU, JumpReLU (arXiv 2407.14435), gated (arXiv 2404.16014), TopK
//!   (arXiv 2406.04093), BatchTopK (arXiv 2412.06410).
//! - [`Sparsity`] is the sparsity term: on L0, or a norm of the latents, annealed or not (arXiv 2408.00113).
//! - [`Objective`] has the rest: nested prefixes (Matryoshka, arXiv 2503.17547), AuxK and multi-TopK (arXiv 2406.04093).
//!
//! What is said of each row, such as the layer of a multi-layer SAE it is of, is in [`Examples`]; thresholds may be each layer's own.
//!
//! `forward` computes the loss as a sum of [`Term`]s, each a decoded set of values with its residual; `backward` walks back
//! through them. Weights are latent-major, `[n, d]`, as everywhere.

mod backward;
mod examples;
mod forward;
mod gated;
mod sparsity;
pub mod topk;

pub use backward::Gradients;
pub use examples::{Examples, Levels, row_moments};
pub use forward::{Pass, Term};
pub use sparsity::{Parametrisation, Sparsity};

use crate::error::{ShapeError, check_len};
use crate::rows::Rows;

/// How pre-activations become latents, with the parameters of its own that a variant trains.
#[derive(Debug, Clone, PartialEq)]
pub enum Latents {
    /// `f = max(z, 0)`.
    Relu,
    /// `f = z · H(z − θ)` with a threshold parameter of each latent `[n]`, or of each latent at each layer `[n, L]`.
    JumpRelu {
        /// Threshold parameters, log θ or θ.
        threshold: Vec<f64>,
        /// Which of the two.
        parametrisation: Parametrisation,
        /// Width ε of the straight-through window.
        bandwidth: f64,
    },
    /// `f = H(π_gate) · max(π_mag, 0)` with `π_gate = z` and `π_mag = exp(r_mag) · (z − b_enc) + b_mag` (arXiv 2404.16014
    /// eqs. 3–7).
    Gated {
        /// Log of the magnitude path's scale `[n]`.
        r_mag: Vec<f64>,
        /// The magnitude path's bias `[n]`.
        b_mag: Vec<f64>,
    },
    /// The `k` largest positive values of each row.
    TopK {
        /// k.
        k: usize,
    },
    /// The `k · N` largest positive values of the batch of `N` rows.
    BatchTopK {
        /// k.
        k: usize,
    },
}

/// A nested dictionary: the first `n_latents` latents reconstruct alone, too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prefix {
    /// Its length.
    pub n_latents: usize,
    /// The weight of its error.
    pub weight: f64,
}

/// What AuxK measures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuxForm {
    /// `mean ‖e − ê‖² / mean ‖e − ē‖²` with `ē` the mean row, `ê` decoded without a bias, and `e = y − x̂` constant (arXiv 2406.04093
    /// §2.4).
    #[default]
    Gao,
    /// As in multi-layer SAEs: `e` with the scaling of its row undone, `ê` with `b_dec` and scaled as the encoder reads, `ē` the mean
    /// of a row's own elements, and `e` not constant (arXiv 2409.04185 §3 and its code).
    Mlsae,
}

/// The `k` largest dead latents of a row reconstruct what is left (arXiv 2406.04093 §2.4).
#[derive(Debug, Clone, PartialEq)]
pub struct AuxK {
    /// What is measured.
    pub form: AuxForm,
    /// Latents a row, at most.
    pub k: usize,
    /// Weight of the term.
    pub weight: f64,
    /// Which latents are dead `[n]`.
    pub dead: Vec<bool>,
}

/// The `k` largest latents of a row reconstruct as well (multi-TopK, arXiv 2406.04093 §5.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultiTopK {
    /// k, four times the k of the latent function as published.
    pub k: usize,
    /// Weight of the term, 1/8 as published.
    pub weight: f64,
}

/// Pulls the pre-activations of dead latents towards their thresholds: `weight · mean_n Σ_dead max(θ − z, 0)`.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadPull {
    /// Weight of the term.
    pub weight: f64,
    /// Which latents are dead `[n]`.
    pub dead: Vec<bool>,
}

/// The objective of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    /// The sparsity term.
    pub sparsity: Sparsity,
    /// Nested prefixes with the whole dictionary as the last; empty for the whole alone with weight 1.
    pub prefixes: Vec<Prefix>,
    /// AuxK, where it is used.
    pub aux_k: Option<AuxK>,
    /// Multi-TopK, where it is used.
    pub multi: Option<MultiTopK>,
    /// The dead-latent loss, where it is used (JumpReLU only).
    pub dead_pull: Option<DeadPull>,
    /// ν, what squared errors are divided by.
    pub normaliser: f64,
    /// What is said of each row. Weights are those of every reconstruction, but not of AuxK, which is measured by what is left.
    pub examples: Examples,
    /// Whether the term in L0 is one of each layer's own mean, weighted by its rows.
    pub l0_by_layer: bool,
}

impl Objective {
    /// Mean squared error and `sparsity`, nothing else.
    #[must_use]
    pub fn plain(sparsity: Sparsity) -> Self {
        Self {
            sparsity,
            prefixes: Vec::new(),
            aux_k: None,
            multi: None,
            dead_pull: None,
            normaliser: 1.0,
            examples: Examples::default(),
            l0_by_layer: false,
        }
    }
}

/// Training parameters in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSae {
    /// Width of the vectors read.
    pub d_in: usize,
    /// Width of the vectors reconstructed.
    pub d_out: usize,
    /// Encoder rows `[n, d_in]`.
    pub w_enc: Vec<f64>,
    /// Encoder bias `[n]`.
    pub b_enc: Vec<f64>,
    /// Decoder directions `[n, d_out]`.
    pub w_dec: Vec<f64>,
    /// Decoder bias `[d_out]`.
    pub b_dec: Vec<f64>,
    /// The latent function.
    pub latents: Latents,
    /// Whether the encoder reads `x − b_dec` instead of `x`; only where input and output are the same vectors.
    pub pre_bias: bool,
    /// The affine skip connection `[d_out, d_in]` of a skip transcoder.
    pub w_skip: Option<Vec<f64>>,
}

/// The parts of the loss of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// `mean ‖y − x̂‖²` of the whole dictionary, summed over the width.
    pub mse: f64,
    /// The reconstruction terms of the objective: `mse` itself, unless prefixes, multi-TopK or a normaliser are used.
    pub reconstruction: f64,
    /// The sparsity term.
    pub sparsity: f64,
    /// Everything else: the gate's own reconstruction, AuxK, the dead-latent loss.
    pub auxiliary: f64,
    /// Mean active latents a row.
    pub l0: f64,
}

impl Losses {
    /// The objective.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.reconstruction + self.sparsity + self.auxiliary
    }
}

impl TrainSae {
    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.b_enc.len()
    }

    /// Layers with thresholds of their own; 1 where all share them.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        match &self.latents {
            Latents::JumpRelu { threshold, .. } => (threshold.len() / self.n_latents().max(1)).max(1),
            _ => 1,
        }
    }

    /// Where the threshold parameter of `latent` at `layer` is.
    fn threshold_at(&self, latent: usize, layer: usize) -> usize {
        let n_layers = self.n_layers();
        latent * n_layers + if n_layers > 1 { layer } else { 0 }
    }

    fn encoder(&self, latent: usize) -> &[f64] {
        &self.w_enc[latent * self.d_in..(latent + 1) * self.d_in]
    }

    fn direction(&self, latent: usize) -> &[f64] {
        &self.w_dec[latent * self.d_out..(latent + 1) * self.d_out]
    }

    /// What the encoder reads of row `x`: `x − b_dec` with a pre-bias, else `x`.
    #[must_use]
    pub fn encoder_input(&self, x: &[f32]) -> Vec<f64> {
        if self.pre_bias {
            x.iter().zip(&self.b_dec).map(|(&x, &b)| f64::from(x) - b).collect()
        } else {
            x.iter().map(|&x| f64::from(x)).collect()
        }
    }

    fn check(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> Result<(), ShapeError> {
        let n = self.n_latents();
        x.expect_width("x", self.d_in)?;
        y.expect_width("y", self.d_out)?;
        check_len("y", &[x.n_rows(), self.d_out], y.data().len())?;
        check_len("w_enc", &[n, self.d_in], self.w_enc.len())?;
        check_len("w_dec", &[n, self.d_out], self.w_dec.len())?;
        check_len("b_dec", &[self.d_out], self.b_dec.len())?;
        match &self.latents {
            Latents::JumpRelu { threshold, .. } => {
                check_len("threshold", &[n, self.n_layers()], threshold.len())?;
            }
            Latents::Gated { r_mag, b_mag } => {
                check_len("r_mag", &[n], r_mag.len())?;
                check_len("b_mag", &[n], b_mag.len())?;
            }
            Latents::Relu | Latents::TopK { .. } | Latents::BatchTopK { .. } => {}
        }
        if let Some(skip) = &self.w_skip {
            check_len("w_skip", &[self.d_out, self.d_in], skip.len())?;
        }
        if self.pre_bias {
            check_len("b_dec with a pre-bias", &[self.d_in], self.b_dec.len())?;
        }
        let dead = objective.aux_k.as_ref().map(|aux| &aux.dead);
        for dead in dead.into_iter().chain(objective.dead_pull.as_ref().map(|pull| &pull.dead)) {
            check_len("dead", &[n], dead.len())?;
        }
        objective.examples.check(x.n_rows(), self.n_layers())?;
        if x.n_rows() == 0 {
            return Err(ShapeError::Dimension { name: "x", dimension: "n_rows", value: 0 });
        }
        Ok(())
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

fn to_f64(n: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let n = n as f64;
    n
}
