//! Training on a device, with the CUDA kernels run on the processor: the same judge as for the processor's own step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod compile;
mod emulator;
#[path = "../support/steps.rs"]
mod steps;

use std::sync::Arc;

use emulator::Emulator;
use native::cuda::{CudaTrainer, Device, ProductPrecision, Shape, Step};
use native::train::Moments;
use shared::Rows;
use shared::loss::Latents as Reference;
use steps::{D, N_LATENTS, N_ROWS, Noise, Textbook, cases, drift};

#[test]
fn kernels_and_host_agree_on_what_a_step_is() {
    let folder = tempfile::tempdir().unwrap();
    let size = Emulator::new(folder.path()).size_of_step(Shape::new(D, D)).unwrap();
    assert_eq!(size, size_of::<Step>());
}

#[test]
fn twenty_steps_of_every_variant_equal_the_dense_reference() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = Arc::new(Emulator::new(folder.path()));
    for case in cases() {
        let (objective, first) = (case.objective(N_ROWS), case.start());
        let settings = case.settings(&objective);
        let moments = Moments::new(&first, case.momentum > 0.0);
        let device: Arc<dyn Device + Send + Sync> = emulator.clone();
        let mut trainer = CudaTrainer::new(device, &first, &moments, 0, ProductPrecision::F32).unwrap();
        let mut textbook = Textbook::new(&first);
        let mut noise = Noise(17);
        let (mut worst_loss, mut active) = (0.0f64, 0usize);
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
            assert_eq!(forward.losses.l0, pass.losses.l0, "{}", case.name);
            let fired: Vec<u32> = (0..N_LATENTS)
                .filter(|&i| pass.f.iter().skip(i).step_by(N_LATENTS).any(|f| *f > 0.0))
                .map(|i| i as u32)
                .collect();
            assert_eq!(forward.fired, fired, "{}", case.name);
            active += forward.n_active;
            trainer.update(&forward, &settings).unwrap();
            let want = textbook.step(x, y, &settings);
            worst_loss = worst_loss.max((forward.losses.total() / want - 1.0).abs());
        }
        assert!(active > 2000, "{}: {active} active", case.name);
        assert!(worst_loss < 2e-5, "{}: loss off by {worst_loss:e}", case.name);
        let (params, _) = trainer.download().unwrap();
        let (p, q, f) = (&params.tensors, &textbook.sae, &first.tensors);
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
    }
    assert_eq!(emulator.in_use(), 0, "memory was not given back");
}
