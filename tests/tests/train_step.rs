//! The sparse f32 training step against the dense f64 reference with textbook Adam.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use native::train::{Params, Settings, Trainer};
use shared::Rows;
use shared::jumprelu::in_window;
use shared::loss::{Gradients, Parametrisation, Sparsity, TrainSae, normalise, remove_parallel};

const D: usize = 12;
const N_LATENTS: usize = 300;
const N_ROWS: usize = 45;
const BETA2: f64 = 0.999;

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

fn start(parametrisation: Parametrisation, pre_bias: bool) -> Params {
    let mut noise = Noise(11);
    let mut w_dec = noise.vector(N_LATENTS * D, 1.0);
    for row in w_dec.chunks_exact_mut(D) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    }
    // Every fourth latent is out of reach of most batches.
    let theta = |(i, v): (usize, f32)| {
        let base = if i % 4 == 0 { 0.9 } else { 0.5 };
        parametrisation.parameter(f64::from(base + 0.02 * v)) as f32
    };
    Params {
        d_in: D,
        w_enc: w_dec.clone(),
        b_enc: noise.vector(N_LATENTS, 0.02),
        w_dec,
        b_dec: noise.vector(D, 0.05),
        threshold: noise.vector(N_LATENTS, 1.0).into_iter().enumerate().map(theta).collect(),
        parametrisation,
        pre_bias,
    }
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

/// The dense f64 optimiser: every value, every step.
struct Textbook {
    sae: TrainSae,
    moments: Gradients,
    step: i32,
}

impl Textbook {
    fn new(p: &Params) -> Self {
        let sae = TrainSae {
            d_in: D,
            w_enc: wide(&p.w_enc),
            b_enc: wide(&p.b_enc),
            w_dec: wide(&p.w_dec),
            b_dec: wide(&p.b_dec),
            threshold: wide(&p.threshold),
            parametrisation: p.parametrisation,
            pre_bias: p.pre_bias,
        };
        let zeros = |v: &Vec<f64>| vec![0.0; v.len()];
        let moments = Gradients {
            w_enc: zeros(&sae.w_enc),
            b_enc: zeros(&sae.b_enc),
            w_dec: zeros(&sae.w_dec),
            b_dec: zeros(&sae.b_dec),
            threshold: zeros(&sae.threshold),
        };
        Self { sae, moments, step: 0 }
    }

    /// Takes a step; returns the loss before it.
    fn step(&mut self, x: Rows<'_>, settings: &Settings) -> f64 {
        self.step += 1;
        let (losses, mut g) = self.sae.backward(x, &settings.sparsity, settings.bandwidth).unwrap();
        for (g, d) in g.w_dec.chunks_exact_mut(D).zip(self.sae.w_dec.chunks_exact(D)) {
            remove_parallel(g, d);
        }
        let correction = 1.0 - BETA2.powi(self.step);
        let adam = |p: &mut [f64], v: &mut [f64], g: &[f64], lr: f64| {
            for ((p, v), g) in p.iter_mut().zip(v).zip(g) {
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                *p -= lr * g / ((*v / correction).sqrt() + 1e-8);
            }
        };
        let (sae, v, lr) = (&mut self.sae, &mut self.moments, settings.lr);
        adam(&mut sae.w_enc, &mut v.w_enc, &g.w_enc, lr);
        adam(&mut sae.b_enc, &mut v.b_enc, &g.b_enc, lr);
        adam(&mut sae.w_dec, &mut v.w_dec, &g.w_dec, lr);
        adam(&mut sae.b_dec, &mut v.b_dec, &g.b_dec, lr);
        adam(&mut sae.threshold, &mut v.threshold, &g.threshold, settings.threshold_lr);
        sae.w_dec.chunks_exact_mut(D).for_each(normalise);
        losses.total()
    }

    /// The smallest distance of a pre-activation from a threshold or the edge of a window: where it is
    /// tiny, f32 may rightly decide otherwise, and the comparison would mean nothing.
    fn margin(&self, x: Rows<'_>, settings: &Settings) -> f64 {
        let pass = self.sae.forward(x, &settings.sparsity).unwrap();
        let edge = settings.bandwidth / 2.0;
        let distances = pass.z.iter().enumerate().map(|(k, z)| (z - self.sae.theta(k % N_LATENTS)).abs());
        distances.map(|d| d.min((d - edge).abs())).fold(f64::INFINITY, f64::min)
    }
}

/// ‖got − want‖ over how far `want` moved from `from`.
fn drift(got: &[f32], want: &[f64], from: &[f32]) -> f64 {
    assert!(got.len() == want.len() && !got.is_empty());
    let error: f64 = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum();
    let moved: f64 = from.iter().zip(want).map(|(&f, w)| (f64::from(f) - w).powi(2)).sum();
    assert!(moved > 0.0 && error.is_finite());
    (error / moved).sqrt()
}

#[test]
fn twenty_steps_equal_the_dense_reference() {
    for (parametrisation, pre_bias, sparsity) in [
        (Parametrisation::Log, true, Sparsity::Target { lambda: 0.5, target: 4.0 }),
        (Parametrisation::Raw, false, Sparsity::Fixed { lambda: 0.01 }),
    ] {
        let settings = Settings { lr: 1e-3, threshold_lr: 3e-3, bandwidth: 0.1, sparsity };
        let first = start(parametrisation, pre_bias);
        let mut trainer = Trainer::new(first.clone());
        let mut textbook = Textbook::new(&first);
        let mut noise = Noise(17);
        let (mut worst_loss, mut ever_active, mut window_inactive) = (0.0f64, vec![0usize; N_LATENTS], 0);
        for _ in 0..20 {
            let x = loop {
                let x = noise.vector(N_ROWS * D, 0.35);
                if textbook.margin(Rows::new(&x, D).unwrap(), &settings) > 1e-6 {
                    break x;
                }
            };
            let x = Rows::new(&x, D).unwrap();
            let pass = textbook.sae.forward(x, &sparsity).unwrap();
            for (k, z) in pass.z.iter().enumerate() {
                let theta = textbook.sae.theta(k % N_LATENTS);
                ever_active[k % N_LATENTS] += usize::from(*z > theta);
                window_inactive += usize::from(*z <= theta && in_window(*z, theta, settings.bandwidth));
            }
            let forward = trainer.forward(x, &settings).unwrap();
            assert_eq!(forward.losses().l0, pass.losses.l0);
            let fired: Vec<u32> = (0..N_LATENTS as u32)
                .filter(|&i| (0..N_ROWS).any(|n| pass.f[n * N_LATENTS + i as usize] != 0.0))
                .collect();
            assert_eq!(forward.fired().collect::<Vec<_>>(), fired);
            trainer.update(&forward, &settings);
            let want = textbook.step(x, &settings);
            worst_loss = worst_loss.max((forward.losses().total() / want - 1.0).abs());
        }
        // The case must hold what it claims to test: idle latents, busy ones, and two-sided windows.
        assert!(ever_active.iter().filter(|&&n| n < 20).count() > 20, "too few idle latents");
        assert!(ever_active.iter().sum::<usize>() > 2000 && window_inactive > 500);
        let (p, q) = (&trainer.params, &textbook.sae);
        let drifts = [
            ("w_enc", drift(&p.w_enc, &q.w_enc, &first.w_enc)),
            ("b_enc", drift(&p.b_enc, &q.b_enc, &first.b_enc)),
            ("w_dec", drift(&p.w_dec, &q.w_dec, &first.w_dec)),
            ("b_dec", drift(&p.b_dec, &q.b_dec, &first.b_dec)),
            ("threshold", drift(&p.threshold, &q.threshold, &first.threshold)),
        ];
        println!("worst loss error {worst_loss:.1e}, drifts {drifts:?}");
        assert!(worst_loss < 1e-5, "loss off by {worst_loss:e}");
        for (name, drift) in drifts {
            assert!(drift < 1e-4, "{name} drifted by {drift:e}");
        }
        let norms = p.w_dec.chunks_exact(D).map(|d| d.iter().map(|v| v * v).sum::<f32>().sqrt());
        assert!(norms.into_iter().all(|n| (n - 1.0).abs() < 1e-6));
    }
}

/// The same bits for any number of threads.
#[test]
fn threads_do_not_change_a_bit() {
    let run = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| {
            let sparsity = Sparsity::Target { lambda: 0.5, target: 4.0 };
            let settings = Settings { lr: 1e-3, threshold_lr: 3e-3, bandwidth: 0.1, sparsity };
            let mut trainer = Trainer::new(start(Parametrisation::Log, true));
            let mut noise = Noise(19);
            for _ in 0..5 {
                let x = noise.vector(700 * D, 0.35);
                let forward = trainer.forward(Rows::new(&x, D).unwrap(), &settings).unwrap();
                trainer.update(&forward, &settings);
            }
            trainer
        })
    };
    let one = run(1);
    assert_ne!(one.params.w_enc, start(Parametrisation::Log, true).w_enc);
    assert!(one == run(2) && one == run(3));
}
