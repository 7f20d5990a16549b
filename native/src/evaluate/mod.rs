//! Measuring a trained autoencoder on held-out activations and spliced into its language model.
//!
//! [`reconstruction`] owns what needs only activation vectors (L0, FVU, dead share, density),
//! [`splice`] what needs the language model (delta loss, loss recovered); [`report`] prints both and
//! [`plot`] draws the density histogram. Definitions follow Gemma Scope (arXiv 2408.05147 §4).

pub mod plot;
pub mod reconstruction;
pub mod report;
pub mod splice;

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
use crate::store::{Split, Store};
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
    let known = || taps.iter().map(|t| t.point.to_string()).collect::<Vec<_>>().join(", ");
    let point = match (file.metadata.tap, &taps[..]) {
        (Some(point), _) => point,
        (None, [only]) => only.point,
        (None, _) => {
            bail!("the autoencoder does not say which tap it reads, and the store has several: {}", known())
        }
    };
    let tap = store
        .tap(point)
        .with_context(|| format!("the autoencoder reads {point}; the store has {}", known()))?;
    let d_in = file.sae.dims().d_in;
    if tap.width != d_in {
        bail!("{point} has vectors of width {}, the autoencoder reads {d_in}", tap.width);
    }
    Ok(point)
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
    let point = tap_of(file, store)?;
    let dims = file.sae.dims();
    if dims.d_in != dims.d_out {
        bail!(
            "the autoencoder writes vectors of width {} where it read {}: transcoders cannot be spliced back",
            dims.d_out,
            dims.d_in
        );
    }
    let backend = CpuBackend::new(file.sae.clone());
    let subject = Subject { backend, limit: InputLimit::of(file), point };
    let (reconstruction, n_outliers) = reconstruct(&subject, store, options, stop)?;
    let splice = model.map(|model| splice_all(&subject, store, model, options, stop)).transpose()?;
    Ok(EvalReport {
        version: 1,
        model: store.manifest().model.name.clone(),
        tap: point,
        d_in: dims.d_in,
        n_latents: dims.n_latents,
        options: options.clone(),
        max_input_norm: subject.limit.norm(),
        n_outliers,
        reconstruction,
        splice,
    })
}

/// The autoencoder under test, and the vectors it speaks about.
struct Subject {
    backend: CpuBackend,
    limit: InputLimit,
    point: TapPoint,
}

/// The report, and how many vectors were left out for their norm.
fn reconstruct(
    subject: &Subject,
    store: &Store,
    options: &Options,
    stop: &StopFlag,
) -> Result<(ReconstructionReport, u64)> {
    let held_out = store.n_vectors(Split::HeldOut);
    if held_out == 0 {
        bail!("the store has no held-out vectors; harvest with a held-out share");
    }
    let total = held_out.max(options.density_tokens.min(held_out + store.n_vectors(Split::Train)));
    let bar = progress::bar(total, "encode", "vectors");
    let mut meter = ReconstructionMeter::new(&subject.backend);
    let mut n_outliers = 0;
    for split in [Split::HeldOut, Split::Train] {
        for index in 0..store.n_shards(split) {
            if split == Split::Train && meter.n_vectors() >= options.density_tokens {
                break;
            }
            let shard = store.read_shard(subject.point, split, index)?;
            for rows in shard.vectors.chunks(ENCODE_ROWS * shard.width.max(1)) {
                if stop.is_raised() {
                    return Err(Stopped.into());
                }
                let all = Rows::new(rows, shard.width)?;
                let within = subject.limit.within(all);
                let rows = Rows::new(&within, shard.width)?;
                n_outliers += (all.n_rows() - rows.n_rows()) as u64;
                match split {
                    Split::HeldOut => meter.add_held_out(rows)?,
                    Split::Train if meter.n_vectors() >= options.density_tokens => break,
                    Split::Train => meter.add_for_density(rows)?,
                }
                bar.set_position(meter.n_vectors());
            }
        }
    }
    bar.finish_and_clear();
    Ok((meter.finish()?, n_outliers))
}

fn splice_all(
    subject: &Subject,
    store: &Store,
    model: &LoadedModel,
    options: &Options,
    stop: &StopFlag,
) -> Result<SpliceReport> {
    let tokens = store.tokens(Split::HeldOut)?;
    let length = tokens.sequence_length;
    let kept = splice::kept_positions(&tokens, |position, id| store.manifest().keeps(position, id));
    let n = options.sequences.min(tokens.n_sequences());
    let bar = progress::bar((n * length) as u64, "splice", "tokens");
    let mut meter = SpliceMeter::new(&subject.backend, &model.model, subject.point, subject.limit);
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
