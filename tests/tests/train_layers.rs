//! What rows of several layers add to the objectives' f64 reference: thresholds of each layer, weights, the published loss and AuxK of
//! multi-layer SAEs, by finite differences and by the published formulas written out; and mistakes in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use native::sae_files::read;
use native::stop::StopFlag;
use native::train::{ActivationSource, SourceTap, Statistics, Vectors, run};
use serde_json::{Value, json};
use shared::config::resolve;
use shared::config::train::TrainConfig;
use shared::format::SaeMetadata;
use shared::loss::{
    AuxForm, AuxK, DeadPull, Examples, Latents, MultiTopK, Objective, Parametrisation, Prefix, Sparsity,
    TrainSae, row_moments,
};
use shared::tap::{Site, TapPoint};
use shared::{Rows, reference};

const D: usize = 5;
const N: usize = 9;
const N_ROWS: usize = 12;
const N_LAYERS: usize = 3;

fn noise(seed: u64, n: usize, scale: f64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u32 << 24) as f64 - 0.5
    };
    (0..n).map(|_| scale * next()).collect()
}

fn sae(latents: Latents) -> TrainSae {
    let encoder = noise(1, N * D, 2.0);
    TrainSae {
        d_in: D,
        d_out: D,
        w_enc: encoder.clone(),
        b_enc: noise(2, N, 0.2),
        w_dec: encoder.iter().zip(noise(3, N * D, 0.4)).map(|(e, n)| e + n).collect(),
        b_dec: noise(4, D, 0.5),
        latents,
        pre_bias: true,
        w_skip: None,
    }
}

fn jump(parametrisation: Parametrisation) -> Latents {
    let thetas = noise(5, N * N_LAYERS, 0.6).into_iter().map(|v| parametrisation.parameter(0.5 + v));
    Latents::JumpRelu { threshold: thetas.collect(), parametrisation, bandwidth: 0.3 }
}

fn rows() -> Vec<f32> {
    noise(6, N_ROWS * D, 2.5).into_iter().map(|v| v as f32).collect()
}

fn examples() -> Examples {
    Examples {
        layers: [0u16, 2, 1, 2].into_iter().cycle().take(N_ROWS).collect(),
        weights: noise(7, N_ROWS, 1.0).into_iter().map(|v| 1.0 + v).collect(),
        deviations: noise(8, N_ROWS, 1.0).into_iter().map(|v| 0.8 + v).collect(),
    }
}

fn dead() -> Vec<bool> {
    (0..N).map(|latent| latent % 3 == 0).collect()
}

/// Every latent function and term that rows can be weighed in.
fn cases() -> Vec<(&'static str, TrainSae, Objective)> {
    let of = |sparsity| Objective { examples: examples(), ..Objective::plain(sparsity) };
    let l0 = Sparsity::TargetL0 { lambda: 0.3, target: 2.0 };
    let prefixes = [(3, 0.5), (N, 1.5)].map(|(n_latents, weight)| Prefix { n_latents, weight }).to_vec();
    let gated = Latents::Gated { r_mag: noise(9, N, 0.3), b_mag: noise(10, N, 0.3) };
    let aux = |form| Some(AuxK { form, k: 2, weight: 0.4, dead: dead() });
    vec![
        ("jumprelu", sae(jump(Parametrisation::Log)), Objective { l0_by_layer: true, ..of(l0) }),
        (
            "raw jumprelu, prefixes, dead-latent loss",
            sae(jump(Parametrisation::Raw)),
            Objective {
                l0_by_layer: true,
                prefixes,
                dead_pull: Some(DeadPull { weight: 0.2, dead: dead() }),
                ..of(l0)
            },
        ),
        ("relu", sae(Latents::Relu), of(Sparsity::Norm { lambda: 0.1, p: 0.7, decoder_norm: true })),
        ("gated", sae(gated), of(Sparsity::Norm { lambda: 0.1, p: 1.0, decoder_norm: false })),
        (
            "topk, multi",
            sae(Latents::TopK { k: 3 }),
            Objective { multi: Some(MultiTopK { k: 6, weight: 0.5 }), normaliser: 1.7, ..of(Sparsity::None) },
        ),
        (
            "topk, auxk of mlsae",
            sae(Latents::TopK { k: 3 }),
            Objective { aux_k: aux(AuxForm::Mlsae), normaliser: 1.7, ..of(Sparsity::None) },
        ),
        (
            "jumprelu, auxk of mlsae",
            sae(jump(Parametrisation::Log)),
            Objective { aux_k: aux(AuxForm::Mlsae), ..of(Sparsity::None) },
        ),
    ]
}

/// Central differences, of all that has a true gradient: not thresholds, and with a gate not what holds the decoder fixed.
#[test]
fn gradients_equal_finite_differences() {
    let h = 1e-6;
    for (name, sae, objective) in cases() {
        let x = rows();
        let x = Rows::new(&x, D).unwrap();
        let (_, g) = sae.backward(x, x, &objective).unwrap();
        let gated = matches!(sae.latents, Latents::Gated { .. });
        let fields: [(&str, fn(&mut TrainSae) -> &mut Vec<f64>, &[f64]); 4] = [
            ("w_enc", |s| &mut s.w_enc, &g.w_enc),
            ("b_enc", |s| &mut s.b_enc, &g.b_enc),
            ("w_dec", |s| &mut s.w_dec, &g.w_dec),
            ("b_dec", |s| &mut s.b_dec, &g.b_dec),
        ];
        for (field_name, field, gradient) in
            fields.into_iter().filter(|(name, ..)| !(gated && name.ends_with("_dec")))
        {
            for (k, &want) in gradient.iter().enumerate() {
                let at = |shift: f64| {
                    let mut sae = sae.clone();
                    field(&mut sae)[k] += shift;
                    sae.forward(x, x, &objective).unwrap().losses.total()
                };
                let got = (at(h) - at(-h)) / (2.0 * h);
                let close = (got - want).abs() < 1e-6 * (1.0 + want.abs());
                assert!(close, "{name}, {field_name}[{k}]: {got} against {want}");
            }
        }
    }
}

/// The straight-through estimates of thresholds written out for each latent and layer (arXiv 2407.14435 eqs. 11 and 12), with the
/// quadratic term of the layer's own mean L0.
#[test]
fn thresholds_learn_from_the_rows_of_their_layer() {
    let objective = cases().remove(0).2;
    for parametrisation in [Parametrisation::Log, Parametrisation::Raw] {
        let sae = sae(jump(parametrisation));
        let x = rows();
        let x = Rows::new(&x, D).unwrap();
        let (_, g) = sae.backward(x, x, &objective).unwrap();
        let pass = sae.forward(x, x, &objective).unwrap();
        let Latents::JumpRelu { threshold, bandwidth, .. } = &sae.latents else { panic!("no thresholds") };
        let theta = |i: usize, layer: usize| parametrisation.threshold(threshold[i * N_LAYERS + layer]);
        let of_layer = |layer: usize| {
            (0..N_ROWS).filter(move |&row| usize::from([0u16, 2, 1, 2][row % 4]) == layer).collect::<Vec<_>>()
        };
        let (mut in_windows, mut n_active) = (0, 0);
        for layer in 0..N_LAYERS {
            let rows = of_layer(layer);
            let active = |row: &usize| (0..N).filter(|&i| pass.z[row * N + i] > theta(i, layer)).count();
            let l0 = rows.iter().map(active).sum::<usize>() as f64 / rows.len() as f64;
            n_active += rows.iter().map(active).sum::<usize>();
            let lambda = 2.0 * 0.3 * (l0 / 2.0 - 1.0) / 2.0;
            for i in 0..N {
                let mut want = 0.0;
                for &row in &rows {
                    let (z, theta) = (pass.z[row * N + i], theta(i, layer));
                    if (z - theta).abs() < bandwidth / 2.0 {
                        let along: f64 =
                            (0..D).map(|k| pass.residual[row * D + k] * sae.w_dec[i * D + k]).sum();
                        let g_f = 2.0 / N_ROWS as f64 * objective.examples.weights[row] * along;
                        want -= (theta * g_f + lambda / N_ROWS as f64) / bandwidth;
                        in_windows += 1;
                    }
                }
                want *= if parametrisation == Parametrisation::Log { theta(i, layer) } else { 1.0 };
                let got = g.threshold[i * N_LAYERS + layer];
                assert!((got - want).abs() < 1e-12, "latent {i}, layer {layer}: {got} against {want}");
            }
        }
        assert!(in_windows > 8 && n_active > 15, "{in_windows} in windows, {n_active} active");
    }
}

/// The loss of arXiv 2409.04185 as its program computes it, from raw vectors: `mean_l FVU_l + w · aux`.
#[test]
fn the_published_loss_written_out() {
    let sae = sae(Latents::TopK { k: 3 });
    let raw = noise(11, N_ROWS * D, 9.0);
    let layers: Vec<u16> = (0..N_ROWS).map(|row| (row % N_LAYERS) as u16).collect();
    // What the encoder reads is standardised without an ε, and divided by C.
    let c = ((D - 1) as f64).sqrt();
    let (mut x, mut undo) = (Vec::new(), Vec::new());
    for row in raw.chunks_exact(D) {
        let mean = row.iter().sum::<f64>() / D as f64;
        let deviation = (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (D - 1) as f64).sqrt();
        x.extend(row.iter().map(|v| ((v - mean) / deviation / c) as f32));
        undo.push((deviation * c, mean));
    }
    let mut examples = Examples { layers: layers.clone(), ..Examples::default() };
    let moments: Vec<[f64; 2]> = x.chunks_exact(D).map(row_moments).collect();
    examples.weights = examples.fvu_weights(&moments, D, &undo);
    examples.deviations = undo.iter().map(|(scale, _)| scale / c).collect();
    let (weight, k) = (1.0 / 32.0, 2);
    let aux_k = Some(AuxK { form: AuxForm::Mlsae, k, weight, dead: dead() });
    let objective = Objective { examples, aux_k, ..Objective::plain(Sparsity::None) };
    let x = Rows::new(&x, D).unwrap();
    let pass = sae.forward(x, x, &objective).unwrap();

    let decode = |f: &[f64]| -> Vec<f64> {
        (0..D).map(|k| sae.b_dec[k] + (0..N).map(|i| f[i] * sae.w_dec[i * D + k]).sum::<f64>()).collect()
    };
    let (mut fvu, mut above, mut below) = (0.0, 0.0, 0.0);
    for layer in 0..N_LAYERS {
        let of_layer = || (0..N_ROWS).filter(|&row| usize::from(layers[row]) == layer);
        let elements: Vec<f64> = of_layer().flat_map(|row| raw[row * D..][..D].to_vec()).collect();
        let mean = elements.iter().sum::<f64>() / elements.len() as f64;
        let variance = elements.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (elements.len() - 1) as f64;
        let mut squares = 0.0;
        for row in of_layer() {
            let (scale, shift) = undo[row];
            let rebuilt: Vec<f64> =
                decode(&pass.f[row * N..][..N]).iter().map(|v| v * scale + shift).collect();
            let error: Vec<f64> = raw[row * D..][..D].iter().zip(&rebuilt).map(|(x, r)| x - r).collect();
            squares += error.iter().map(|e| e * e).sum::<f64>();
            // The largest two dead pre-activations, decoded with the bias, in standardised units.
            let z = &pass.z[row * N..][..N];
            let mut order: Vec<usize> = (0..N).filter(|&i| dead()[i]).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
            let mut chosen = vec![0.0; N];
            order[..k].iter().for_each(|&i| chosen[i] = z[i].max(0.0));
            let guess: Vec<f64> = decode(&chosen).iter().map(|v| v * c).collect();
            let error_mean = error.iter().sum::<f64>() / D as f64;
            above += error.iter().zip(&guess).map(|(e, g)| (e - g).powi(2)).sum::<f64>();
            below += error.iter().map(|e| (e - error_mean).powi(2)).sum::<f64>();
        }
        fvu += squares / elements.len() as f64 / variance / N_LAYERS as f64;
    }
    let (found, wanted) = (pass.losses, [fvu, weight * above / below]);
    assert!((found.reconstruction - wanted[0]).abs() < 1e-6, "{found:?} against {wanted:?}");
    assert!((found.auxiliary - wanted[1]).abs() < 1e-6, "{found:?} against {wanted:?}");
    assert!(wanted[1] > 0.01 && fvu > 0.05, "{wanted:?}");
}

/// A mistake in what is said of rows changes the loss or the gradients.
#[test]
fn impostors_are_told_apart() {
    let mistakes: [(&str, fn(&mut TrainSae, &mut Objective)); 5] = [
        ("layer", |_, o| o.examples.layers.fill(0)),
        ("order of thresholds", |sae, _| {
            if let Latents::JumpRelu { threshold, .. } = &mut sae.latents {
                let by_layer = threshold.clone();
                let at = |k: usize| by_layer[(k % N) * N_LAYERS + k / N];
                threshold.iter_mut().enumerate().for_each(|(k, t)| *t = at(k));
            }
        }),
        ("weights", |_, o| o.examples.weights.clear()),
        ("deviations", |_, o| o.examples.deviations.clear()),
        ("common L0", |_, o| o.l0_by_layer = false),
    ];
    let mut seen = 0;
    for (name, right, objective) in cases() {
        let x = rows();
        let x = Rows::new(&x, D).unwrap();
        let (losses, g) = right.backward(x, x, &objective).unwrap();
        for (mistake_name, mistake) in mistakes {
            let (jumps, aux) = (matches!(right.latents, Latents::JumpRelu { .. }), objective.aux_k.is_some());
            let matters = match mistake_name {
                "layer" | "order of thresholds" => jumps,
                "deviations" => aux,
                "common L0" => objective.l0_by_layer,
                _ => true,
            };
            let (mut sae, mut wrong) = (right.clone(), objective.clone());
            mistake(&mut sae, &mut wrong);
            let (others, other) = sae.backward(x, x, &wrong).unwrap();
            let off = g.threshold.iter().zip(&other.threshold).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
            let off = off.max((losses.total() - others.total()).abs());
            assert_eq!(off > 1e-6, matters, "{name}: {mistake_name}, {off:e}");
            seen += usize::from(matters);
        }
    }
    assert!(seen > 15, "{seen}");
}

/// Two layers in which one threshold a latent fires unequally often: vectors along few directions, and along all.
struct Unlike {
    taps: [SourceTap; 2],
    provenance: Value,
}

const WIDTH: usize = 12;
const SHARD: usize = 4096;

impl Unlike {
    fn rows(&self, tap: usize, seed: u64) -> Vec<f32> {
        let used = [2, WIDTH][tap];
        let values = noise(40 + 2 * seed + tap as u64, SHARD * used, 2.0);
        let row = |values: &[f64]| {
            let mut row: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            row.resize(WIDTH, 0.0);
            row
        };
        values.chunks_exact(used).flat_map(row).collect()
    }
}

impl ActivationSource for Unlike {
    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }
    fn n_vectors(&self) -> u64 {
        2 * SHARD as u64
    }
    fn n_shards(&self) -> usize {
        2
    }
    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        Ok(taps.iter().map(|&tap| Arc::new(self.rows(tap, shard as u64))).collect())
    }
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        Statistics::of(&self.rows(tap, 0), WIDTH, |_| true)
    }
    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
        let rows = |&tap: &usize| self.rows(tap, 9)[..limit.min(SHARD) * WIDTH].to_vec();
        Ok(taps.iter().map(rows).collect())
    }
    fn provenance(&self) -> &Value {
        &self.provenance
    }
    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

/// With thresholds of their own, every layer has the L0 that was asked for; with common ones only their mean has.
#[test]
fn every_layer_arrives_at_its_target() {
    let folder = tempfile::tempdir().unwrap();
    let tap = |layer| SourceTap { point: Some(TapPoint::new(Site::Resid, layer)), width: WIDTH };
    let source: Arc<dyn ActivationSource> =
        Arc::new(Unlike { taps: [tap(3), tap(8)], provenance: json!({}) });
    let levels = |thresholds: &str| {
        let keys = format!(
            "width = 64\ntarget_l0 = 5.0\nlayers = 'all'\nthresholds = '{thresholds}'\nsteps = 1500\nbatch = 256\n\
             checkpoint_every = 1000\nlr_warmup_steps = 20"
        );
        let config: TrainConfig = resolve(&keys, &[]).unwrap();
        let out = folder.path().join(thresholds);
        run(&source, &config, &out, &StopFlag::default()).unwrap();
        [3, 8].map(|layer| {
            let file = read(Path::new(&format!("{}#resid.{layer}", out.display()))).unwrap();
            let x = source.held_out(&[usize::from(layer == 8)], SHARD).unwrap().remove(0);
            let codes = reference::encode(&file.sae, Rows::new(&x, WIDTH).unwrap()).unwrap();
            codes.n_active() as f64 / codes.n_rows() as f64
        })
    };
    let (common, own) = (levels("per_latent"), levels("per_layer"));
    let off = |l0: f64| (l0 / 5.0 - 1.0).abs();
    assert!(own.iter().all(|l0| off(*l0) < 0.08), "{own:?}");
    assert!(
        off((common[0] + common[1]) / 2.0) < 0.05 && common.iter().any(|l0| off(*l0) > 0.2),
        "{common:?}"
    );
}
