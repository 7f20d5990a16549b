//! Every training variant at a small size: what a step is judged on.

#![expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small numbers, made up")]

use shared::loss::{AuxForm, AuxK, DeadPull, MultiTopK, Objective, Parametrisation, Prefix, Sparsity};

use crate::train::{Betas, Latents, Params, Settings, Tensors};

/// Width of the vectors read.
pub const D: usize = 12;
/// Latents of each.
pub const N_LATENTS: usize = 300;
/// Rows of a batch.
pub const N_ROWS: usize = 45;

/// A fixed irregular sequence, roughly normal.
#[derive(Debug, Clone)]
pub struct Noise(pub u64);

impl Noise {
    /// The next value.
    pub fn value(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..6).map(|_| uniform() - 0.5).sum::<f32>() * 2f32.sqrt()
    }

    /// The next `n` values, times `scale`.
    #[must_use]
    pub fn vector(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * scale).collect()
    }
}

/// A variant under test.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// The latent function.
    pub latents: Latents,
    /// The objective, but for what is said of rows.
    pub objective: Objective,
    /// Whether the encoder reads `x − b_dec`.
    pub pre_bias: bool,
    /// Width of what is reconstructed.
    pub d_out: usize,
    /// Whether there is a skip connection.
    pub skip: bool,
    /// β₁.
    pub momentum: f64,
    /// Whether the encoder bias is trained.
    pub encoder_bias: bool,
    /// Layers with thresholds of their own.
    pub n_layers: usize,
    /// Whether rows have weights and deviations.
    pub weighs: bool,
}

impl Case {
    fn new(name: &'static str, latents: Latents, sparsity: Sparsity) -> Self {
        let objective = Objective::plain(sparsity);
        Self {
            name,
            latents,
            objective,
            pre_bias: true,
            d_out: D,
            skip: false,
            momentum: 0.0,
            encoder_bias: true,
            n_layers: 1,
            weighs: false,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The objective of a batch of `n_rows`.
    #[must_use]
    pub fn objective(&self, n_rows: usize) -> Objective {
        let mut objective = self.objective.clone();
        if self.n_layers > 1 {
            // Layers of unequal numbers of rows, in no order.
            let layer = |row: usize| [0u16, 2, 1, 2, 2][row % 5] % self.n_layers as u16;
            objective.examples.layers = (0..n_rows).map(layer).collect();
            objective.l0_by_layer = true;
        }
        if self.weighs {
            objective.examples.weights = (0..n_rows).map(|row| 0.5 + (row % 7) as f64 / 4.0).collect();
            objective.examples.deviations = (0..n_rows).map(|row| 0.6 + (row % 3) as f64 / 2.0).collect();
        }
        objective
    }

    /// The settings of every step.
    #[must_use]
    pub fn settings<'a>(&self, objective: &'a Objective) -> Settings<'a> {
        let betas = Betas { first: self.momentum, second: 0.999, eps: 1e-8 };
        Settings { lr: 1e-3, own_lr: 3e-3, betas, objective }
    }

    /// Parameters to start from.
    #[must_use]
    pub fn start(&self) -> Params {
        let mut noise = Noise(11);
        let mut tensors = Tensors::zeros(N_LATENTS, D, self.d_out, self.skip).with_thresholds(self.n_layers);
        tensors.w_dec = noise.vector(N_LATENTS * self.d_out, 1.0);
        for row in tensors.w_dec.chunks_exact_mut(self.d_out) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        tensors.w_enc =
            if self.d_out == D { tensors.w_dec.clone() } else { noise.vector(N_LATENTS * D, 0.3) };
        tensors.b_enc = noise.vector(N_LATENTS, 0.02);
        tensors.b_dec = noise.vector(self.d_out, 0.05);
        tensors.w_skip = noise.vector(tensors.w_skip.len(), 0.1);
        // Every fourth latent is out of reach of most batches.
        let reach = |i: usize| if i.is_multiple_of(4) { 0.9 } else { 0.5 };
        match self.latents {
            Latents::JumpRelu { parametrisation, .. } => {
                let theta = |(i, v): (usize, f32)| {
                    let (latent, layer) = (i / self.n_layers, i % self.n_layers);
                    parametrisation.parameter(reach(latent) + 0.02 * f64::from(v) + 0.1 * layer as f64) as f32
                };
                let noise = noise.vector(N_LATENTS * self.n_layers, 1.0);
                tensors.own[0] = noise.into_iter().enumerate().map(theta).collect();
            }
            Latents::Gated => tensors.own = [noise.vector(N_LATENTS, 0.1), noise.vector(N_LATENTS, 0.2)],
            _ => {}
        }
        if matches!(self.latents, Latents::Relu | Latents::Gated) {
            tensors.b_enc.iter_mut().enumerate().for_each(|(i, b)| *b -= reach(i) as f32);
        }
        let (latents, pre_bias, encoder_bias) = (self.latents, self.pre_bias, self.encoder_bias);
        Params { d_in: D, d_out: self.d_out, tensors, latents, pre_bias, encoder_bias }
    }
}

fn jump(parametrisation: Parametrisation) -> Latents {
    Latents::JumpRelu { parametrisation, bandwidth: 0.1 }
}

fn dead() -> Vec<bool> {
    (0..N_LATENTS).map(|i| i % 4 == 0).collect()
}

/// All of them.
#[must_use]
pub fn cases() -> Vec<Case> {
    let target = Sparsity::TargetL0 { lambda: 0.5, target: 4.0 };
    let norm = |p, decoder_norm| Sparsity::Norm { lambda: 0.02, p, decoder_norm };
    let nested = || {
        [(30, 0.5), (100, 1.0), (300, 1.5)].map(|(n_latents, weight)| Prefix { n_latents, weight }).to_vec()
    };
    let aux_of = |form| Some(AuxK { form, k: 5, weight: 0.1, dead: dead() });
    let aux = || aux_of(AuxForm::Gao);
    let transcoder = |case: &mut Case| (case.pre_bias, case.d_out) = (false, 17);
    vec![
        Case::new("jumprelu", jump(Parametrisation::Log), target),
        Case::new("raw jumprelu", jump(Parametrisation::Raw), Sparsity::L0 { lambda: 0.01 })
            .with(|c| c.pre_bias = false),
        Case::new("jumprelu with momentum", jump(Parametrisation::Log), target).with(|c| c.momentum = 0.9),
        Case::new("jumprelu, dead-latent loss", jump(Parametrisation::Log), target)
            .with(|c| c.objective.dead_pull = Some(DeadPull { weight: 0.05, dead: dead() })),
        Case::new("matryoshka jumprelu, auxk", jump(Parametrisation::Log), target)
            .with(|c| (c.objective.prefixes, c.objective.aux_k) = (nested(), aux())),
        Case::new("relu", Latents::Relu, norm(1.0, false)),
        Case::new("relu by decoder norm", Latents::Relu, norm(1.0, true)).with(|c| c.momentum = 0.9),
        Case::new("p-annealed", Latents::Relu, norm(0.4, false)),
        Case::new("gated", Latents::Gated, norm(1.0, false)),
        Case::new("gated RI-L1", Latents::Gated, norm(1.0, true)).with(|c| c.objective.normaliser = 2.0),
        Case::new("topk", Latents::TopK { k: 6 }, Sparsity::None).with(|c| c.momentum = 0.9),
        Case::new("topk, multi and auxk", Latents::TopK { k: 3 }, Sparsity::None).with(|c| {
            c.objective.multi = Some(MultiTopK { k: 12, weight: 0.125 });
            c.objective.aux_k = aux();
            c.objective.normaliser = 0.7;
        }),
        Case::new("batchtopk", Latents::BatchTopK { k: 5, threshold: 0.0 }, Sparsity::None)
            .with(|c| c.objective.aux_k = aux()),
        Case::new("matryoshka topk", Latents::TopK { k: 6 }, Sparsity::None)
            .with(|c| c.objective.prefixes = nested()),
        Case::new("jumprelu, thresholds of layers", jump(Parametrisation::Log), target)
            .with(|c| c.n_layers = 3),
        Case::new("raw thresholds of layers, momentum, dead-latent loss", jump(Parametrisation::Raw), target)
            .with(|c| {
                (c.n_layers, c.momentum) = (3, 0.9);
                c.objective.dead_pull = Some(DeadPull { weight: 0.05, dead: dead() });
            }),
        Case::new("weighted jumprelu of layers, prefixes", jump(Parametrisation::Log), target).with(|c| {
            (c.n_layers, c.weighs, c.objective.prefixes) = (3, true, nested());
        }),
        Case::new("weighted gated", Latents::Gated, norm(1.0, false)).with(|c| c.weighs = true),
        Case::new("weighted topk, multi and auxk", Latents::TopK { k: 3 }, Sparsity::None).with(|c| {
            c.objective.multi = Some(MultiTopK { k: 12, weight: 0.125 });
            (c.weighs, c.objective.aux_k, c.objective.normaliser) = (true, aux(), 0.7);
        }),
        Case::new("topk as mlsae", Latents::TopK { k: 6 }, Sparsity::None).with(|c| {
            (c.weighs, c.encoder_bias, c.momentum) = (true, false, 0.9);
            (c.objective.aux_k, c.objective.normaliser) = (aux_of(AuxForm::Mlsae), 0.7);
        }),
        Case::new("matryoshka jumprelu, auxk of mlsae", jump(Parametrisation::Log), target)
            .with(|c| (c.objective.prefixes, c.objective.aux_k) = (nested(), aux_of(AuxForm::Mlsae))),
        Case::new("transcoder", jump(Parametrisation::Log), target).with(transcoder),
        Case::new("skip transcoder", Latents::TopK { k: 6 }, Sparsity::None)
            .with(transcoder)
            .with(|c| c.skip = true),
    ]
}
