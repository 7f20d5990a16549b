//! The sparse f32 training step against the dense f64 reference with textbook Adam, for every variant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use native::selftest::cases::{D, N_LATENTS, N_ROWS, Noise, cases};
use native::selftest::textbook::{Textbook, drift};
use native::train::{Latents, Trainer};
use shared::Rows;
use shared::config::train::EncoderPrecision;
use shared::loss::{Latents as Reference, Objective, Sparsity};

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
                if textbook.margin(rows.0, rows.1, &objective).unwrap() > 1e-6 {
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
            let want = textbook.step(x, y, &settings).unwrap();
            let off = (forward.losses().total() / want - 1.0).abs();
            worst_loss = worst_loss.max(off);
        }
        // The case must hold what it claims to test: busy latents, and idle ones wherever latents can be.
        let can_idle = !matches!(case.latents, Latents::TopK { .. } | Latents::BatchTopK { .. });
        assert!(active > 2000 && (idle.contains(&true) || !can_idle), "{}: {active} active", case.name);
        assert!(worst_loss < 2e-5, "{}: loss off by {worst_loss:e}", case.name);
        let (p, q, f) = (&trainer.params.tensors, &textbook.sae, &first.tensors);
        let mut drifts = vec![
            ("w_enc", drift(&p.w_enc, &q.w_enc, &f.w_enc).unwrap()),
            ("w_dec", drift(&p.w_dec, &q.w_dec, &f.w_dec).unwrap()),
            ("b_dec", drift(&p.b_dec, &q.b_dec, &f.b_dec).unwrap()),
        ];
        if case.encoder_bias {
            drifts.push(("b_enc", drift(&p.b_enc, &q.b_enc, &f.b_enc).unwrap()));
        } else {
            assert_eq!(p.b_enc, f.b_enc, "{}", case.name);
        }
        match &q.latents {
            Reference::JumpRelu { threshold, .. } => {
                drifts.push(("threshold", drift(&p.own[0], threshold, &f.own[0]).unwrap()));
            }
            Reference::Gated { r_mag, b_mag } => drifts.extend([
                ("r_mag", drift(&p.own[0], r_mag, &f.own[0]).unwrap()),
                ("b_mag", drift(&p.own[1], b_mag, &f.own[1]).unwrap()),
            ]),
            _ => {}
        }
        drifts.extend(q.w_skip.as_ref().map(|skip| ("w_skip", drift(&p.w_skip, skip, &f.w_skip).unwrap())));
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
