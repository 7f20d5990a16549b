//! Training on a device, with the CUDA kernels run on the processor: the same judge as for the processor's own step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod compile;
mod emulator;
mod feed;
mod runs;
#[path = "../support/mod.rs"]
mod support;
mod traffic;

use std::sync::Arc;

use emulator::Emulator;
use native::bench::{CudaBench, CudaRoutes, CudaStep};
use native::cuda::trainer::has_dense_route;
use native::cuda::{
    CudaOptions, CudaTrainer, Device, Intercept, Kernel, Rates, Resident, Shape, Step, geometry,
};
use native::selftest::cases::{D, N_LATENTS, N_ROWS, Noise, cases};
use native::selftest::impostor::{ENCODING, MISTAKES};
use native::selftest::table::{DENSE, Table, conforms};
use native::selftest::{Learner, OnDevice, OnProcessor, judge, table};
use native::train::{Betas, Latents, Moments, Params, Settings, Tensors, Trainer};
use shared::Rows;
use shared::config::train::{Products, Route};
use shared::loss::{Objective, Sparsity};

type Shared = Arc<dyn Device + Send + Sync>;

#[test]
fn kernels_and_host_agree_on_what_a_step_is() {
    let folder = tempfile::tempdir().unwrap();
    let size = Emulator::new(folder.path()).size_of_step(Shape::new(D, D)).unwrap();
    assert_eq!(size, size_of::<Step>());
}

/// The table of `selftest` on a device: every variant, the conformance suite, and impostors of both.
#[test]
fn the_table_of_a_selftest_has_everything_and_nothing_failed() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = Arc::new(Emulator::new(folder.path()));
    let mut out = Vec::new();
    let failures = table::on_device(&mut out, &(emulator.clone() as Shared), 5).unwrap();
    let text = String::from_utf8(out).unwrap();
    println!("{text}");
    assert_eq!(failures, 0, "{text}");
    let ok = |name: &str| {
        let found = text.lines().find(|line| line.starts_with(name));
        let line = found.unwrap_or_else(|| panic!("no line of {name}: {text}"));
        assert!(line[66..].trim_start().starts_with("ok"), "{line}");
    };
    cases().iter().for_each(|case| ok(case.name));
    let dense: Vec<&str> = text.lines().filter(|line| line.contains(DENSE)).collect();
    let served = [
        "jumprelu",
        "raw jumprelu",
        "jumprelu with momentum",
        "jumprelu, dead-latent loss",
        "relu",
        "relu by decoder norm",
        "p-annealed",
        "topk",
        "jumprelu, thresholds of layers",
        "raw thresholds of layers, momentum, dead-latent loss",
        "transcoder",
        "skip transcoder",
    ];
    served.iter().for_each(|name| ok(&format!("{name}{DENSE} ")));
    assert!(dense.iter().filter(|line| line.starts_with("impostor")).count() >= 7, "{text}");
    MISTAKES.iter().chain(&ENCODING).for_each(|mistake| ok(&format!("impostor: {}", mistake.name)));
    ["feeding", "encode", "encode a single row", "decode", "nothing and wrong widths"]
        .into_iter()
        .for_each(ok);
    assert_eq!(emulator.in_use(), 0, "memory was not given back");
}

/// A device that does nothing right fails line by line, and is counted.
#[test]
fn the_table_of_a_broken_device_counts_what_failed() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: Shared = Arc::new(Emulator::new(folder.path()));
    let broken = Intercept::new(emulator, "broken", |_, step| {
        (step.lr, step.own_lr) = (2.0 * step.lr, 2.0 * step.own_lr);
        (step.norms, step.largest) = (0, step.largest.min(2));
    });
    let broken: Shared = Arc::new(broken);
    let mut out = Vec::new();
    let mut table = Table::new(&mut out, "broken").unwrap();
    table.training(&broken, 2).unwrap();
    table.report(&conforms(&broken)).unwrap();
    let failures = table.failures;
    let text = String::from_utf8(out).unwrap();
    let failed: Vec<&str> = text.lines().filter(|line| line.contains("FAILED")).collect();
    assert_eq!(failed.len(), failures);
    for case in cases() {
        assert!(failed.iter().any(|line| line.starts_with(case.name)), "{} passed", case.name);
    }
    assert!(failed.iter().any(|line| line.contains("top-k") && line.contains("encode")), "{text}");
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
    let memory = Arc::new(Emulator::new(folder.path()));
    let emulator: Shared = memory.clone();
    let cases = cases();
    // Nothing is sparse about a ReLU without a penalty: all 300 latents may be active, and there is room for 256 at first.
    let mut case = cases.iter().find(|case| case.name == "relu").unwrap().clone();
    case.objective.sparsity = Sparsity::None;
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
        if rows == 3 {
            // In the same memory.
            let (step, in_use) = (parted.step, memory.in_use());
            parted.upload(&params, &moments, step).unwrap();
            assert_eq!(memory.in_use(), in_use);
            let other = Moments::new(&params, true);
            assert!(parted.upload(&params, &other, step).is_err(), "moments of another kind");
            continue;
        }
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

/// Where no batch before says what is worth keeping, that is counted: the same bits as of everything kept, in the memory that was
/// estimated.
#[test]
fn the_first_step_of_batch_topk_keeps_little_more_than_it_chooses() {
    const N: usize = 4096;
    const ROWS: usize = 24;
    let folder = tempfile::tempdir().unwrap();
    let (mut noise, k) = (Noise(31), 2);
    let mut tensors = Tensors::zeros(N, D, D, false);
    tensors.w_dec = noise.vector(N * D, 0.3);
    tensors.w_enc.clone_from(&tensors.w_dec);
    let latents = Latents::BatchTopK { k, threshold: 0.0 };
    let params = Params { d_in: D, d_out: D, tensors, latents, pre_bias: true, encoder_bias: true };
    let moments = Moments::new(&params, false);
    let objective = Objective::plain(Sparsity::None);
    let betas = Betas { first: 0.0, second: 0.999, eps: 1e-8 };
    let settings = Settings { lr: 1e-3, own_lr: 1e-3, betas, objective: &objective };
    let batches: Vec<Vec<f32>> = [0.4, 0.4, 0.02, 0.4].map(|scale| noise.vector(ROWS * D, scale)).to_vec();
    let run = |greedy: bool| {
        let emulator = Arc::new(Emulator::new(folder.path()));
        let keep_all = move |kernel, step: &mut Step| {
            if greedy && kernel == Kernel::Thresholds {
                step.cut = 0.0;
            }
        };
        let device: Shared = Arc::new(Intercept::new(emulator.clone(), "keeping", keep_all));
        let mut trainer = CudaTrainer::new(device.clone(), &params, &moments, 0, Products::F32).unwrap();
        let mut found = Vec::new();
        for x in &batches {
            let x = Rows::new(x, D).unwrap();
            let forward = trainer.forward(&Resident::of(&device, x, x).unwrap(), &objective).unwrap();
            assert_eq!(forward.n_active, k * ROWS);
            trainer.update(&forward, &settings).unwrap();
            found.push(forward);
        }
        (found, trainer.download().unwrap(), emulator.in_use())
    };
    let (wanted, lean) = (run(true), run(false));
    assert!(wanted.0 == lean.0 && wanted.1 == lean.1, "not the same bits");
    let estimate = geometry::bytes(N, [D, D], ROWS, 1, k as f64, false) as usize;
    assert!(lean.2 < estimate && wanted.2 > estimate, "{} and {} of {estimate} bytes", lean.2, wanted.2);
}

/// The order in which atomics fill lists changes nothing where sums have a fixed order, and next to nothing where they have not.
#[test]
fn sums_in_any_order_are_the_same_but_for_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let orders: [Shared; 2] =
        [Arc::new(Emulator::new(folder.path())), Arc::new(Emulator::backwards(folder.path()))];
    let cases = cases();
    for name in ["jumprelu", "topk, multi and auxk", "raw thresholds of layers, momentum, dead-latent loss"] {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let end = |device: &Shared, deterministic: bool| {
            let options = CudaOptions { products: Products::F32, deterministic, ..CudaOptions::default() };
            let first = case.start();
            let moments = Moments::new(&first, case.momentum > 0.0);
            let trainer = CudaTrainer::new(device.clone(), &first, &moments, 0, options).unwrap();
            let mut learner = OnDevice::new(trainer);
            judge(case, &mut learner, 4).unwrap();
            learner.params().unwrap()
        };
        assert!(end(&orders[0], true) == end(&orders[1], true), "{name}: the order shows");
        assert!(end(&orders[0], false) != end(&orders[1], false), "{name}: nothing was in another order");
    }
}

/// Latents that do not fit one product: both routes take them in stretches, and a route may change from step to step.
#[test]
fn latents_come_in_stretches_on_either_route() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: Shared = Arc::new(Emulator::new(folder.path()));
    for case in cases() {
        let dense = has_dense_route(&case.start(), &case.objective(N_ROWS));
        for dense_from in [f64::INFINITY, 0.0].into_iter().take(1 + usize::from(dense)) {
            let options = CudaOptions { dense_from, bytes_at_once: 1, ..Products::F32.into() };
            let first = case.start();
            let moments = Moments::new(&first, case.momentum > 0.0);
            let trainer = CudaTrainer::new(emulator.clone(), &first, &moments, 0, options).unwrap();
            let mut learner = OnDevice::new(trainer);
            judge(&case, &mut learner, 3).unwrap();
            assert_eq!(learner.dense, dense_from < 1.0, "{}", case.name);
        }
    }
    let case = cases().into_iter().find(|case| case.name == "jumprelu").unwrap();
    let (first, objective) = (case.start(), case.objective(N_ROWS));
    let trainer = |dense_from: f64| {
        let options = CudaOptions { dense_from, ..Products::F32.into() };
        CudaTrainer::new(emulator.clone(), &first, &Moments::new(&first, false), 0, options).unwrap()
    };
    let run = |dense_from: f64| {
        let (mut trainer, mut noise) = (trainer(dense_from), Noise(17));
        let step = |_| {
            let x = noise.vector(N_ROWS * D, 0.35);
            let x = Rows::new(&x, D).unwrap();
            let forward = trainer.forward(&Resident::of(&emulator, x, x).unwrap(), &objective).unwrap();
            trainer.update(&forward, &case.settings(&objective)).unwrap();
            (forward.n_kept, forward.fired, forward.dense)
        };
        (0..6).map(step).collect::<Vec<_>>()
    };
    let sparse = run(f64::INFINITY);
    let mut kept: Vec<usize> = sparse.iter().map(|step| step.0).collect();
    kept.sort_unstable();
    let between = kept[3] as f64 / N_ROWS as f64;
    for (sparse, mixed) in sparse.iter().zip(run(between)) {
        assert_eq!((sparse.0, &sparse.1), (mixed.0, &mixed.1));
        assert_eq!(mixed.2, mixed.0 >= kept[3], "{} kept, {} at the crossover", mixed.0, kept[3]);
    }
    assert!(kept[0] < kept[3], "all batches keep alike: {kept:?}");
    judge(&case, &mut OnDevice::new(trainer(between)), 6).unwrap();
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
    // Copies that cost nothing leave nothing to gain from products, and the other way round.
    for (rates, auto) in [
        (Rates { bandwidth: 1e12, flops: 1e9 }, Route::Sparse),
        (Rates { bandwidth: 1.0, flops: 1e12 }, Route::Dense),
    ] {
        let routes = bench.routes(&rates, [32, 128, 16, 100, 1]).unwrap();
        assert_eq!((routes.auto, routes.n_latents), (auto, 128), "{routes:?}");
        assert!(routes.sparse_seconds > 0.0 && routes.dense_seconds > 0.0, "{routes:?}");
        let line = routes.to_string();
        assert!(
            line.len() == CudaRoutes::HEAD.len()
                && line.ends_with(if auto == Route::Dense { "dense" } else { "sparse" }),
            "{line}"
        );
    }
    let rates = bench.rates(4, 128, 3).unwrap();
    assert!(rates.bandwidth > 0.0 && rates.flops > 0.0);
}
