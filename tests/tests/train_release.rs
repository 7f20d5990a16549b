//! What training leaves behind is what was trained: whatever the latent function, with and without a skip connection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::sync::Arc;

use anyhow::Result;
use native::sae_files;
use native::stop::StopFlag;
use native::train::{ActivationSource, SourceTap, Statistics, Vectors, run};
use serde_json::{Value, json};
use shared::config::resolve;
use shared::config::train::TrainConfig;
use shared::format::SaeMetadata;
use shared::metrics::Fvu;
use shared::{Activation, Rows, Sae, SaeParts, reference};

const ROWS: usize = 2048;
const D_IN: usize = 7;
const D_OUT: usize = 5;

/// Inputs and targets that are mostly a linear map of them, with a scale of their own, so that a skip connection learns.
struct Linear {
    taps: [SourceTap; 2],
    provenance: Value,
}

/// An irregular sequence in [-1, 1).
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// `ROWS` inputs and their targets.
fn vectors(seed: u64) -> [Vec<f32>; 2] {
    let (map, x) = (noise(7, D_OUT * D_IN), noise(seed, ROWS * D_IN));
    let spread = noise(seed + 1000, ROWS * D_OUT);
    let mut y = Vec::with_capacity(spread.len());
    for (x, spread) in x.chunks_exact(D_IN).zip(spread.chunks_exact(D_OUT)) {
        let row = |(weights, extra): (&[f32], &f32)| 4.0 * dot(weights, x) + 0.3 * extra + 1.0;
        y.extend(map.chunks_exact(D_IN).zip(spread).map(row));
    }
    [x, y]
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl ActivationSource for Linear {
    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }
    fn n_vectors(&self) -> u64 {
        4 * ROWS as u64
    }
    fn n_shards(&self) -> usize {
        4
    }
    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        let all = vectors(shard as u64 + 1);
        Ok(taps.iter().map(|&tap| Arc::new(all[tap].clone())).collect())
    }
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        Statistics::of(&vectors(1)[tap], self.taps[tap].width, |_| true)
    }
    fn held_out(&self, taps: &[usize], _: usize) -> Result<Vec<Vec<f32>>> {
        let all = vectors(99);
        Ok(taps.iter().map(|&tap| all[tap].clone()).collect())
    }
    fn provenance(&self) -> &Value {
        &self.provenance
    }
    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

#[test]
fn a_trained_skip_connection_is_released_with_every_latent_function() {
    let folder = tempfile::tempdir().unwrap();
    let tap = |point: &str, width| SourceTap { point: Some(point.parse().unwrap()), width };
    let source: Arc<dyn ActivationSource> =
        Arc::new(Linear { taps: [tap("mlp_in.0", D_IN), tap("mlp.0", D_OUT)], provenance: json!({}) });
    for variant in [
        "target_l0 = 3.0",
        "activation = 'topk'\nk = 3",
        "activation = 'batchtopk'\nk = 3",
        "activation = 'relu'\nlambda = 0.5",
        "activation = 'gated'\nlambda = 0.5",
    ] {
        for skip in [false, true] {
            let keys = format!(
                "tap = 'mlp_in.0'\ntarget = 'mlp.0'\nskip = {skip}\nwidth = 16\nsteps = 400\nbatch = 256\nlr = 0.01\n{variant}\n"
            );
            let config: TrainConfig = resolve(&keys, &[]).unwrap();
            let out = folder.path().join(format!("{}-{skip}", config.activation as usize));
            let summary = run(&source, &config, &out, &StopFlag::default()).unwrap();
            let file = sae_files::read(&out).unwrap();
            assert_eq!(file.sae.w_skip().is_some(), skip, "{variant}");
            let is_top_k = matches!(file.sae.activation(), Activation::TopK { k: 3 });
            assert_eq!(is_top_k, variant.contains("'topk'"), "{variant}");
            assert_eq!(file.metadata.target.map(|t| t.to_string()).as_deref(), Some("mlp.0"));
            let whole = fvu(&file.sae);
            let said = summary.held_out_fvu.unwrap();
            assert!((whole - said).abs() < 1e-5, "{variant}, {skip}: {whole}, and training said {said}");
            if skip {
                let parts = SaeParts { w_skip: None, ..file.sae.into_parts() };
                let without = fvu(&Sae::new(parts).unwrap());
                assert!(
                    whole < 0.1 && without > 3.0 * whole,
                    "{variant}: {whole} with and {without} without"
                );
            }
        }
    }
}

/// Of the vectors held out, by the reference.
fn fvu(sae: &Sae) -> f64 {
    let [x, y] = vectors(99);
    let x = Rows::new(&x, D_IN).unwrap();
    let codes = reference::encode(sae, x).unwrap();
    let found = reference::decode(sae, x, &codes).unwrap();
    let mut fvu = Fvu::new(D_OUT);
    fvu.update(Rows::new(&y, D_OUT).unwrap(), Rows::new(&found, D_OUT).unwrap()).unwrap();
    fvu.value().unwrap()
}
