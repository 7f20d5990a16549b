//! A lens: fitted to a store, trained behind, and measured there; against plain definitions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::path::Path;
use std::sync::Arc;

use native::evaluate::Options;
use native::evaluate::layers::{self, Measured};
use native::harvest::{self, Inputs};
use native::lens::fit::{self, Form, fit};
use native::model::{self, LoadedModel};
use native::sae_files::{SaeFile, read, read_whole};
use native::stop::StopFlag;
use native::store::{Split, Store};
use native::train::{ActivationSource, StoreTaps, Translated, run};
use shared::config::resolve;
use shared::config::train::TrainConfig;
use shared::format::tuned_lens::Lens;
use shared::metrics::Fvu;
use shared::tap::TapPoint;
use shared::{Rows, reference};
use support::prepare;

const KEYS: &str = "\
width = 48
steps = 80
batch = 64
layers = 'all'
";

fn harvested(folder: &Path) -> (Store, LoadedModel) {
    let mut settings = prepare(folder);
    settings.taps = vec!["resid".to_owned()];
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let place = folder.join("store");
    harvest::run(&settings, &place, &Inputs::of(&loaded, &settings).unwrap(), &StopFlag::default()).unwrap();
    (Store::open(&place).unwrap(), loaded)
}

fn vectors(store: &Store, tap: TapPoint, split: Split) -> Vec<f32> {
    let shards = 0..store.n_shards(split);
    shards.flat_map(|i| store.read_shard(tap, split, i).unwrap().vectors).collect()
}

fn lens(store: &Store, form: Form, ridge: f64) -> (Lens, Vec<fit::Fit>) {
    fit(store, &fit::Options { form, tokens: u64::MAX, ridge }, &StopFlag::default()).unwrap()
}

/// Of the least-squares map nothing that is left goes with what it read: the residual has mean zero and no covariance with the input.
#[test]
fn a_fit_leaves_nothing_that_a_linear_map_could_explain() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    let (d, taps) = (loaded.model.spec().d_model, store.manifest().taps.iter().map(|tap| tap.point));
    let taps: Vec<TapPoint> = taps.collect();
    let (maps, fits) = lens(&store, Form::LeastSquares, 1e-9);
    assert_eq!(maps.len(), taps.len());
    let last = vectors(&store, taps[taps.len() - 1], Split::Train);
    let x = vectors(&store, taps[0], Split::Train);
    let n = x.len() / d;
    let translated: Vec<Vec<f32>> = x.chunks(d).map(|x| maps[0].forward(x)).collect();
    let residual = |t: usize, i: usize| f64::from(last[t * d + i]) - f64::from(translated[t][i]);
    let mean = |values: &dyn Fn(usize) -> f64| (0..n).map(values).sum::<f64>() / n as f64;
    let deviation = |values: &dyn Fn(usize) -> f64| {
        let middle = mean(values);
        mean(&|t| (values(t) - middle).powi(2)).sqrt()
    };
    let (mut before, mut after, mut all) = (0.0, 0.0, 0.0);
    for i in 0..d {
        let wanted = |t: usize| f64::from(last[t * d + i]);
        let spread = deviation(&wanted);
        assert!(mean(&|t| residual(t, i)).abs() < 1e-3 * spread, "value {i} has a mean left");
        for j in 0..d {
            let read = |t: usize| f64::from(x[t * d + j]);
            let middle = mean(&read);
            let covariance = mean(&|t| residual(t, i) * (read(t) - middle));
            assert!(covariance.abs() < 2e-3 * spread * deviation(&read), "{i} with {j}: {covariance}");
        }
        before += deviation(&|t| wanted(t) - f64::from(x[t * d + i])).powi(2);
        after += deviation(&|t| residual(t, i)).powi(2);
        all += spread * spread;
    }
    for (found, wanted) in fits[0].unexplained.into_iter().zip([before / all, after / all]) {
        assert!((found - wanted).abs() < 1e-3 * wanted.max(0.01), "{found} for {wanted}");
    }
    assert!(after < 0.9 * before, "the map changes nothing");
    // The last layer stays as it is, and a stronger ridge comes nearer to that.
    assert!(maps[taps.len() - 1].weight().iter().all(|&w| w == 0.0));
    let size = |lens: &Lens| lens[0].weight().iter().map(|w| w * w).sum::<f32>();
    assert!(size(&lens(&store, Form::LeastSquares, 10.0).0) < 0.1 * size(&maps));
}

/// A rotation keeps lengths, and no small rotation more brings it nearer to the last layer: C_yx Rᵀ is symmetric (and has no negative
/// eigenvalue, or a reflection would do better).
#[test]
fn a_rotation_is_one_and_the_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    let (d, taps) = (loaded.model.spec().d_model, store.manifest().taps.iter().map(|tap| tap.point));
    let taps: Vec<TapPoint> = taps.collect();
    let (maps, fits) = lens(&store, Form::Rotation, 0.0);
    let map = &maps[0];
    for (w, inverse) in (0..d * d).map(|at| (map.weight()[at % d * d + at / d], map.inverse()[at])) {
        // The inverse is the transpose, but for the identity that W lacks.
        assert!((w - inverse).abs() < 1e-4 || (w + 1.0 - inverse).abs() < 1e-4, "{w} {inverse}");
    }
    assert!((fits[0].growth - 1.0).abs() < 1e-3, "{fits:?}");
    let [x, y] = [taps[0], taps[taps.len() - 1]].map(|tap| vectors(&store, tap, Split::Train));
    let translated: Vec<f32> = x.chunks(d).flat_map(|x| map.forward(x)).collect();
    let centred = |values: &[f32]| -> Vec<f64> {
        let n = (values.len() / d) as f64;
        let mean = |i: usize| values.iter().skip(i).step_by(d).map(|&v| f64::from(v)).sum::<f64>() / n;
        let means: Vec<f64> = (0..d).map(mean).collect();
        values.iter().enumerate().map(|(at, &v)| f64::from(v) - means[at % d]).collect()
    };
    let [x, y] = [centred(&translated), centred(&y)];
    let dot = |i: usize, j: usize| x.chunks(d).zip(y.chunks(d)).map(|(x, y)| y[i] * x[j]).sum::<f64>();
    let size = (0..d).map(|i| dot(i, i).abs()).fold(0.0, f64::max);
    for i in 0..d {
        assert!(dot(i, i) > -1e-3 * size, "value {i} is turned away");
        for j in 0..i {
            assert!((dot(i, j) - dot(j, i)).abs() < 2e-3 * size, "{i} and {j} could be turned");
        }
    }
    assert!(fits[0].unexplained[1] < fits[0].unexplained[0]);
}

fn train(folder: &Path, name: &str, keys: &str) -> SaeFile {
    let store = folder.join("store");
    let maps = lens(&Store::open(&store).unwrap(), Form::Rotation, 0.01).0;
    let source: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(&store).unwrap());
    let plain = source.provenance().clone();
    let source: Arc<dyn ActivationSource> = Arc::new(Translated::new(source, &maps).unwrap());
    assert_ne!(*source.provenance(), plain, "a run without the lens would go on from one with it");
    let config: TrainConfig = resolve(&format!("{KEYS}{keys}"), &[]).unwrap();
    let out = folder.join(name);
    run(&source, &config, &out, &StopFlag::default()).unwrap();
    read_whole(&out).unwrap()
}

/// What a dictionary behind a lens is for raw vectors, from the definitions: active latents in its units, FVU before and after undoing.
fn by_hand(file: &SaeFile, store: &Store, layer: usize) -> (f64, f64, f64) {
    let layers = file.metadata.layers.as_ref().unwrap();
    let (map, info) = (layers.translator(layer).unwrap(), &layers.layers[layer]);
    let d = map.width();
    let sae = layers.of_translated(&file.sae, layer).unwrap();
    let raw = vectors(store, info.tap, Split::HeldOut);
    let (mut n, mut active, mut fvu) = (0.0, 0.0, [Fvu::new(d), Fvu::new(d)]);
    for raw in raw.chunks(d) {
        let x = map.forward(raw);
        if reference::dot(&x, &x).sqrt() > info.max_input_norm.unwrap_or(f64::INFINITY) {
            continue;
        }
        let rows = Rows::new(&x, d).unwrap();
        let codes = reference::encode(&sae, rows).unwrap();
        let y = reference::decode(&sae, rows, &codes).unwrap();
        (n, active) = (n + 1.0, active + codes.n_active() as f64);
        fvu[0].update(rows, Rows::new(&y, d).unwrap()).unwrap();
        let back = map.backward(&y);
        fvu[1].update(Rows::new(raw, d).unwrap(), Rows::new(&back, d).unwrap()).unwrap();
    }
    (active / n, fvu[0].value().unwrap(), fvu[1].value().unwrap())
}

#[test]
fn a_dictionary_behind_a_lens_is_trained_kept_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (store, loaded) = harvested(folder.path());
    for (name, keys) in [
        ("scaled", "activation = 'jumprelu'\ntarget_l0 = 4.0\n"),
        ("standardised", "activation = 'topk'\nk = 4\nnormalise = 'standardise'\n"),
    ] {
        let file = train(folder.path(), name, keys);
        let options = Options { sequences: 4, density_tokens: 0 };
        let Measured { report, .. } =
            layers::evaluate(&file, &store, Some(&loaded), &options, &StopFlag::default()).unwrap();
        for (number, layer) in report.layers.iter().enumerate() {
            let (l0, before, after) = by_hand(&file, &store, number);
            assert!((layer.l0 - l0).abs() < 0.01 * l0, "{name} {number}: L0 {} for {l0}", layer.l0);
            let found = [layer.fvu_translated.unwrap(), layer.fvu.unwrap()];
            for (found, wanted) in found.into_iter().zip([before, after]) {
                assert!((found - wanted).abs() < 0.01 * wanted, "{name} {number}: {found} for {wanted}");
            }
            assert!(layer.splice.as_ref().unwrap().kl.is_finite());
            // One layer alone is an autoencoder of raw vectors, where weights can say it.
            let alone = read(&folder.path().join(format!("{name}#{}", layer.tap)));
            if name == "standardised" {
                assert!(format!("{:#}", alone.unwrap_err()).contains("lens"));
                continue;
            }
            let (alone, d) = (alone.unwrap().sae, loaded.model.spec().d_model);
            let raw = vectors(&store, layer.tap, Split::HeldOut);
            let rows = Rows::new(&raw, d).unwrap();
            let codes = reference::encode(&alone, rows).unwrap();
            let mut fvu = Fvu::new(d);
            let decoded = reference::decode(&alone, rows, &codes).unwrap();
            fvu.update(rows, Rows::new(&decoded, d).unwrap()).unwrap();
            let (found, wanted) = (fvu.value().unwrap(), layer.fvu.unwrap());
            assert!((found - wanted).abs() < 0.05 * wanted, "{number}: alone {found}, of several {wanted}");
        }
    }
}
