//! The WebGPU backend on a native adapter (software Vulkan where there is no card), under WebGPU's default limits.
//!
//! A machine without any Vulkan driver fails these tests rather than skipping them: set-up installs one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::sync::Arc;

use conformance::suite;
use shared::{Activation, Codes, Dims, Forward, RowScaling, Rows, Sae, SaeParts, reference};
use web::gpu::{Blocks, Gpu, GpuBackend, GpuError};

fn gpu() -> Gpu {
    pollster::block_on(Gpu::request()).expect("a Vulkan driver (mesa-vulkan-drivers on Debian)")
}

fn backend(sae: &Sae, cut: Blocks) -> GpuBackend {
    pollster::block_on(GpuBackend::new(gpu(), Arc::new(sae.clone()), cut)).unwrap()
}

/// Cuts small enough that every loop over blocks, chunks and growing lists goes round several times.
const TINY: Blocks = Blocks { bytes: 4096, rows: 7, hits_per_row: 1 };

/// Numbers in -1..1 that are the same on every machine.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn dictionary(dims: Dims, activation: Activation) -> Sae {
    let Dims { d_in, d_out, n_latents } = dims;
    Sae::new(SaeParts {
        d_in,
        d_out,
        w_enc: noise(n_latents * d_in, 1),
        b_enc: noise(n_latents, 2),
        w_dec: noise(n_latents * d_out, 3),
        b_dec: noise(d_out, 4),
        activation,
        w_skip: None,
        rows: RowScaling::None,
    })
    .unwrap()
}

fn assert_same(sae: &Sae, x: Rows<'_>, found: &Codes) {
    let wanted = reference::encode(sae, x).unwrap();
    assert!(wanted.n_active() > 0, "a case without active latents proves nothing");
    assert_eq!(found.n_rows(), wanted.n_rows());
    for (i, (found, wanted)) in found.iter().zip(wanted.iter()).enumerate() {
        assert_eq!(found.0, wanted.0, "active set of row {i}");
        for (f, w) in found.1.iter().zip(wanted.1) {
            assert!((f - w).abs() <= 1e-5 * w.abs().max(1.0), "row {i}: {f} against {w}");
        }
    }
}

fn check(sae: &Sae, n_rows: usize, cut: Blocks) {
    let data = noise(n_rows * sae.dims().d_in, 9);
    let x = Rows::new(&data, sae.dims().d_in).unwrap();
    let backend = backend(sae, cut);
    let codes = pollster::block_on(backend.encode(x)).unwrap();
    assert_same(sae, x, &codes);
    let wanted = reference::decode(sae, x, &codes).unwrap();
    let found = pollster::block_on(backend.decode(x, &codes)).unwrap();
    assert_eq!(found.len(), wanted.len());
    let scale = wanted.iter().fold(1.0f32, |m, w| m.max(w.abs()));
    for (f, w) in found.iter().zip(&wanted) {
        assert!((f - w).abs() <= 1e-5 * scale, "{f} against {w}");
    }
}

#[test]
fn conformance_suite() {
    let gpu = gpu();
    for cut in [Blocks::default(), TINY] {
        let make = async |sae| GpuBackend::new(gpu.clone(), Arc::new(sae), cut).await;
        let report = pollster::block_on(suite::run(make));
        assert!(report.passed(), "{cut:?}: {report}");
    }
}

/// The encoder of Gemma Scope's smallest width is 144 MiB; a default device binds 128.
#[test]
fn an_encoder_above_the_binding_limit_is_cut_to_fit() {
    assert_eq!(gpu().binding_limit(), 128 << 20);
    let dims = Dims { d_in: 2304, d_out: 1, n_latents: 16_384 };
    let sae = dictionary(dims, Activation::JumpRelu { threshold: vec![50.0; dims.n_latents] });
    check(&sae, 2, Blocks { bytes: u64::MAX, ..Blocks::default() });
    check(&sae, 2, Blocks::default());
}

fn thresholds(n: usize) -> Activation {
    Activation::JumpRelu { threshold: noise(n, 5).iter().map(|t| 1.5 * t.abs()).collect() }
}

#[test]
fn jumprelu_whole_and_in_blocks() {
    let dims = Dims { d_in: 45, d_out: 33, n_latents: 301 };
    let sae = dictionary(dims, thresholds(dims.n_latents));
    check(&sae, 70, Blocks::default());
    check(&sae, 70, TINY);
    assert!(backend(&sae, TINY).n_blocks() > 3);
    check(&sae, 1, Blocks::default());
}

#[test]
fn relu_and_top_k() {
    let dims = Dims { d_in: 20, d_out: 24, n_latents: 130 };
    for cut in [Blocks::default(), TINY] {
        check(&dictionary(dims, Activation::Relu), 67, cut);
        check(&dictionary(dims, Activation::TopK { k: 5 }), 67, cut);
    }
}

/// Every pre-activation lies on or within an ulp of its threshold: the device alone could not tell.
#[test]
fn pre_activations_on_the_threshold_are_settled_as_the_reference_does() {
    let dims = Dims { d_in: 31, d_out: 4, n_latents: 200 };
    let mut parts = dictionary(dims, Activation::Relu).into_parts();
    let data = noise(3 * dims.d_in, 9);
    let x = Rows::new(&data, dims.d_in).unwrap();
    parts.b_enc = vec![4.0; dims.n_latents];
    let relu = Sae::new(parts.clone()).unwrap();
    let threshold = (0..dims.n_latents)
        .map(|i| {
            let z = reference::pre_activation(&relu, x.row(1), i) as f32;
            [z.next_down(), z, z.next_up()][i % 3].max(0.0)
        })
        .collect();
    parts.activation = Activation::JumpRelu { threshold };
    let sae = Sae::new(parts).unwrap();
    let codes = pollster::block_on(backend(&sae, Blocks::default()).encode(x)).unwrap();
    assert_same(&sae, x, &codes);
    let (active, _) = codes.row(1);
    assert!(active.len() > 50 && active.len() < 150, "{} active: the case must cut both ways", active.len());
}

#[test]
fn empty_wrong_and_not_finite_input() {
    let dims = Dims { d_in: 6, d_out: 6, n_latents: 8 };
    let backend = backend(&dictionary(dims, Activation::Relu), Blocks::default());
    let nothing = Rows::new(&[], 6).unwrap();
    let none = pollster::block_on(backend.encode(nothing)).unwrap();
    assert_eq!((none.n_rows(), none.n_active()), (0, 0));
    assert_eq!(pollster::block_on(backend.decode(nothing, &none)).unwrap(), [0.0f32; 0]);
    let narrow = [0.0; 5];
    let result = pollster::block_on(backend.encode(Rows::new(&narrow, 5).unwrap()));
    assert!(matches!(result, Err(GpuError::Shape(_))));
    let nan = [0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0];
    let result = pollster::block_on(backend.encode(Rows::new(&nan, 6).unwrap()));
    assert!(matches!(result, Err(GpuError::Shape(_))));
}

#[test]
fn a_lost_device_is_an_error() {
    let dims = Dims { d_in: 6, d_out: 6, n_latents: 8 };
    let backend = backend(&dictionary(dims, Activation::Relu), Blocks::default());
    backend.gpu().destroy();
    let x = [1.0; 6];
    let result = pollster::block_on(backend.encode(Rows::new(&x, 6).unwrap()));
    assert!(matches!(result, Err(GpuError::Lost(_) | GpuError::Refused(_))), "{result:?}");
}
