//! Every training variant at a small size, and the dense f64 optimiser that steps are judged by.

use native::train::{Betas, Latents, Params, Settings, Tensors};
use shared::Rows;
use shared::loss::{
    AuxForm, AuxK, DeadPull, Gradients, Latents as Reference, MultiTopK, Objective, Parametrisation, Prefix,
    Sparsity, TrainSae, normalise, remove_parallel,
};

pub(crate) const D: usize = 12;
pub(crate) const N_LATENTS: usize = 300;
pub(crate) const N_ROWS: usize = 45;

/// A fixed irregular sequence, roughly normal.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..6).map(|_| uniform() - 0.5).sum::<f32>() * 2f32.sqrt()
    }

    pub(crate) fn vector(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * scale).collect()
    }
}

/// A variant under test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) latents: Latents,
    pub(crate) objective: Objective,
    pub(crate) pre_bias: bool,
    pub(crate) d_out: usize,
    pub(crate) skip: bool,
    pub(crate) momentum: f64,
    pub(crate) encoder_bias: bool,
    /// Layers with thresholds of their own.
    pub(crate) n_layers: usize,
    /// Whether rows have weights and deviations.
    pub(crate) weighs: bool,
}

impl Case {
    pub(crate) fn new(name: &'static str, latents: Latents, sparsity: Sparsity) -> Self {
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

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The objective of a batch of `n_rows`.
    pub(crate) fn objective(&self, n_rows: usize) -> Objective {
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

    pub(crate) fn settings<'a>(&self, objective: &'a Objective) -> Settings<'a> {
        let betas = Betas { first: self.momentum, second: 0.999, eps: 1e-8 };
        Settings { lr: 1e-3, own_lr: 3e-3, betas, objective }
    }

    pub(crate) fn start(&self) -> Params {
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

pub(crate) fn jump(parametrisation: Parametrisation) -> Latents {
    Latents::JumpRelu { parametrisation, bandwidth: 0.1 }
}

pub(crate) fn dead() -> Vec<bool> {
    (0..N_LATENTS).map(|i| i % 4 == 0).collect()
}

pub(crate) fn cases() -> Vec<Case> {
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

pub(crate) fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

/// The dense f64 optimiser: every value, every step.
pub(crate) struct Textbook {
    pub(crate) sae: TrainSae,
    /// First and second moments of each array, in the order of [`arrays`].
    pub(crate) moments: Vec<[Vec<f64>; 2]>,
    pub(crate) step: i32,
    pub(crate) encoder_bias: bool,
}

/// Every trained array with its gradient, and whether it takes the rate of the latent function.
pub(crate) fn arrays<'a>(
    sae: &'a mut TrainSae,
    g: &'a Gradients,
) -> Vec<(&'a mut Vec<f64>, &'a Vec<f64>, bool)> {
    let mut arrays = vec![
        (&mut sae.w_enc, &g.w_enc, false),
        (&mut sae.b_enc, &g.b_enc, false),
        (&mut sae.w_dec, &g.w_dec, false),
        (&mut sae.b_dec, &g.b_dec, false),
    ];
    match &mut sae.latents {
        Reference::JumpRelu { threshold, .. } => arrays.push((threshold, &g.threshold, true)),
        Reference::Gated { r_mag, b_mag } => {
            arrays.extend([(r_mag, &g.r_mag, true), (b_mag, &g.b_mag, true)]);
        }
        _ => {}
    }
    arrays.extend(sae.w_skip.as_mut().map(|skip| (skip, &g.w_skip, false)));
    arrays
}

impl Textbook {
    pub(crate) fn new(params: &Params) -> Self {
        let t = &params.tensors;
        let latents = match params.latents {
            Latents::Relu => Reference::Relu,
            Latents::JumpRelu { parametrisation, bandwidth } => Reference::JumpRelu {
                threshold: wide(&t.own[0]),
                parametrisation,
                bandwidth: f64::from(bandwidth),
            },
            Latents::Gated => Reference::Gated { r_mag: wide(&t.own[0]), b_mag: wide(&t.own[1]) },
            Latents::TopK { k } => Reference::TopK { k },
            Latents::BatchTopK { k, .. } => Reference::BatchTopK { k },
        };
        let sae = TrainSae {
            d_in: D,
            d_out: params.d_out,
            w_enc: wide(&t.w_enc),
            b_enc: wide(&t.b_enc),
            w_dec: wide(&t.w_dec),
            b_dec: wide(&t.b_dec),
            latents,
            pre_bias: params.pre_bias,
            w_skip: (!t.w_skip.is_empty()).then(|| wide(&t.w_skip)),
        };
        Self { sae, moments: Vec::new(), step: 0, encoder_bias: params.encoder_bias }
    }

    /// Takes a step; returns the loss before it.
    pub(crate) fn step(&mut self, x: Rows<'_>, y: Rows<'_>, settings: &Settings<'_>) -> f64 {
        self.step += 1;
        let (losses, mut g) = self.sae.backward(x, y, settings.objective).unwrap();
        if !self.encoder_bias {
            g.b_enc.fill(0.0);
        }
        let (d_out, unit) = (self.sae.d_out, settings.objective.sparsity.unit_directions());
        if unit {
            let directions = self.sae.w_dec.chunks_exact(d_out);
            g.w_dec.chunks_exact_mut(d_out).zip(directions).for_each(|(g, d)| remove_parallel(g, d));
        }
        let Betas { first, second, eps } = settings.betas;
        let corrections = [first, second].map(|beta| 1.0 - beta.powi(self.step));
        for (k, (values, g, own)) in arrays(&mut self.sae, &g).into_iter().enumerate() {
            if self.moments.len() <= k {
                self.moments.push([vec![0.0; g.len()], vec![0.0; g.len()]]);
            }
            let lr = if own { settings.own_lr } else { settings.lr };
            let [m, v] = &mut self.moments[k];
            for (((p, m), v), g) in values.iter_mut().zip(m).zip(v).zip(g) {
                *m = first * *m + (1.0 - first) * g;
                *v = second * *v + (1.0 - second) * g * g;
                *p -= lr * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + eps);
            }
        }
        if unit {
            self.sae.w_dec.chunks_exact_mut(d_out).for_each(normalise);
        }
        losses.total()
    }

    /// The smallest distance of a decision from being another one: of a pre-activation from a threshold or the edge of a
    /// window, or of the last chosen from the first that is not. Where it is tiny, f32 may rightly decide otherwise, and the
    /// comparison would mean nothing.
    pub(crate) fn margin(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> f64 {
        let pass = self.sae.forward(x, y, objective).unwrap();
        let gap = |z: &[f64], k: usize| {
            let mut sorted: Vec<f64> = z.iter().copied().filter(|z| *z > 0.0).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            if k == 0 || sorted.len() <= k { f64::INFINITY } else { sorted[k - 1] - sorted[k] }
        };
        let rows = |k: usize| pass.z.chunks_exact(N_LATENTS).map(|z| gap(z, k)).fold(f64::INFINITY, f64::min);
        let mut margin = pass.z.iter().map(|z| z.abs()).fold(f64::INFINITY, f64::min);
        margin = margin.min(match &self.sae.latents {
            Reference::TopK { k } => rows(*k),
            Reference::BatchTopK { k } => gap(&pass.z, k * N_ROWS),
            Reference::JumpRelu { bandwidth, .. } => {
                let layer = |k: usize| objective.examples.layer(k / N_LATENTS);
                let theta = |k: usize| self.sae.theta(k % N_LATENTS, layer(k));
                let distances = pass.z.iter().enumerate().map(|(k, z)| (z - theta(k)).abs());
                distances.map(|d| d.min((d - bandwidth / 2.0).abs())).fold(f64::INFINITY, f64::min)
            }
            _ => f64::INFINITY,
        });
        if let Some(multi) = &objective.multi {
            margin = margin.min(rows(multi.k));
        }
        if let Some(aux) = &objective.aux_k {
            for z in pass.z.chunks_exact(N_LATENTS) {
                let dead: Vec<f64> =
                    z.iter().zip(&aux.dead).filter(|(_, dead)| **dead).map(|(z, _)| *z).collect();
                margin = margin.min(gap(&dead, aux.k));
            }
        }
        margin
    }
}

/// ‖got − want‖ over how far `want` moved from `from`.
pub(crate) fn drift(got: &[f32], want: &[f64], from: &[f32]) -> f64 {
    assert!(got.len() == want.len() && got.len() == from.len() && !got.is_empty());
    let error: f64 = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum();
    let moved: f64 = from.iter().zip(want).map(|(&f, w)| (f64::from(f) - w).powi(2)).sum();
    assert!(moved > 0.0 && error.is_finite());
    (error / moved).sqrt()
}
