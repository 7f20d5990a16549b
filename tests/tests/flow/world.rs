//! What the tests of a flow look at: a tiny model with a store of three layers and a random dictionary, and a pack read whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use native::evaluate::{self, layers, layers::LayersReport};
use native::features::select::Amounts;
use native::features::texts::Passage;
use native::features::{self, Names, Options, Source};
use native::flow::FlowOptions;
use native::harvest::{self, Inputs};
use native::model::{self, LoadedModel};
use native::sae_files::SaeFile;
use native::site;
use native::stop::StopFlag;
use native::store::{Split, Store};
use shared::format::SaeMetadata;
use shared::lm::{LmError, Tap, TapAction};
use shared::multi_layer::{Layer, MultiLayer};
use shared::pack::Manifest;
use shared::pack::flow::{self, FlowEntry, FlowLatents, FlowText, FlowThresholds, FlowVectors, LensShard};
use shared::tap::TapPoint;
use shared::{Activation, RowScaling, Rows, Sae, SaeParts, reference};

use crate::support::prepare;

pub(crate) const TAPS: [&str; 3] = ["embed.0", "resid.0", "resid.1"];
pub(crate) const N: usize = 48;
pub(crate) const DESCRIBED: usize = 20;
pub(crate) const EFFECTS: usize = 6;

pub(crate) fn sae(d: usize, rows: RowScaling) -> Sae {
    let mut state = 3u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    // Vectors have length one in the dictionary's units, or √d where they are scaled one by one.
    let size = if rows.is_none() { 1.0 } else { (d as f32).sqrt() };
    let w_enc: Vec<f32> = (0..N * d).map(|_| draw()).collect();
    let w_dec = w_enc.chunks(d).flat_map(|row| {
        let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
        row.iter().map(move |w| 0.3 * size * w / norm)
    });
    let w_dec = w_dec.collect();
    let threshold = (0..N).map(|_| 0.5 * size * (0.5 + 0.5 * draw().abs())).collect();
    let b_enc = (0..N).map(|_| 0.05 * size * draw()).collect();
    let b_dec = (0..d).map(|_| 0.02 * draw()).collect();
    let activation = Activation::JumpRelu { threshold };
    Sae::new(SaeParts { d_in: d, d_out: d, w_enc, b_enc, w_dec, b_dec, activation, w_skip: None, rows })
        .unwrap()
}

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) model: LoadedModel,
    pub(crate) store: Store,
    pub(crate) file: SaeFile,
    pub(crate) passages: Vec<Passage>,
    pub(crate) options: Options,
    pub(crate) report: LayersReport,
}

/// A store of three layers, a random dictionary for them, and two texts.
pub(crate) fn world(rows: RowScaling, own_thresholds: bool) -> World {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = prepare(folder.path());
    settings.taps = TAPS.map(str::to_owned).to_vec();
    settings.dtype = shared::config::harvest::StoreDtype::F32;
    let model = model::load(settings.model.as_ref()).unwrap();
    let out = folder.path().join("store");
    harvest::run(&settings, &out, &Inputs::of(&model, &settings).unwrap(), &StopFlag::default()).unwrap();
    let store = Store::open(&out).unwrap();
    let d = model.model.spec().d_model;
    let layer = |(i, tap): (usize, &str)| {
        let tap: TapPoint = tap.parse().unwrap();
        let x = read(&store, tap).into_values().collect::<Vec<_>>();
        let norms: Vec<f64> = x.iter().map(|x| reference::dot(x, x).sqrt()).collect();
        let scale = (norms.iter().map(|n| n * n).sum::<f64>() / norms.len() as f64).sqrt();
        let mut sorted = norms.clone();
        sorted.sort_by(f64::total_cmp);
        // At one layer some vectors are beyond the limit.
        let limit = (i == 1).then(|| sorted[sorted.len() * 3 / 4]);
        Layer { tap, scale: if rows.is_none() { scale } else { 1.0 }, max_input_norm: limit }
    };
    let taps = TAPS.into_iter().enumerate().map(layer).collect();
    let sae = sae(d, rows);
    // Each layer scales the thresholds of the weights by its own factor, up and down.
    let own = |layer: usize| (0..N).map(move |i| [0.8, 1.0, 1.3][(layer + i) % 3]);
    let Activation::JumpRelu { threshold } = sae.activation() else { panic!("no thresholds") };
    let scaled =
        (0..TAPS.len()).flat_map(|layer| threshold.iter().zip(own(layer)).map(|(theta, by)| theta * by));
    let thresholds = if own_thresholds { scaled.collect() } else { Vec::new() };
    let metadata = SaeMetadata { layers: Some(MultiLayer::new(taps, thresholds)), ..SaeMetadata::default() };
    let passage = |id: &str, from: usize| Passage {
        id: id.to_owned(),
        title: id.to_uppercase(),
        source: "numbered words".to_owned(),
        text: (from..from + 40).map(|i| format!("w{} ", 3 + i * 37 % 98)).collect(),
    };
    let passages = vec![passage("one", 0), passage("two", 100), passage("three", 7)];
    let options = Options {
        tokens: 1_000_000,
        amounts: Amounts { top: 3, per_quarter: 1, random: 2, before: 4, after: 2 },
        latents_per_shard: 8,
        text_tokens: 24,
        seed: 1,
        flow: FlowOptions { texts: 2, latents: DESCRIBED, effects: EFFECTS },
    };
    let file = SaeFile { sae, metadata };
    let asked = evaluate::Options { sequences: 2, density_tokens: 0 };
    let report = layers::evaluate(&file, &store, None, &asked, &StopFlag::default()).unwrap().report;
    World { folder, file, model, store, passages, options, report }
}

impl World {
    pub(crate) fn source(&self) -> Source<'_> {
        Source {
            file: &self.file,
            store: &self.store,
            model: &self.model,
            passages: &self.passages,
            eval: None,
            layers_eval: Some(&self.report),
        }
    }

    pub(crate) fn collect(&self) -> PathBuf {
        let out = self.folder.path().join("pack");
        let names = Names::default();
        features::collect(&self.source(), &self.options, &names, &out, &StopFlag::default()).unwrap();
        out
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.file.metadata.layers.as_ref().unwrap().layers
    }

    pub(crate) fn kept(&self, layer: usize, raw: &[f32]) -> bool {
        self.layers()[layer].max_input_norm.is_none_or(|most| reference::dot(raw, raw).sqrt() <= most)
    }

    /// The latents of a raw vector of a layer, by the reference.
    pub(crate) fn codes(&self, layer: usize, raw: &[f32]) -> BTreeMap<u32, f32> {
        let scale = self.layers()[layer].scale;
        let x: Vec<f32> = raw.iter().map(|&x| (f64::from(x) / scale) as f32).collect();
        if self.kept(layer, raw) { self.encode(layer, &x) } else { BTreeMap::new() }
    }

    /// The dictionary with the thresholds of a layer.
    pub(crate) fn sae(&self, layer: usize) -> Sae {
        let layers = self.file.metadata.layers.as_ref().unwrap();
        let mut parts = self.file.sae.clone().into_parts();
        if layers.thresholds_per_layer {
            let threshold = layers.thresholds[layer * N..(layer + 1) * N].to_vec();
            parts.activation = Activation::JumpRelu { threshold };
        }
        Sae::new(parts).unwrap()
    }

    pub(crate) fn encode(&self, layer: usize, x: &[f32]) -> BTreeMap<u32, f32> {
        let codes = reference::encode(&self.sae(layer), Rows::new(x, x.len()).unwrap()).unwrap();
        let (latents, values) = codes.row(0);
        latents.iter().copied().zip(values.iter().copied()).collect()
    }
}

/// Every training vector of a tap, by its place in the text.
pub(crate) fn read(store: &Store, tap: TapPoint) -> BTreeMap<(u32, u32), Vec<f32>> {
    let mut all = BTreeMap::new();
    for index in 0..store.n_shards(Split::Train) {
        let shard = store.read_shard(tap, Split::Train, index).unwrap();
        for (i, x) in shard.vectors.chunks_exact(shard.width).enumerate() {
            all.insert((shard.sequences[i], shard.positions[i]), x.to_vec());
        }
    }
    all
}

/// Looks at some taps, takes rows away at one, puts one vector in all places of another.
#[derive(Default)]
pub(crate) struct Probe {
    pub(crate) seen: BTreeMap<TapPoint, Vec<f32>>,
    pub(crate) remove: Option<(TapPoint, Vec<f32>)>,
    pub(crate) put: Option<(TapPoint, Vec<f32>)>,
}

impl Tap for Probe {
    fn wants(&self, _: TapPoint) -> bool {
        true
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.seen.insert(point, value.data().to_vec());
        if let Some((at, rows)) = &self.remove
            && *at == point
        {
            return Ok(TapAction::Replace(value.data().iter().zip(rows).map(|(x, r)| x - r).collect()));
        }
        if let Some((at, row)) = &self.put
            && *at == point
        {
            return Ok(TapAction::Replace(row.repeat(value.n_rows())));
        }
        Ok(TapAction::Keep)
    }
}

/// All that is in the section of a pack.
pub(crate) struct Flow {
    pub(crate) manifest: Manifest,
    pub(crate) entries: Vec<FlowEntry>,
    pub(crate) texts: Vec<(FlowText, FlowVectors)>,
    pub(crate) latents: FlowLatents,
    pub(crate) lens: Vec<LensShard>,
    pub(crate) thresholds: Option<FlowThresholds>,
}

pub(crate) fn flow(out: &Path) -> Flow {
    let manifest = site::verify_pack(out).unwrap();
    let read = |path: &str| fs::read(out.join(path)).unwrap();
    let (info, n) = (manifest.flow.clone().unwrap(), manifest.sae.n_latents);
    let n_layers = info.layers.len();
    let entries = FlowEntry::read_list(&read(flow::FLOW)).unwrap();
    let texts = entries.iter().map(|entry| {
        let text = FlowText::read(entry, n_layers, n, &read(&entry.file)).unwrap();
        (text, FlowVectors::read(entry, n_layers, manifest.sae.d_in, &read(&entry.vectors)).unwrap())
    });
    let texts = texts.collect();
    let latents = FlowLatents::read(&info, n, &read(flow::FLOW_LATENTS)).unwrap();
    let lens = (0..info.n_lenses()).map(|shard| {
        let (numbers, words) = (read(&flow::lens_numbers(shard)), read(&flow::lens_words(shard)));
        LensShard::read(shard, info.lens_range(shard).len(), n_layers, &numbers, &words).unwrap()
    });
    let lens = lens.collect();
    let own = info.thresholds_per_layer.then(|| read(flow::FLOW_THRESHOLDS));
    let thresholds = own.map(|bytes| FlowThresholds::read(&info, n, &bytes).unwrap());
    Flow { manifest, entries, texts, latents, lens, thresholds }
}
