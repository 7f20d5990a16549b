//! What each latent responds to, collected into a pack.
//!
//! The data goes through these files in order: vectors of whole sequences are encoded into a [`table`];
//! [`select`] chooses examples; [`geometry`] finds neighbours and logits; [`describe`] makes shards of
//! them; [`texts`] runs the bundled passages through the model; [`write`] lays the pack out on disk.

pub mod describe;
pub mod geometry;
pub mod select;
pub mod table;
pub mod texts;
pub mod write;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::metrics::Density;
use shared::pack::{self, Decoder, Encoder, Index};
use shared::tap::{Site, TapPoint};

use crate::cpu::CpuBackend;
use crate::evaluate::layers::LayersReport;
use crate::evaluate::{self, ENCODE_ROWS, EvalReport};
use crate::flow::{self, FlowOptions};
use crate::input_limit::InputLimit;
use crate::model::LoadedModel;
use crate::progress;
use crate::sae_files::SaeFile;
use crate::stop::{StopFlag, Stopped};
use crate::store::{Split, Store};
use describe::{Describer, Summary, summarise};
use geometry::Extremes;
use select::Amounts;
use table::{ActivationTable, TableBuilder};
use texts::Passage;
use write::PackWriter;

/// Most active (token, latent) pairs held in memory; 24 bytes each while they are regrouped.
const MOST_ACTIVE: u64 = 1 << 26;
/// Shards made at a time, so that memory does not grow with the dictionary.
const SHARDS_AT_A_TIME: usize = 256;
/// Lowest decade and bins a decade of the density histogram.
pub(crate) const HISTOGRAM: (i32, u32) = (-7, 4);

/// What to collect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Training tokens to encode, in whole sequences.
    pub tokens: u64,
    /// Examples of each latent.
    pub amounts: Amounts,
    /// Latents in a feature shard.
    pub latents_per_shard: usize,
    /// Most tokens of a bundled text.
    pub text_tokens: usize,
    /// Seed of the random examples.
    pub seed: u64,
    /// What to collect of a multi-layer autoencoder.
    pub flow: FlowOptions,
}

/// What a pack is made from.
#[derive(Debug)]
pub struct Source<'a> {
    /// The autoencoder.
    pub file: &'a SaeFile,
    /// The activations it was trained on.
    pub store: &'a Store,
    /// The language model they came from.
    pub model: &'a LoadedModel,
    /// Passages to bundle.
    pub passages: &'a [Passage],
    /// An evaluation to quote.
    pub eval: Option<&'a EvalReport>,
    /// An evaluation of all layers to quote, of a multi-layer autoencoder.
    pub layers_eval: Option<&'a LayersReport>,
}

/// Names for people; what is absent is made from the data.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// Short name.
    pub name: Option<String>,
    /// Title.
    pub title: Option<String>,
    /// Name of the corpus.
    pub corpus: Option<String>,
}

/// Collects everything and writes the pack at `out`, which appears whole or not at all.
///
/// # Errors
/// If inputs do not fit each other, cannot be read, or the disk refuses.
pub fn collect(
    source: &Source<'_>,
    options: &Options,
    names: &Names,
    out: &Path,
    stop: &StopFlag,
) -> Result<()> {
    if let Some(layers) = &source.file.metadata.layers {
        return flow::collect(source, layers, options, names, out, stop);
    }
    let point = check(source)?;
    let mut writer = PackWriter::create(out)?;
    let (table, density) = encode(source, point, options, stop)?;
    let summaries = summarise_all(&table);
    let n_shards = write_features(source, options, (&table, &summaries), point.site, &mut writer, stop)?;
    let store = source.store.manifest();
    let mut entries = Vec::new();
    let place = (point, InputLimit::of(source.file));
    for (entry, text) in texts::capture(source.passages, source.model, store, place, options.text_tokens)? {
        writer.add(&entry.file, &text.write(&entry.file)?)?;
        entries.push(entry);
    }
    writer.add(pack::TEXTS, &pack::TextEntry::write_list(&entries)?)?;
    let histogram = density.log10_histogram(HISTOGRAM.0, HISTOGRAM.1).into();
    let n_tokens = table.n_encoded();
    writer.finish(write::manifest(source, options, names, (point, None), n_tokens, n_shards, histogram)?)
}

/// Counts and extremes of every latent.
pub(crate) fn summarise_all(table: &ActivationTable) -> Vec<Summary> {
    (0..table.n_latents()).into_par_iter().map(|latent| summarise(table, latent)).collect()
}

/// Writes the autoencoder, the index and the features of all its latents; returns the number of shards.
pub(crate) fn write_features(
    source: &Source<'_>,
    options: &Options,
    (table, summaries): (&ActivationTable, &[Summary]),
    site: Site,
    writer: &mut PackWriter,
    stop: &StopFlag,
) -> Result<usize> {
    let sae = &source.file.sae;
    writer.add(pack::ENCODER, &Encoder::of(sae).write()?)?;
    writer.add(pack::DECODER, &Decoder::of(sae).write()?)?;
    // Heads write into the residual stream only through W_O, and what the MLP reads is not written to it at all:
    // their own directions have no direct logits.
    let logits = match site {
        Site::Attn | Site::MlpIn => None,
        Site::Embed | Site::Mlp | Site::Resid => geometry::logits(sae, &source.model.model, pack::TOP_K)?,
    };
    let index = index(source.model, summaries, logits.as_deref());
    let (numbers, words) = index.write()?;
    writer.add(pack::INDEX_NUMBERS, &numbers)?;
    writer.add(pack::INDEX_WORDS_FILE, &words)?;
    let neighbours = geometry::neighbours(sae, pack::TOP_K)?;
    let describer = Describer {
        table,
        tokenizer: &source.model.tokenizer,
        amounts: &options.amounts,
        seed: options.seed,
        summaries,
        neighbours: &neighbours,
        logits: logits.as_deref(),
    };
    shards(&describer, options.latents_per_shard, writer, stop)
}

/// That autoencoder, store, model and evaluation belong together.
fn check(source: &Source<'_>) -> Result<TapPoint> {
    let point = evaluate::tap_of(source.file, source.store)?;
    check_model(source)?;
    if let Some(eval) = source.eval {
        let n_latents = source.file.sae.dims().n_latents;
        ensure!(
            eval.tap == point && eval.n_latents == n_latents,
            "the evaluation is of {} with {} latents, the autoencoder reads {point} with {n_latents}",
            eval.tap,
            eval.n_latents
        );
    }
    Ok(point)
}

/// That the model is the one the store was made with.
pub(crate) fn check_model(source: &Source<'_>) -> Result<()> {
    let (spec, store) = (source.model.model.spec(), source.store.manifest());
    ensure!(
        spec.n_layers == store.n_layers && spec.d_model == store.d_model,
        "the model has {} layers of width {}, the store was made with {} of {}",
        spec.n_layers,
        spec.d_model,
        store.n_layers,
        store.d_model
    );
    let (given, harvested) = (&source.model.provenance, &store.model);
    if given.sha256 != harvested.sha256 {
        bail!("the model {} is not the one the store was made with ({})", given.name, harvested.name);
    }
    Ok(())
}

/// Encodes the training vectors of the first sequences and regroups their codes.
fn encode(
    source: &Source<'_>,
    point: TapPoint,
    options: &Options,
    stop: &StopFlag,
) -> Result<(ActivationTable, Density)> {
    let (store, sae, limit) = (source.store, &source.file.sae, InputLimit::of(source.file));
    let backend = CpuBackend::new(sae.clone());
    let n_latents = sae.dims().n_latents;
    let tokens = store.tokens(Split::Train)?;
    let length = tokens.sequence_length;
    let affordable = affordable_tokens(store, point, &backend)?;
    let wanted = options.tokens.min(affordable);
    if wanted < options.tokens.min(tokens.ids.len() as u64) {
        tracing::warn!("latents are so often active that only {wanted} tokens fit into memory");
    }
    let sequences = usize::try_from(wanted / length as u64)?.min(tokens.n_sequences());
    ensure!(sequences > 0, "{wanted} tokens are less than one sequence of {length}");
    let mut ids = tokens.ids;
    ids.truncate(sequences * length);
    let mut builder = TableBuilder::new(ids, length, n_latents)?;
    let mut density = Density::new(n_latents);
    let bar = progress::bar(store.n_vectors(Split::Train), "encode", "vectors");
    for shard in 0..store.n_shards(Split::Train) {
        let shard = store.read_shard(point, Split::Train, shard)?;
        let places = || shard.sequences.iter().zip(&shard.positions);
        let kept = |row: usize| limit.keeps(&shard.vectors[row * shard.width..(row + 1) * shard.width]);
        let inside: Vec<(usize, u32)> = places()
            .enumerate()
            .filter(|&(row, _)| kept(row))
            .filter_map(|(row, (&s, &p))| Some((row, builder.token(s, p)?)))
            .collect();
        for chunk in inside.chunks(ENCODE_ROWS) {
            if stop.is_raised() {
                return Err(Stopped.into());
            }
            let width = shard.width;
            let rows: Vec<f32> = chunk
                .iter()
                .flat_map(|&(row, _)| &shard.vectors[row * width..(row + 1) * width])
                .copied()
                .collect();
            let codes = backend.encode(Rows::new(&rows, width)?)?;
            density.update(&codes)?;
            builder.push(chunk.iter().map(|c| c.1).collect(), codes)?;
        }
        bar.inc(shard.sequences.len() as u64);
    }
    bar.finish_and_clear();
    let table = builder.finish()?;
    ensure!(table.n_encoded() > 0, "the store has no training vectors");
    Ok((table, density))
}

/// How many tokens fit [`MOST_ACTIVE`], judged by the first vectors of the store.
fn affordable_tokens(store: &Store, point: TapPoint, backend: &CpuBackend) -> Result<u64> {
    ensure!(store.n_shards(Split::Train) > 0, "the store has no training vectors");
    let shard = store.read_shard(point, Split::Train, 0)?;
    let some = shard.vectors.len().min(ENCODE_ROWS * shard.width);
    let codes = backend.encode(Rows::new(&shard.vectors[..some], shard.width)?)?;
    // A fifth more than the sample says, and at least one latent a token.
    let active = (codes.n_active() as u64).max(codes.n_rows() as u64).max(1) * 6 / 5;
    Ok(MOST_ACTIVE * codes.n_rows() as u64 / active)
}

fn index(model: &LoadedModel, summaries: &[Summary], logits: Option<&[Extremes]>) -> Index {
    let piece = |id: &u32| model.tokenizer.piece(*id);
    let top = |latent: usize| -> Vec<String> {
        let ends = logits.map_or(&[][..], |all| &all[latent].0);
        ends.iter().take(pack::INDEX_WORDS).map(|(id, _)| piece(id)).collect()
    };
    Index {
        density: summaries.iter().map(|s| s.density).collect(),
        max_activation: summaries.iter().map(|s| s.max).collect(),
        mean_activation: summaries.iter().map(|s| s.mean).collect(),
        top_tokens: summaries.iter().map(|s| s.top_tokens.iter().map(piece).collect()).collect(),
        top_logits: (0..summaries.len()).map(top).collect(),
    }
}

/// Makes and writes all shards; returns how many.
fn shards(
    describer: &Describer<'_>,
    per_shard: usize,
    writer: &mut PackWriter,
    stop: &StopFlag,
) -> Result<usize> {
    ensure!(per_shard > 0, "a shard must hold at least one latent");
    let n_latents = describer.table.n_latents();
    let n_shards = n_latents.div_ceil(per_shard);
    let bar = progress::bar(n_latents as u64, "features", "latents");
    for first in (0..n_shards).step_by(SHARDS_AT_A_TIME) {
        if stop.is_raised() {
            return Err(Stopped.into());
        }
        let some = first..(first + SHARDS_AT_A_TIME).min(n_shards);
        let made: Vec<Result<(Vec<u8>, Vec<u8>)>> = some
            .clone()
            .into_par_iter()
            .map(|shard| {
                let latents = shard * per_shard..((shard + 1) * per_shard).min(n_latents);
                Ok(describer.shard(latents).write(shard, n_latents)?)
            })
            .collect();
        for (shard, files) in some.zip(made) {
            let (numbers, words) = files.with_context(|| format!("feature shard {shard}"))?;
            writer.add(&pack::shard_numbers(shard), &numbers)?;
            writer.add(&pack::shard_words(shard), &words)?;
            bar.set_position(((shard + 1) * per_shard).min(n_latents) as u64);
        }
    }
    bar.finish_and_clear();
    Ok(n_shards)
}
