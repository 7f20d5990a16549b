//! What training changes: f32 master parameters, and Adam's moments of the same shapes.

use anyhow::Result;
use shared::Sae;
use shared::fold::{Scales, Trained, Training, fold};
use shared::loss::Parametrisation;

/// Arrays shaped as the parameters of an autoencoder, latent-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensors {
    /// Encoder rows `[n, d_in]`.
    pub w_enc: Vec<f32>,
    /// Encoder bias `[n]`; of the gate, where there is one.
    pub b_enc: Vec<f32>,
    /// Decoder directions `[n, d_out]`.
    pub w_dec: Vec<f32>,
    /// Decoder bias `[d_out]`.
    pub b_dec: Vec<f32>,
    /// Parameters of the latent function, `[n]` each: the threshold parameter of a JumpReLU, or a gate's `r_mag` and `b_mag`;
    /// else zeros that nobody reads. Where layers have thresholds of their own, the first is `[n, L]`.
    pub own: [Vec<f32>; 2],
    /// The skip connection `[d_out, d_in]`; empty without one.
    pub w_skip: Vec<f32>,
}

impl Tensors {
    /// Zeros.
    #[must_use]
    pub fn zeros(n_latents: usize, d_in: usize, d_out: usize, skip: bool) -> Self {
        Self {
            w_enc: vec![0.0; n_latents * d_in],
            b_enc: vec![0.0; n_latents],
            w_dec: vec![0.0; n_latents * d_out],
            b_dec: vec![0.0; d_out],
            own: [vec![0.0; n_latents], vec![0.0; n_latents]],
            w_skip: vec![0.0; if skip { d_out * d_in } else { 0 }],
        }
    }

    /// With a threshold parameter for each of `n_layers` layers.
    #[must_use]
    pub fn with_thresholds(mut self, n_layers: usize) -> Self {
        self.own[0] = vec![0.0; self.b_enc.len() * n_layers];
        self
    }

    /// Names and values of all arrays, in a fixed order.
    #[must_use]
    pub fn named(&self) -> [(&'static str, &Vec<f32>); 7] {
        let [first, second] = &self.own;
        [
            ("w_enc", &self.w_enc),
            ("b_enc", &self.b_enc),
            ("w_dec", &self.w_dec),
            ("b_dec", &self.b_dec),
            ("own.0", first),
            ("own.1", second),
            ("w_skip", &self.w_skip),
        ]
    }

    /// As [`Tensors::named`], to be written.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Vec<f32>); 7] {
        let [first, second] = &mut self.own;
        [
            ("w_enc", &mut self.w_enc),
            ("b_enc", &mut self.b_enc),
            ("w_dec", &mut self.w_dec),
            ("b_dec", &mut self.b_dec),
            ("own.0", first),
            ("own.1", second),
            ("w_skip", &mut self.w_skip),
        ]
    }

    /// Pieces of `size` consecutive latents, to be written side by side.
    pub(crate) fn pieces(&mut self, size: usize) -> impl Iterator<Item = Piece<'_>> {
        let n = self.b_enc.len().max(1);
        let (d_in, d_out, n_layers) = (self.w_enc.len() / n, self.w_dec.len() / n, self.own[0].len() / n);
        let [first, second] = &mut self.own;
        let weights = self.w_enc.chunks_mut(size * d_in).zip(self.w_dec.chunks_mut(size * d_out));
        let scalars =
            self.b_enc.chunks_mut(size).zip(first.chunks_mut(size * n_layers)).zip(second.chunks_mut(size));
        weights.zip(scalars).map(|((w_enc, w_dec), ((b_enc, first), second))| Piece {
            w_enc,
            w_dec,
            b_enc,
            own: [first, second],
        })
    }
}

/// The arrays of some consecutive latents.
pub(crate) struct Piece<'a> {
    pub(crate) w_enc: &'a mut [f32],
    pub(crate) w_dec: &'a mut [f32],
    pub(crate) b_enc: &'a mut [f32],
    pub(crate) own: [&'a mut [f32]; 2],
}

/// How pre-activations become latents; the numbers that are trained are in [`Tensors::own`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Latents {
    /// `max(z, 0)`.
    Relu,
    /// A threshold for each latent.
    JumpRelu {
        /// What [`Tensors::own`] holds: log θ or θ.
        parametrisation: Parametrisation,
        /// Width ε of the straight-through window.
        bandwidth: f32,
    },
    /// A gate and a magnitude path.
    Gated,
    /// The `k` largest of a row.
    TopK {
        /// k.
        k: usize,
    },
    /// The `k · N` largest of a batch.
    BatchTopK {
        /// k.
        k: usize,
        /// The smallest value chosen, a running mean over batches: the threshold at inference. Zero before the first batch.
        threshold: f32,
    },
}

/// Master parameters in units of the normalised data; f32 whatever computes with them.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Width of the vectors read.
    pub d_in: usize,
    /// Width of the vectors reconstructed.
    pub d_out: usize,
    /// The numbers.
    pub tensors: Tensors,
    /// The latent function.
    pub latents: Latents,
    /// Whether the encoder reads `x − b_dec`.
    pub pre_bias: bool,
    /// Whether the encoder bias is trained, or stays what it is.
    pub encoder_bias: bool,
}

impl Params {
    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.tensors.b_enc.len()
    }

    /// Layers with thresholds of their own; 1 where all share them.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        (self.tensors.own[0].len() / self.n_latents().max(1)).max(1)
    }

    /// θ of every latent `[n]`, or of every latent at every layer `[n, L]`, zero where the latent function has none: the exponential is taken in f64 and rounded once.
    #[must_use]
    pub fn thetas(&self) -> Vec<f32> {
        match self.latents {
            Latents::JumpRelu { parametrisation, .. } => {
                #[expect(clippy::cast_possible_truncation, reason = "thresholds are f32")]
                let theta = |&p: &f32| parametrisation.threshold(f64::from(p)) as f32;
                self.tensors.own[0].iter().map(theta).collect()
            }
            _ => vec![0.0; self.n_latents()],
        }
    }

    /// The released form for raw activations; where layers have thresholds of their own, with the mean over layers.
    ///
    /// # Errors
    /// If a parameter is not finite.
    pub fn release(&self, scales: Scales) -> Result<Sae> {
        let t = &self.tensors;
        let means = means(&self.thetas(), self.n_layers());
        let latents = match self.latents {
            Latents::Relu => Trained::Relu,
            Latents::JumpRelu { .. } => Trained::JumpRelu { threshold: &means },
            Latents::Gated => Trained::Gated { r_mag: &t.own[0], b_mag: &t.own[1] },
            Latents::TopK { k } => Trained::TopK { k },
            Latents::BatchTopK { threshold, .. } => Trained::BatchTopK { threshold },
        };
        let training = Training {
            w_enc: &t.w_enc,
            b_enc: &t.b_enc,
            w_dec: &t.w_dec,
            b_dec: &t.b_dec,
            w_skip: Some(&t.w_skip[..]).filter(|w_skip| !w_skip.is_empty()),
            latents,
            pre_bias: self.pre_bias,
        };
        Ok(fold(&training, scales)?)
    }
}

/// The mean of each `n` consecutive values.
fn means(values: &[f32], n: usize) -> Vec<f32> {
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "parameters are f32")]
    let mean = |some: &[f32]| (some.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64) as f32;
    values.chunks_exact(n).map(mean).collect()
}

/// Adam's moments, and the step in which each latent last moved.
///
/// A latent without gradient in a step does not move under Adam with β₁ = 0; its second moment only
/// decays by β₂. So moments are left alone and caught up by β₂ to the number of steps missed when the
/// latent is next used. With β₁ > 0 every latent moves in every step.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// First moments; none with β₁ = 0.
    pub first: Option<Tensors>,
    /// Second moments.
    pub second: Tensors,
    /// The step that last changed encoder row, bias and direction, `[n]`; 0 = none.
    pub weights_step: Vec<u64>,
    /// The step that last changed the parameters of the latent function, `[n]`; 0 = none.
    pub own_step: Vec<u64>,
}

impl Moments {
    /// All zero, before the first step.
    #[must_use]
    pub fn new(params: &Params, momentum: bool) -> Self {
        let n = params.n_latents();
        let zeros = || {
            let tensors = Tensors::zeros(n, params.d_in, params.d_out, !params.tensors.w_skip.is_empty());
            tensors.with_thresholds(params.n_layers())
        };
        Self { first: momentum.then(zeros), second: zeros(), weights_step: vec![0; n], own_step: vec![0; n] }
    }
}
