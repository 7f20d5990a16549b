//! Packs of multi-layer autoencoders: what each latent responds to at any layer, and texts across the layers.
//!
//! All activations are in the dictionary's own units (raw vectors over the scalar of their layer), so that layers can be
//! compared. The data goes through these files in order: [`corpus`] encodes the store at every layer; [`texts`] runs the
//! passages; [`transitions`] counts what goes with what; [`lens`] asks the unembedding; [`effects`] removes latents and runs on;
//! what a latent responds to is made as for one layer ([`crate::features`]), from its largest activation on each token.

pub mod corpus;
pub mod effects;
pub mod lens;
pub mod texts;
pub mod transitions;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use shared::layer_thresholds::{self, Thinner};
use shared::metrics::Density;
use shared::multi_layer::{Layer, MultiLayer};
use shared::pack::Metrics;
use shared::pack::flow::{self as section, FlowEntry, FlowInfo, FlowLatents, FlowThresholds};
use shared::{Codes, Rows, Sae};

use crate::cpu::CpuBackend;
use crate::evaluate::layers::{LayerReport, LayersReport};
use crate::features::write::{PackWriter, manifest};
use crate::features::{self, HISTOGRAM, Names, Options, Source, summarise_all};
use crate::progress;
use crate::sae_files::SaeFile;
use crate::stop::StopFlag;
use corpus::Corpus;
use lens::Lens;
use texts::Run;

/// Described latents in a shard of the lens: what a page loads to show one of them.
const LATENTS_PER_LENS: usize = 8;

/// What to collect beyond what every pack has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowOptions {
    /// Most texts.
    pub texts: usize,
    /// Most latents to describe: the most active of the texts.
    pub latents: usize,
    /// Latents to remove in each text, one at a time.
    pub effects: usize,
}

/// The dictionary of several layers that a pack is made of, held for encoding.
#[derive(Debug)]
pub struct Dictionary<'a> {
    /// In its own units, with the lowest thresholds of any layer.
    pub backend: CpuBackend,
    /// Its layers.
    pub layers: &'a [Layer],
    /// Their thresholds `[L, n]`, where they have their own.
    thresholds: &'a [f32],
}

impl<'a> Dictionary<'a> {
    /// The dictionary `sae` of these layers; see [`layer_thresholds::lowest`].
    ///
    /// # Errors
    /// If the layers' thresholds do not fit.
    pub fn new(sae: &Sae, layers: &'a MultiLayer) -> Result<Self> {
        let wanted = if layers.thresholds_per_layer { layers.layers.len() * sae.dims().n_latents } else { 0 };
        let found = layers.thresholds.len();
        ensure!(found == wanted, "the layers have {found} thresholds of their own, not {wanted}");
        let lowest = layer_thresholds::lowest(sae.clone(), &layers.thresholds)?;
        let backend = CpuBackend::new(lowest);
        Ok(Self { backend, layers: &layers.layers, thresholds: &layers.thresholds })
    }

    /// Codes of vectors of layer number `layer`, in the dictionary's units.
    ///
    /// # Errors
    /// If they are of another width.
    pub fn codes(&self, layer: usize, x: Rows<'_>) -> Result<Codes> {
        let (codes, n) = (self.backend.encode(x)?, self.backend.sae().dims().n_latents);
        match self.thresholds.get(layer * n..(layer + 1) * n) {
            Some(thresholds) => Ok(Thinner::new(self.backend.sae()).above(thresholds, x, &codes)?),
            None => Ok(codes),
        }
    }
}

/// Collects everything and writes the pack at `out`, which appears whole or not at all.
///
/// # Errors
/// If inputs do not fit each other, cannot be read, or the disk refuses.
pub fn collect(
    source: &Source<'_>,
    layers: &MultiLayer,
    options: &Options,
    names: &Names,
    out: &Path,
    stop: &StopFlag,
) -> Result<()> {
    check(source, layers)?;
    let dictionary = Dictionary::new(&source.file.sae, layers)?;
    let sae = dictionary.backend.sae();
    let mut writer = PackWriter::create(out)?;
    let corpus = corpus::encode(&dictionary, source.store, options.tokens, stop)?;
    let summaries = summarise_all(&corpus.table);
    let first = layers.layers[0].tap;
    let lowest = SaeFile { sae: sae.clone(), metadata: source.file.metadata.clone() };
    let source = &Source { file: &lowest, ..*source };
    let n_shards = features::write_features(
        source,
        options,
        (&corpus.table, &summaries),
        first.site,
        &mut writer,
        stop,
    )?;

    let n_texts = options.flow.texts.min(section::MAX_TEXTS);
    let passages = source.passages.get(..n_texts).unwrap_or(source.passages);
    let runs = texts::run(passages, source, &dictionary, &corpus, options.text_tokens)?;
    let described = described(&runs, options.flow.latents, sae.dims().n_latents);
    let effects = effects::measure(&runs, source.model, &dictionary, &described, options.flow.effects, stop)?;
    let mut entries = Vec::new();
    for ((i, run), effects) in runs.into_iter().enumerate().zip(effects) {
        let (entry, text, vectors) = run.finish(i, effects);
        writer.add(&entry.file, &text.write(&entry.file)?)?;
        writer.add(&entry.vectors, &vectors.write(sae.dims().d_in, &entry.vectors)?)?;
        entries.push(entry);
    }
    writer.add(section::FLOW, &FlowEntry::write_list(&entries)?)?;
    add_latents(source, &dictionary, &corpus, &described, &mut writer, stop)?;
    if layers.thresholds_per_layer {
        let thresholds = FlowThresholds::new(layers.thresholds.clone(), sae.dims().n_latents);
        writer.add(section::FLOW_THRESHOLDS, &thresholds.write()?)?;
    }
    // Its texts are those across layers; there are none at one layer.
    writer.add(shared::pack::TEXTS, &shared::pack::TextEntry::write_list(&[])?)?;
    let mut density = Density::new(sae.dims().n_latents);
    corpus.add_density(&mut density)?;
    let histogram = density.log10_histogram(HISTOGRAM.0, HISTOGRAM.1).into();
    let info = FlowInfo {
        layers: layers.layers.clone(),
        thresholds_per_layer: layers.thresholds_per_layer,
        n_described: described.len(),
        latents_per_lens: LATENTS_PER_LENS,
    };
    let n_tokens = corpus.table.n_encoded();
    writer.finish(manifest(source, options, names, (first, Some(info)), n_tokens, n_shards, histogram)?)
}

/// The figures of an evaluation that a pack shows: means over the layers; what is dead is never active at any.
pub(crate) fn metrics(report: &LayersReport) -> Metrics {
    let mean = |value: fn(&LayerReport) -> Option<f64>| {
        let values: Vec<f64> = report.layers.iter().filter_map(value).collect();
        #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (values.len() == report.layers.len() && !values.is_empty()).then_some(mean)
    };
    Metrics {
        l0: mean(|layer| Some(layer.l0)),
        fvu: mean(|layer| layer.fvu),
        delta_loss: mean(|layer| layer.splice.as_ref().map(|splice| splice.delta_loss)),
        dead_share: Some(report.spread.dead_share),
        ..Metrics::default()
    }
}

/// That dictionary, store and model belong together at every layer.
fn check(source: &Source<'_>, layers: &MultiLayer) -> Result<()> {
    ensure!(
        !layers.translated,
        "texts across layers are not made of a dictionary behind a lens; a layer of it is an autoencoder of its own, such as \
         runs/all#{}",
        layers.layers.first().map_or_else(String::new, |layer| layer.tap.to_string())
    );
    ensure!(!layers.layers.is_empty(), "the autoencoder names no layers");
    let dims = source.file.sae.dims();
    ensure!(dims.d_in == dims.d_out, "a transcoder of several layers has no flow");
    if source.eval.is_some() {
        bail!("the evaluation of one layer says nothing about all of them; use that of eval --layers");
    }
    if let Some(eval) = source.layers_eval {
        let same = eval.layers.iter().map(|layer| layer.tap).eq(layers.layers.iter().map(|layer| layer.tap));
        ensure!(
            same && eval.n_latents == dims.n_latents,
            "the evaluation is of other layers or another width"
        );
    }
    for layer in &layers.layers {
        let width = source.store.tap(layer.tap)?.width;
        let tap = layer.tap;
        ensure!(
            width == dims.d_in,
            "{tap} has vectors of width {width}, the autoencoder reads {}",
            dims.d_in
        );
    }
    features::check_model(source)
}

/// The latents with the most activation in the texts, over all layers; ascending.
fn described(runs: &[Run], most: usize, n_latents: usize) -> Vec<u32> {
    let mut sums = vec![0.0f64; n_latents];
    for (latents, values) in runs.iter().flat_map(|run| run.codes.iter()).flat_map(Codes::iter) {
        latents.iter().zip(values).for_each(|(&latent, &value)| sums[latent as usize] += f64::from(value));
    }
    let mut active: Vec<u32> = (0u32..).zip(&sums).filter(|(_, sum)| **sum > 0.0).map(|(l, _)| l).collect();
    active.sort_by(|&a, &b| sums[b as usize].total_cmp(&sums[a as usize]).then(a.cmp(&b)));
    active.truncate(most);
    active.sort_unstable();
    active
}

/// Writes what is known about the described latents, and their lens.
fn add_latents(
    source: &Source<'_>,
    dictionary: &Dictionary<'_>,
    corpus: &Corpus,
    described: &[u32],
    writer: &mut PackWriter,
    stop: &StopFlag,
) -> Result<()> {
    let (n_layers, n_latents) = (dictionary.layers.len(), corpus.layer_use.n_latents());
    let usage = || described.iter().map(|&latent| latent as usize);
    #[expect(clippy::cast_possible_truncation, reason = "sums are shown to a few digits, tokens fit 32 bits")]
    let latents = FlowLatents {
        latents: described.to_vec(),
        totals: usage().flat_map(|l| corpus.layer_use.totals(l)).map(|&total| total as f32).collect(),
        counts: usage().flat_map(|l| corpus.layer_use.counts(l)).map(|&count| count as u32).collect(),
        transitions: transitions::count(&corpus.layers, described, stop)?,
    };
    writer.add(section::FLOW_LATENTS, &latents.write(n_layers, n_latents)?)?;
    let lens = Lens::new(source.model, dictionary, corpus)?;
    let bar = progress::bar(described.len() as u64, "lens", "latents");
    for (shard, latents) in described.chunks(LATENTS_PER_LENS).enumerate() {
        stop.check()?;
        let (numbers, words) = lens.shard(latents)?.write(shard, n_layers).context("the lens")?;
        writer.add(&section::lens_numbers(shard), &numbers)?;
        writer.add(&section::lens_words(shard), &words)?;
        bar.inc(latents.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}
