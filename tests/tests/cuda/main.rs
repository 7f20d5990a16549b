//! Training on a device, with the CUDA kernels run on the processor: the same judge as for the processor's own step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod compile;
mod emulator;
mod feed;
mod runs;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;

use emulator::Emulator;
use native::bench::{CudaBench, CudaStep};
use native::cuda::{CudaTrainer, Device, Resident, Shape, Step};
use native::selftest::cases::{Case, D, N_LATENTS, N_ROWS, Noise, cases};
use native::selftest::impostor::MISTAKES;
use native::selftest::{OnDevice, OnProcessor, judge};
use native::train::{Moments, Trainer};
use shared::Rows;
use shared::config::train::Products;

type Shared = Arc<dyn Device + Send + Sync>;

fn learner(device: Shared, case: &Case) -> OnDevice {
    let first = case.start();
    let moments = Moments::new(&first, case.momentum > 0.0);
    OnDevice(CudaTrainer::new(device, &first, &moments, 0, Products::F32).unwrap(), None)
}

#[test]
fn kernels_and_host_agree_on_what_a_step_is() {
    let folder = tempfile::tempdir().unwrap();
    let size = Emulator::new(folder.path()).size_of_step(Shape::new(D, D)).unwrap();
    assert_eq!(size, size_of::<Step>());
}

#[test]
fn every_variant_equals_the_dense_reference_and_no_impostor_does() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = Arc::new(Emulator::new(folder.path()));
    let cases = cases();
    for case in &cases {
        let verdict = judge(case, &mut learner(emulator.clone(), case), 5).unwrap();
        println!("{verdict:?}");
    }
    for mistake in MISTAKES {
        let case = cases.iter().find(|case| case.name == mistake.case).unwrap();
        let impostor = Arc::new(mistake.made_by(emulator.clone()));
        let found = judge(case, &mut learner(impostor, case), 5);
        assert!(found.is_err(), "{} was not found out: {found:?}", mistake.name);
    }
    assert_eq!(emulator.in_use(), 0, "memory was not given back");
}

#[test]
fn the_processors_step_passes_the_same_judge() {
    for case in cases() {
        let trainer = Trainer::new(case.start(), case.momentum > 0.0);
        judge(&case, &mut OnProcessor(trainer, None), 20).unwrap();
    }
}

/// Batches of other sizes, more kept than there was room for, and the way to the host and back.
#[test]
fn a_device_goes_on_where_it_was_with_any_batch() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: Shared = Arc::new(Emulator::new(folder.path()));
    let cases = cases();
    // Nothing is sparse about a ReLU without a penalty: all 300 latents may be active, and there is room for 256 at first.
    let mut case = cases.iter().find(|case| case.name == "relu").unwrap().clone();
    case.objective.sparsity = shared::loss::Sparsity::None;
    let mut first = case.start();
    first.tensors.b_enc.fill(5.0);
    let moments = Moments::new(&first, false);
    let f32 = Products::F32;
    let mut whole = CudaTrainer::new(emulator.clone(), &first, &moments, 0, f32).unwrap();
    let mut parted = CudaTrainer::new(emulator.clone(), &first, &moments, 0, f32).unwrap();
    let objective = case.objective(N_ROWS);
    let settings = case.settings(&objective);
    let mut noise = Noise(3);
    for rows in [3, N_ROWS, 20] {
        let x = noise.vector(rows * D, 0.35);
        let x = Rows::new(&x, D).unwrap();
        let batch = Resident::of(&emulator, x, x).unwrap();
        let forward = whole.forward(&batch, &objective).unwrap();
        assert!(forward.n_active > rows * (N_LATENTS - 20), "{} of {rows} rows", forward.n_active);
        whole.update(&forward, &settings).unwrap();
        assert!(whole.update(&forward, &settings).is_err(), "the same pass cannot be learned from twice");
        let forward = parted.forward(&batch, &objective).unwrap();
        parted.update(&forward, &settings).unwrap();
        let (params, moments) = parted.download().unwrap();
        parted = CudaTrainer::new(emulator.clone(), &params, &moments, parted.step, f32).unwrap();
    }
    assert!(whole.download().unwrap() == parted.download().unwrap(), "not the same bits");
    let wrong = vec![0.0; 2 * (D + 1)];
    let wrong = Rows::new(&wrong, D + 1).unwrap();
    assert!(whole.forward(&Resident::of(&emulator, wrong, wrong).unwrap(), &objective).is_err());
}

/// Products of split factors: sixteen bits are nearly all, eight are not.
#[test]
fn split_factors_cost_what_their_bits_say() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: Shared = Arc::new(Emulator::new(folder.path()));
    let cases = cases();
    let case = cases.iter().find(|case| case.name == "relu").unwrap();
    let (first, objective) = (case.start(), case.objective(N_ROWS));
    let moments = Moments::new(&first, false);
    let x = Noise(23).vector(N_ROWS * D, 0.35);
    let x = Rows::new(&x, D).unwrap();
    let mse = |products| {
        let mut trainer = CudaTrainer::new(emulator.clone(), &first, &moments, 0, products).unwrap();
        let batch = Resident::of(&emulator, x, x).unwrap();
        trainer.forward(&batch, &objective).unwrap().losses.mse
    };
    let exact = mse(Products::F32);
    let off = |products| (mse(products) / exact - 1.0f64).abs();
    let (eight, sixteen) = (off(Products::Bf16), off(Products::Bf16x3));
    assert!(eight < 0.02 && eight > 1e-5, "{eight:e}");
    assert!(sixteen < 1e-4 && sixteen < eight / 20.0, "{sixteen:e} against {eight:e}");
}

/// The bench of a card, at a size that the processor can run: what it prints has the shape of the table.
#[test]
fn the_bench_times_every_width() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: Shared = Arc::new(Emulator::new(folder.path()));
    let bench = CudaBench::new(emulator, Products::F32);
    let peaks = bench.peaks(4, 3, 1000).unwrap();
    assert!(peaks.bandwidth > 0.0 && peaks.flops > 0.0);
    let step = bench.step(&peaks, 32, 512, 16, 8, 1).unwrap();
    assert!((4.0..16.0).contains(&step.l0) && step.seconds > step.forward_seconds, "{step:?}");
    assert_eq!(step.to_string().len(), CudaStep::HEAD.len(), "{step}");
    assert!(bench.step(&peaks, 32, 8, 16, 8, 1).is_err());
}
