//! Measuring a trained autoencoder on held-out activations and spliced into its language model.
//!
//! [`reconstruction`] owns what needs only activation vectors (L0, FVU, dead share, density),
//! [`splice`] what needs the language model (delta loss, loss recovered); [`report`] prints both,
//! [`plot`] and [`lines`] draw, and [`compare`] puts several side by side; [`layers`] is for multi-layer SAEs. Definitions follow
//! Gemma Scope (arXiv 2408.05147 §4).

pub mod compare;
pub mod layers;
pub mod lines;
pub mod plot;
pub mod reconstruction;
pub mod report;
pub mod splice;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::pack::Metrics;
use shared::tap::TapPoint;

use crate::cpu::CpuBackend;
use crate::input_limit::InputLimit;
use crate::model::LoadedModel;
use crate::progress;
use crate::sae_files::SaeFile;
use crate::stop::{StopFlag, Stopped};
use crate::store::{Shard, Split, Store};
use reconstruction::{ReconstructionMeter, ReconstructionReport};
use splice::{SpliceMeter, SpliceReport};

/// Rows encoded at a time: enough to fill all cores, little enough to stay in cache with their codes.
pub(crate) const ENCODE_ROWS: usize = 2048;
/// Tokens the language model runs at a time.
const TOKENS_PER_PASS: usize = 2048;

/// How much to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Held-out sequences run through the language model three times.
    pub sequences: usize,
    /// Vectors encoded for densities and the dead share: the held-out ones first, then training ones.
    pub density_tokens: u64,
}

/// Everything measured about one autoencoder, as written to `eval.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalReport {
    /// Version of this report's fields.
    pub version: u32,
    /// Name of the language model the activations are from.
    pub model: String,
    /// Where the autoencoder reads.
    pub tap: TapPoint,
    /// What it reconstructs, where that is not what it reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<TapPoint>,
    /// Width of its input.
    pub d_in: usize,
    /// Number of latents.
    pub n_latents: usize,
    /// What was asked for.
    pub options: Options,
    /// Vectors longer than this were not trained on and are left out here too; absent when there is no limit.
    pub max_input_norm: Option<f64>,
    /// Vectors left out for their norm, of the held-out ones and those read for densities.
    pub n_outliers: u64,
    /// On activation vectors alone.
    pub reconstruction: ReconstructionReport,
    /// Spliced into the language model; absent when no model was given.
    pub splice: Option<SpliceReport>,
}

impl EvalReport {
    /// The figures a pack shows.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let spliced = |f: fn(&SpliceReport) -> f64| self.splice.as_ref().map(f);
        Metrics {
            l0: Some(self.reconstruction.l0),
            fvu: self.reconstruction.fvu,
            dead_share: Some(self.reconstruction.dead_share),
            delta_loss: spliced(|s| s.delta_loss),
            loss_recovered: self.splice.as_ref().and_then(|s| s.loss_recovered),
            ce_clean: spliced(|s| s.ce_clean),
            ce_spliced: spliced(|s| s.ce_spliced),
            ce_zero: spliced(|s| s.ce_zero),
        }
    }
}

/// The tap of `store` that `file`'s autoencoder reads: the one it names, else the only one there is.
///
/// # Errors
/// If the store has no such tap, several to choose from, or vectors of another width.
pub fn tap_of(file: &SaeFile, store: &Store) -> Result<TapPoint> {
    let taps = &store.manifest().taps;
    let point = match (file.metadata.tap, &taps[..]) {
        (Some(point), _) => point,
        (None, [only]) => only.point,
        (None, _) => bail!(
            "the autoencoder does not say which tap it reads, and the store has several: {}",
            taps.iter().map(|t| t.point.to_string()).collect::<Vec<_>>().join(", ")
        ),
    };
    check_tap(store, point, file.sae.dims().d_in, "reads")?;
    Ok(point)
}

fn check_tap(store: &Store, point: TapPoint, width: usize, does: &str) -> Result<()> {
    let known = || store.manifest().taps.iter().map(|t| t.point.to_string()).collect::<Vec<_>>().join(", ");
    let tap = store
        .tap(point)
        .with_context(|| format!("the autoencoder {does} {point}; the store has {}", known()))?;
    if tap.width != width {
        bail!("{point} has vectors of width {}, the autoencoder {does} {width}", tap.width);
    }
    Ok(())
}

/// Measures `file`'s autoencoder on the held-out part of `store`, and in `model` when there is one.
///
/// # Errors
/// If the store cannot be read, does not fit autoencoder and model, or holds too little.
pub fn evaluate(
    file: &SaeFile,
    store: &Store,
    model: Option<&LoadedModel>,
    options: &Options,
    stop: &StopFlag,
) -> Result<EvalReport> {
    let mut reports = evaluate_all(std::slice::from_ref(file), store, model, options, stop)?;
    reports.pop().context("nothing was measured")
}

/// [`evaluate`] for any number of autoencoders: the store is read once, and the untouched model runs once. Those that read the same
/// tap are measured on the same vectors: what one of them leaves out for its norm, all do.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_all(
    files: &[SaeFile],
    store: &Store,
    model: Option<&LoadedModel>,
    options: &Options,
    stop: &StopFlag,
) -> Result<Vec<EvalReport>> {
    let mut subjects = files.iter().map(|file| Subject::new(file, store)).collect::<Result<Vec<_>>>()?;
    let mut limits: BTreeMap<TapPoint, InputLimit> = BTreeMap::new();
    for subject in &subjects {
        let limit = limits.entry(subject.input).or_insert(InputLimit::NONE);
        *limit = limit.stricter(subject.limit);
    }
    for subject in &mut subjects {
        subject.limit =
            limits.get(&subject.input).map_or(subject.limit, |limit| limit.stricter(subject.limit));
    }
    let reconstructions = reconstruct(&subjects, store, options, stop)?;
    let splices = match model {
        Some(model) => splice_all(&subjects, store, model, options, stop)?.into_iter().map(Some).collect(),
        None => vec![None; subjects.len()],
    };
    let reports = subjects.iter().zip(reconstructions).zip(splices);
    Ok(reports
        .map(|((subject, measured), splice)| subject.report(store, options, measured, splice))
        .collect())
}

/// The autoencoder under test, and the vectors it speaks about.
#[derive(Debug)]
pub struct Subject {
    backend: CpuBackend,
    limit: InputLimit,
    input: TapPoint,
    output: TapPoint,
}

impl Subject {
    fn new(file: &SaeFile, store: &Store) -> Result<Self> {
        let (input, dims) = (tap_of(file, store)?, file.sae.dims());
        let output = file.metadata.target.unwrap_or(input);
        check_tap(store, output, dims.d_out, "writes")?;
        Ok(Self { backend: CpuBackend::new(file.sae.clone()), limit: InputLimit::of(file), input, output })
    }

    fn report(
        &self,
        store: &Store,
        options: &Options,
        (reconstruction, n_outliers): (ReconstructionReport, u64),
        splice: Option<SpliceReport>,
    ) -> EvalReport {
        let dims = self.backend.sae().dims();
        EvalReport {
            version: 1,
            model: store.manifest().model.name.clone(),
            tap: self.input,
            target: (self.output != self.input).then_some(self.output),
            d_in: dims.d_in,
            n_latents: dims.n_latents,
            options: options.clone(),
            max_input_norm: self.limit.norm(),
            n_outliers,
            reconstruction,
            splice,
        }
    }

    /// Reconstructions of those rows of `x` that are not kept.
    fn reconstruct(&self, x: Rows<'_>, kept: &[bool]) -> Result<Vec<f32>> {
        let rows = x.iter().zip(kept).filter(|(_, kept)| !**kept).flat_map(|(row, _)| row);
        let rows: Vec<f32> = rows.copied().collect();
        let rows = Rows::new(&rows, x.width())?;
        Ok(self.backend.decode(rows, &self.backend.encode(rows)?)?)
    }
}

/// The report of each, and how many vectors were left out for their norm.
fn reconstruct(
    subjects: &[Subject],
    store: &Store,
    options: &Options,
    stop: &StopFlag,
) -> Result<Vec<(ReconstructionReport, u64)>> {
    let held_out = store.n_vectors(Split::HeldOut);
    if held_out == 0 {
        bail!("the store has no held-out vectors; harvest with a held-out share");
    }
    let total = held_out.max(options.density_tokens.min(held_out + store.n_vectors(Split::Train)));
    let bar = progress::bar(total * subjects.len() as u64, "encode", "vectors");
    let mut meters: Vec<_> =
        subjects.iter().map(|s| (s, ReconstructionMeter::new(&s.backend), 0u64)).collect();
    for split in [Split::HeldOut, Split::Train] {
        let full = |meter: &ReconstructionMeter<'_>| {
            split == Split::Train && meter.n_vectors() >= options.density_tokens
        };
        for index in 0..store.n_shards(split) {
            let mut shards: BTreeMap<TapPoint, Shard> = BTreeMap::new();
            for (subject, meter, n_outliers) in meters.iter_mut().filter(|(_, meter, _)| !full(meter)) {
                let wanted = [Some(subject.input), (split == Split::HeldOut).then_some(subject.output)];
                for point in wanted.into_iter().flatten() {
                    if let Entry::Vacant(entry) = shards.entry(point) {
                        entry.insert(store.read_shard(point, split, index)?);
                    }
                }
                let x = shard_rows(&shards, subject.input)?;
                for first in (0..x.n_rows()).step_by(ENCODE_ROWS) {
                    if stop.is_raised() {
                        return Err(Stopped.into());
                    }
                    let end = (first + ENCODE_ROWS).min(x.n_rows());
                    let all = x.slice(first, end);
                    let within = subject.limit.within(all);
                    let rows = Rows::new(&within, x.width())?;
                    *n_outliers += (all.n_rows() - rows.n_rows()) as u64;
                    let before = meter.n_vectors();
                    match split {
                        Split::HeldOut => {
                            let y = shard_rows(&shards, subject.output)?.slice(first, end);
                            let kept = y.iter().zip(all.iter()).filter(|(_, x)| subject.limit.keeps(x));
                            let kept: Vec<f32> = kept.flat_map(|(y, _)| y).copied().collect();
                            meter.add_held_out(rows, Rows::new(&kept, y.width())?)?;
                        }
                        Split::Train if full(meter) => break,
                        Split::Train => meter.add_for_density(rows)?,
                    }
                    bar.inc(meter.n_vectors() - before);
                }
            }
        }
    }
    bar.finish_and_clear();
    meters.into_iter().map(|(_, meter, n_outliers)| Ok((meter.finish()?, n_outliers))).collect()
}

fn shard_rows(shards: &BTreeMap<TapPoint, Shard>, point: TapPoint) -> Result<Rows<'_>> {
    let shard = shards.get(&point).with_context(|| format!("{point} was not read"))?;
    Ok(Rows::new(&shard.vectors, shard.width)?)
}

fn splice_all(
    subjects: &[Subject],
    store: &Store,
    model: &LoadedModel,
    options: &Options,
    stop: &StopFlag,
) -> Result<Vec<SpliceReport>> {
    let tokens = store.tokens(Split::HeldOut)?;
    let length = tokens.sequence_length;
    let kept = splice::kept_positions(&tokens, |position, id| store.manifest().keeps(position, id));
    let n = options.sequences.min(tokens.n_sequences());
    let bar = progress::bar((n * length) as u64, "splice", "tokens");
    let mut meter = SpliceMeter::new(&model.model, subjects);
    let per_pass = (TOKENS_PER_PASS / length.max(1)).max(1);
    for first in (0..n).step_by(per_pass) {
        if stop.is_raised() {
            return Err(Stopped.into());
        }
        let range = first * length..(first + per_pass).min(n) * length;
        meter.add(&tokens.ids[range.clone()], length, &kept[range.clone()])?;
        bar.set_position(range.end as u64);
    }
    bar.finish_and_clear();
    meter.finish()
}
