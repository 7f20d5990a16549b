//! A multi-layer autoencoder measured layer by layer: against plain loops over the tiny language model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::collections::BTreeMap;

use native::evaluate::layers::{self, Measured};
use native::evaluate::{Options, evaluate};
use native::harvest::{self, Inputs};
use native::model::{self, LoadedModel};
use native::sae_files::SaeFile;
use native::stop::StopFlag;
use native::store::{Split, Store};
use shared::format::SaeMetadata;
use shared::lm::{LmError, NoTap, Tap, TapAction, TokenBatch, Until};
use shared::multi_layer::{Layer, MultiLayer};
use shared::tap::TapPoint;
use shared::{Activation, RowScaling, Rows, Sae, SaeParts, reference};
use support::prepare;

const OPTIONS: Options = Options { sequences: 5, density_tokens: 0 };
const LAYERS: [(&str, f64); 2] = [("resid.0", 1.7), ("resid.1", 0.6)];

fn point(text: &str) -> TapPoint {
    text.parse().unwrap()
}

/// Random weights over two layers, of which the second leaves out long vectors.
fn dictionary(d: usize, limit: Option<f64>) -> SaeFile {
    let (n, mut stream) = (40, conformance::fixture_pack::Stream::new(7));
    let mut draw = |len: usize| (0..len).map(|_| 0.4 * stream.signed()).collect::<Vec<f32>>();
    let parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc: draw(n * d),
        b_enc: draw(n),
        w_dec: draw(n * d),
        b_dec: draw(d),
        activation: Activation::JumpRelu { threshold: vec![0.3; n] },
        w_skip: None,
        rows: RowScaling::None,
    };
    let layer =
        |(tap, scale)| Layer { tap: point(tap), scale, max_input_norm: limit.filter(|_| tap == "resid.1") };
    let layers = Some(MultiLayer::new(LAYERS.map(layer).to_vec(), Vec::new()));
    SaeFile { sae: Sae::new(parts).unwrap(), metadata: SaeMetadata { layers, ..SaeMetadata::default() } }
}

fn harvested(folder: &std::path::Path) -> (Store, LoadedModel) {
    let mut settings = prepare(folder);
    settings.taps = LAYERS.map(|(tap, _)| tap.to_owned()).to_vec();
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let place = folder.join("store");
    harvest::run(&settings, &place, &Inputs::of(&loaded, &settings).unwrap(), &StopFlag::default()).unwrap();
    (Store::open(&place).unwrap(), loaded)
}

fn held_out(store: &Store, tap: &str) -> Vec<f32> {
    let shards = 0..store.n_shards(Split::HeldOut);
    shards.flat_map(|i| store.read_shard(point(tap), Split::HeldOut, i).unwrap().vectors).collect()
}

/// Dense activations of all tokens at a layer, in its units: `[tokens][latents]`; nothing where the vector is too long.
fn activations(file: &SaeFile, layer: usize, x: Rows<'_>) -> Vec<Vec<f64>> {
    let layers = file.metadata.layers.as_ref().unwrap();
    let (sae, n) = (layers.at(&file.sae, layer).unwrap(), file.sae.dims().n_latents);
    let dense = reference::encode(&sae, x).unwrap().to_dense();
    let Layer { scale, max_input_norm, .. } = layers.layers[layer];
    let limit = max_input_norm.unwrap_or(f64::INFINITY);
    let rows = dense.chunks(n).zip(x.iter());
    rows.map(|(row, x)| {
        let keeps = reference::dot(x, x).sqrt() <= limit;
        row.iter().map(|&z| if keeps { f64::from(z) / scale } else { 0.0 }).collect()
    })
    .collect()
}

#[test]
fn figures_are_those_of_plain_loops() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    let d = loaded.model.spec().d_model;
    let long = held_out(&store, "resid.1");
    let mut norms: Vec<f64> = long.chunks(d).map(|x| reference::dot(x, x).sqrt()).collect();
    norms.sort_by(f64::total_cmp);
    let limit = norms[norms.len() * 9 / 10];
    let file = dictionary(d, Some(limit));
    let stop = StopFlag::default();
    let Measured { report, layer_use } =
        layers::evaluate(&file, &store, Some(&loaded), &OPTIONS, &stop).unwrap();

    let data = LAYERS.map(|(tap, _)| held_out(&store, tap));
    let rows = data.each_ref().map(|x| Rows::new(x, d).unwrap());
    let z = [0, 1].map(|layer| activations(&file, layer, rows[layer]));
    let n_tokens = rows[0].n_rows();
    assert_eq!(report.n_tokens, n_tokens as u64);
    assert_eq!(report.layers[0].n_outliers, 0);
    let n_outliers = norms.iter().filter(|norm| **norm > limit).count();
    assert!(n_outliers > 0 && report.layers[1].n_outliers == n_outliers as u64);

    // Each layer's L0 and FVU are those of the autoencoder of that layer alone.
    for (layer, (tap, _)) in LAYERS.iter().enumerate() {
        let layers = file.metadata.layers.as_ref().unwrap();
        let mut metadata = SaeMetadata { tap: Some(point(tap)), ..SaeMetadata::default() };
        if let Some(limit) = layers.layers[layer].max_input_norm {
            metadata.provenance.insert("max_input_norm".to_owned(), limit.into());
        }
        let alone = SaeFile { sae: layers.at(&file.sae, layer).unwrap(), metadata };
        let alone = evaluate(&alone, &store, Some(&loaded), &OPTIONS, &stop).unwrap();
        let found = &report.layers[layer];
        assert_eq!((found.l0, found.fvu), (alone.reconstruction.l0, alone.reconstruction.fvu));
        let (found, wanted) = (found.splice.as_ref().unwrap(), alone.splice.unwrap());
        assert_eq!((found.n_predictions, found.ce_clean), (wanted.n_predictions, wanted.ce_clean));
        assert!((found.delta_loss - wanted.delta_loss).abs() < 1e-9, "{found:?} {wanted:?}");
        assert_eq!(found.delta_loss_error, wanted.delta_loss_error);
    }

    // P(layer, latent, token) in proportion to the activation, and the law of total variance from its definition.
    let total: f64 = z.iter().flatten().flatten().sum();
    let variance = |weights: &dyn Fn(usize) -> f64| {
        let (w0, w1) = (weights(0), weights(1));
        (w0 * w1) / (w0 + w1).powi(2)
    };
    let n = file.sae.dims().n_latents;
    let (mut of_latents, mut of_tokens) = (0.0, 0.0);
    for j in 0..n {
        let sum = |layer: usize| z[layer].iter().map(|row| row[j]).sum::<f64>();
        for layer in [0, 1] {
            assert!((layer_use.totals(j)[layer] - sum(layer)).abs() < 1e-3 * total / n as f64);
            let count = z[layer].iter().filter(|row| row[j] > 0.0).count() as u64;
            assert_eq!(layer_use.counts(j)[layer], count);
        }
        if sum(0) + sum(1) > 0.0 {
            of_latents += (sum(0) + sum(1)) / total * variance(&sum);
        }
        for (a, b) in z[0].iter().zip(&z[1]).filter(|(a, b)| a[j] + b[j] > 0.0) {
            of_tokens += (a[j] + b[j]) / total * variance(&|layer| [a[j], b[j]][layer]);
        }
    }
    let overall = |layer: usize| z[layer].iter().flatten().sum::<f64>();
    let weighted = report.weighted.unwrap();
    let wanted = [variance(&overall), of_latents, of_tokens];
    for (found, wanted) in [weighted.total, weighted.latent, weighted.token].into_iter().zip(wanted) {
        assert!((found - wanted).abs() < 1e-5 * wanted, "{found} for {wanted}");
    }

    // Latents in common on a token, and vectors without those too long.
    let active = |layer: usize, token: usize, j: usize| z[layer][token][j] > 0.0;
    let mut shares = [0u32; 2];
    for (token, j) in (0..n_tokens).flat_map(|token| (0..n).map(move |j| (token, j))) {
        let here = [0, 1].map(|layer| active(layer, token, j));
        shares[0] += u32::from(here[0] && here[1]);
        shares[1] += u32::from(here[0] || here[1]);
    }
    assert_eq!(report.pairs[0].token_overlap, Some(f64::from(shares[0]) / f64::from(shares[1])));
    let kept = |x: &&[f32]| reference::dot(x, x).sqrt() <= limit;
    let cosines: Vec<f64> = rows[1]
        .iter()
        .zip(rows[0].iter())
        .filter(|(x, _)| kept(x))
        .map(|(x, y)| reference::dot(x, y) / (reference::dot(x, x) * reference::dot(y, y)).sqrt())
        .collect();
    let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
    assert!((report.pairs[0].cosine.unwrap() - cosine).abs() < 1e-9);
}

/// Puts rows in the place of one tap, where a token is not kept.
struct Put<'a>(TapPoint, &'a dyn Fn(Rows<'_>) -> Vec<f32>);

impl Tap for Put<'_> {
    fn wants(&self, at: TapPoint) -> bool {
        at == self.0
    }

    fn visit(&mut self, _: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        Ok(TapAction::Replace(self.1(value)))
    }
}

#[test]
fn divergence_is_that_of_the_models_own_distributions() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    let d = loaded.model.spec().d_model;
    let file = dictionary(d, None);
    let report =
        layers::evaluate(&file, &store, Some(&loaded), &OPTIONS, &StopFlag::default()).unwrap().report;
    let tokens = store.tokens(Split::HeldOut).unwrap();
    let length = tokens.sequence_length;
    let ids = &tokens.ids[..OPTIONS.sequences * length];
    let batch = TokenBatch::new(ids, length).unwrap();
    let kept: Vec<bool> = (0..ids.len()).map(|i| !store.manifest().keeps(i % length, ids[i])).collect();
    let vocab = loaded.model.spec().vocab_size;
    let softmax = |logits: &[f32]| {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.into_iter().map(|e| e / sum).collect::<Vec<f64>>()
    };
    let clean = loaded.model.forward(batch, &mut NoTap, Until::Logits).unwrap().unwrap();
    for (layer, (tap, _)) in LAYERS.iter().enumerate() {
        let sae = file.metadata.layers.as_ref().unwrap().at(&file.sae, layer).unwrap();
        let rebuilt = |x: Rows<'_>| {
            let new = reference::decode(&sae, x, &reference::encode(&sae, x).unwrap()).unwrap();
            let rows = x.iter().zip(new.chunks(d)).zip(&kept);
            rows.flat_map(|((own, new), kept)| if *kept { own } else { new }).copied().collect()
        };
        let spliced =
            loaded.model.forward(batch, &mut Put(point(tap), &rebuilt), Until::Logits).unwrap().unwrap();
        let mut kl = BTreeMap::new();
        for i in 0..ids.len() {
            if (i + 1) % length != 0 && !kept[i] && !kept[i + 1] {
                let row = i * vocab..(i + 1) * vocab;
                let (p, q) = (softmax(&clean[row.clone()]), softmax(&spliced[row]));
                kl.insert(i, p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>());
            }
        }
        let mean = kl.values().sum::<f64>() / kl.len() as f64;
        let found = report.layers[layer].splice.as_ref().unwrap();
        assert_eq!(found.n_predictions, kl.len() as u64);
        assert!(mean > 1e-4 && (found.kl - mean).abs() < 1e-4 * mean, "{} for {mean}", found.kl);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    let stop = StopFlag::default();
    let refuse =
        |file: &SaeFile| format!("{:#}", layers::evaluate(file, &store, None, &OPTIONS, &stop).unwrap_err());
    let mut file = dictionary(loaded.model.spec().d_model, None);
    assert!(refuse(&dictionary(3, None)).contains("width"));
    file.metadata.layers.as_mut().unwrap().layers[1].tap = point("resid.7");
    assert!(refuse(&file).contains("resid.7"));
    file.metadata.layers = None;
    // What scales every vector on its own, and does not say where it reads, is measured at all layers.
    assert_eq!(layers::evaluate(&file, &store, None, &OPTIONS, &stop).unwrap().report.layers.len(), 2);
    file.metadata.tap = Some(point("resid.0"));
    assert!(refuse(&file).contains("of one layer"));
}
