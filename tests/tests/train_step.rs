//! The sparse f32 training step against the dense f64 reference with textbook Adam, for every variant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use native::train::{Betas, Latents, Params, Settings, Tensors, Trainer};
use shared::Rows;
use shared::config::train::EncoderPrecision;
use shared::loss::{
    AuxForm, AuxK, DeadPull, Gradients, Latents as Reference, MultiTopK, Objective, Parametrisation, Prefix,
    Sparsity, TrainSae, normalise, remove_parallel,
};

const D: usize = 12;
const N_LATENTS: usize = 300;
const N_ROWS: usize = 45;

/// A fixed irregular sequence, roughly normal.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..6).map(|_| uniform() - 0.5).sum::<f32>() * 2f32.sqrt()
    }

    fn vector(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * scale).collect()
    }
}

/// A variant under test.
struct Case {
    name: &'static str,
    latents: Latents,
    objective: Objective,
    pre_bias: bool,
    d_out: usize,
    skip: bool,
    momentum: f64,
    encoder_bias: bool,
    /// Layers with thresholds of their own.
    n_layers: usize,
    /// Whether rows have weights and deviations.
    weighs: bool,
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
    fn objective(&self, n_rows: usize) -> Objective {
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

    fn settings<'a>(&self, objective: &'a Objective) -> Settings<'a> {
        let betas = Betas { first: self.momentum, second: 0.999, eps: 1e-8 };
        Settings { lr: 1e-3, own_lr: 3e-3, betas, objective }
    }

    fn start(&self) -> Params {
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

fn cases() -> Vec<Case> {
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

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

/// The dense f64 optimiser: every value, every step.
struct Textbook {
    sae: TrainSae,
    /// First and second moments of each array, in the order of [`arrays`].
    moments: Vec<[Vec<f64>; 2]>,
    step: i32,
    encoder_bias: bool,
}

/// Every trained array with its gradient, and whether it takes the rate of the latent function.
fn arrays<'a>(sae: &'a mut TrainSae, g: &'a Gradients) -> Vec<(&'a mut Vec<f64>, &'a Vec<f64>, bool)> {
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
    fn new(params: &Params) -> Self {
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
    fn step(&mut self, x: Rows<'_>, y: Rows<'_>, settings: &Settings<'_>) -> f64 {
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
    fn margin(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> f64 {
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
fn drift(got: &[f32], want: &[f64], from: &[f32]) -> f64 {
    assert!(got.len() == want.len() && got.len() == from.len() && !got.is_empty());
    let error: f64 = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum();
    let moved: f64 = from.iter().zip(want).map(|(&f, w)| (f64::from(f) - w).powi(2)).sum();
    assert!(moved > 0.0 && error.is_finite());
    (error / moved).sqrt()
}

#[test]
fn twenty_steps_of_every_variant_equal_the_dense_reference() {
    for case in cases() {
        let (objective, first) = (case.objective(N_ROWS), case.start());
        let settings = case.settings(&objective);
        let mut trainer = Trainer::new(first.clone(), case.momentum > 0.0);
        let mut textbook = Textbook::new(&first);
        let mut noise = Noise(17);
        let (mut worst_loss, mut active, mut idle) = (0.0f64, 0usize, vec![true; N_LATENTS]);
        for _ in 0..20 {
            let (x, y) = loop {
                let x = noise.vector(N_ROWS * D, 0.35);
                let y = if case.d_out == D { x.clone() } else { noise.vector(N_ROWS * case.d_out, 0.35) };
                let rows = (Rows::new(&x, D).unwrap(), Rows::new(&y, case.d_out).unwrap());
                if textbook.margin(rows.0, rows.1, &objective) > 1e-6 {
                    break (x, y);
                }
            };
            let (x, y) = (Rows::new(&x, D).unwrap(), Rows::new(&y, case.d_out).unwrap());
            let pass = textbook.sae.forward(x, y, &objective).unwrap();
            let forward = trainer.forward(x, y, &objective).unwrap();
            assert_eq!(forward.losses().l0, pass.losses.l0, "{}", case.name);
            for row in 0..N_ROWS {
                let want = &pass.f[row * N_LATENTS..(row + 1) * N_LATENTS];
                let want: Vec<u32> = (0..N_LATENTS as u32).filter(|&i| want[i as usize] > 0.0).collect();
                let got: Vec<u32> = forward.active(&trainer.params, row).map(|(latent, _)| latent).collect();
                assert_eq!(got, want, "{}: row {row}", case.name);
                active += got.len();
                got.iter().for_each(|&i| idle[i as usize] = false);
            }
            trainer.update(&forward, &settings).unwrap();
            let want = textbook.step(x, y, &settings);
            let off = (forward.losses().total() / want - 1.0).abs();
            worst_loss = worst_loss.max(off);
        }
        // The case must hold what it claims to test: busy latents, and idle ones wherever latents can be.
        let can_idle = !matches!(case.latents, Latents::TopK { .. } | Latents::BatchTopK { .. });
        assert!(active > 2000 && (idle.contains(&true) || !can_idle), "{}: {active} active", case.name);
        assert!(worst_loss < 2e-5, "{}: loss off by {worst_loss:e}", case.name);
        let (p, q, f) = (&trainer.params.tensors, &textbook.sae, &first.tensors);
        let mut drifts = vec![
            ("w_enc", drift(&p.w_enc, &q.w_enc, &f.w_enc)),
            ("w_dec", drift(&p.w_dec, &q.w_dec, &f.w_dec)),
            ("b_dec", drift(&p.b_dec, &q.b_dec, &f.b_dec)),
        ];
        if case.encoder_bias {
            drifts.push(("b_enc", drift(&p.b_enc, &q.b_enc, &f.b_enc)));
        } else {
            assert_eq!(p.b_enc, f.b_enc, "{}", case.name);
        }
        match &q.latents {
            Reference::JumpRelu { threshold, .. } => {
                drifts.push(("threshold", drift(&p.own[0], threshold, &f.own[0])));
            }
            Reference::Gated { r_mag, b_mag } => drifts.extend([
                ("r_mag", drift(&p.own[0], r_mag, &f.own[0])),
                ("b_mag", drift(&p.own[1], b_mag, &f.own[1])),
            ]),
            _ => {}
        }
        drifts.extend(q.w_skip.as_ref().map(|skip| ("w_skip", drift(&p.w_skip, skip, &f.w_skip))));
        println!("{}: worst loss error {worst_loss:.1e}, drifts {drifts:?}", case.name);
        for (name, drift) in drifts {
            assert!(drift < 3e-4, "{}: {name} drifted by {drift:e}", case.name);
        }
        if case.objective.sparsity.unit_directions() {
            let norms = p.w_dec.chunks_exact(case.d_out).map(|d| d.iter().map(|v| v * v).sum::<f32>().sqrt());
            assert!(norms.into_iter().all(|n| (n - 1.0).abs() < 1e-6));
        }
    }
}

/// The same bits for any number of threads.
#[test]
fn threads_do_not_change_a_bit() {
    for case in cases().iter().filter(|case| case.d_out == D) {
        let run = |n_threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| {
                let mut trainer = Trainer::new(case.start(), case.momentum > 0.0);
                let (mut noise, objective) = (Noise(19), case.objective(700));
                for _ in 0..3 {
                    let x = noise.vector(700 * D, 0.35);
                    let x = Rows::new(&x, D).unwrap();
                    let forward = trainer.forward(x, x, &objective).unwrap();
                    trainer.update(&forward, &case.settings(&objective)).unwrap();
                }
                trainer
            })
        };
        let one = run(1);
        assert_ne!(one.params.tensors.w_enc, case.start().tensors.w_enc, "{}", case.name);
        assert!(one == run(2) && one == run(3), "{}", case.name);
    }
}

/// The same bits with the encoder product through bf16.
#[test]
fn bf16_does_not_change_a_bit() {
    for case in cases() {
        let run = |precision: EncoderPrecision| {
            let mut trainer = Trainer::new(case.start(), case.momentum > 0.0);
            trainer.set_precision(precision);
            let (mut noise, mut again, objective) = (Noise(29), 0, case.objective(300));
            for _ in 0..5 {
                let x = noise.vector(300 * D, 0.35);
                let y = noise.vector(300 * case.d_out, 0.35);
                let (x, y) = (Rows::new(&x, D).unwrap(), Rows::new(&y, case.d_out).unwrap());
                let forward = trainer.forward(x, y, &objective).unwrap();
                again += forward.effort().again;
                trainer.update(&forward, &case.settings(&objective)).unwrap();
            }
            trainer.set_precision(EncoderPrecision::F32);
            (trainer, again)
        };
        let ((plain, none), (sieved, some)) = (run(EncoderPrecision::F32), run(EncoderPrecision::Bf16));
        assert!(plain == sieved, "{}", case.name);
        assert!(none == 0 && (some > 0 || !native::train::has_bf16()), "{}: {some} again", case.name);
    }
}

/// A released autoencoder is active where training was and reconstructs what training did, a skip connection included.
#[test]
fn released_weights_compute_what_training_did() {
    use native::cpu::CpuBackend;
    use shared::fold::Scales;
    assert!(cases().iter().any(|case| case.skip));
    for case in cases().iter().filter(|case| {
        // The weights of several layers are released with what each needs beside them.
        !matches!(case.latents, Latents::BatchTopK { .. }) && case.n_layers == 1
    }) {
        let params = case.start();
        let x = Noise(23).vector(N_ROWS * D, 0.35);
        let y = vec![0.0; N_ROWS * case.d_out];
        let rows = (Rows::new(&x, D).unwrap(), Rows::new(&y, case.d_out).unwrap());
        let forward = Trainer::new(params.clone(), false)
            .forward(rows.0, rows.1, &Objective::plain(Sparsity::None))
            .unwrap();
        let sae = CpuBackend::new(params.release(Scales { input: 8.0, output: 2.0 * 8.0 }).unwrap());
        let raw: Vec<f32> = x.iter().map(|v| v * 8.0).collect();
        let raw = Rows::new(&raw, D).unwrap();
        let codes = sae.encode(raw).unwrap();
        let decoded = sae.decode(raw, &codes).unwrap();
        assert_eq!(sae.sae().w_skip().is_some(), case.skip, "{}", case.name);
        for (row, (latents, values)) in codes.iter().enumerate() {
            let (want, f): (Vec<u32>, Vec<f32>) = forward.active(&params, row).unzip();
            assert_eq!(latents, want, "{}: row {row}", case.name);
            assert!(values.iter().zip(&f).all(|(v, f)| (v / 8.0 - f).abs() < 1e-5), "{}", case.name);
            // Against nothing, so that the residual is the reconstruction.
            let found = &decoded[row * case.d_out..(row + 1) * case.d_out];
            let mut pairs = found.iter().zip(forward.residual(row));
            assert!(pairs.all(|(v, r)| (v / 16.0 - r).abs() < 1e-4), "{}: row {row}", case.name);
        }
    }
}
