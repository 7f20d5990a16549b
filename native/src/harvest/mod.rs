//! From text to a store: tokens through the language model, taps into shards.
//!
//! Two phases. First the text becomes token sequences, which are written (`sequences`). Then the sequences go through
//! the model batch by batch; the vectors of every tap are appended to a spool (`spool`), and when a bucket is full its
//! vectors are written as shards in shuffled order (`bucket`). The state between buckets is `partial`. A harvest stopped or
//! killed at any point goes on when it is run again, and ends with the bytes it would have had.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use shared::config::harvest::HarvestConfig;
use shared::config::{ConfigError, Count};
use shared::tap::TapPoint;

use crate::files;
use crate::model::{LoadedModel, ModelProvenance};
use crate::progress;
use crate::stop::{StopFlag, Stopped};
use crate::store::describe::{bytes, grouped};
use crate::store::manifest::TokenizerInfo;
use crate::store::{self, Manifest, Split, Store, Tokens};

mod bucket;
mod feed;
mod live;
mod output;
mod partial;
mod plan;
mod random;
mod reading;
mod sequences;
pub mod source;
mod space;
mod spool;
mod summary;
#[cfg(test)]
mod tests;
mod token_cache;

use bucket::Folders;
pub use live::Live;
pub use output::Output;
use partial::{Half, Partial};
use plan::{Bucket, Keep};
use source::{ActivationModel, Encode};
pub use summary::Summary;

/// The file that says how far an unfinished harvest is.
pub const PARTIAL_MANIFEST: &str = "manifest.partial.json";
/// The resolved configuration, kept in the store.
pub const CONFIG: &str = "harvest.toml";
/// The longest [`CONFIG`] read.
const LONGEST_CONFIG: u64 = 1 << 20;
/// The folder of unfinished work inside a store.
const PARTIAL: &str = "partial";

/// The model side of a harvest.
#[derive(Clone)]
pub struct Inputs<'a> {
    /// Text to tokens.
    pub encode: &'a dyn Encode,
    /// Tokens to activations.
    pub model: &'a dyn ActivationModel,
    /// What the manifest says of the tokenizer.
    pub tokenizer: TokenizerInfo,
    /// What it says of the model.
    pub provenance: ModelProvenance,
    /// The width of the residual stream.
    pub d_model: usize,
}

impl<'a> Inputs<'a> {
    /// The inputs a loaded model gives under `config`.
    ///
    /// # Errors
    /// If `separator` is no special token of the model.
    pub fn of(loaded: &'a LoadedModel, config: &HarvestConfig) -> Result<Self> {
        Ok(Self {
            encode: &loaded.tokenizer,
            model: &loaded.model,
            tokenizer: source::tokenizer_info(&loaded.tokenizer, config)?,
            provenance: loaded.provenance.clone(),
            d_model: loaded.model.spec().d_model,
        })
    }
}

/// Where time went.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    model: Duration,
    disk: Duration,
}

/// The finished store at `out`, if `config` already made it.
///
/// # Errors
/// If `out` holds a store, finished or not, of another configuration; names the keys that differ.
pub fn finished(config: &HarvestConfig, out: impl Into<Output>) -> Result<Option<Store>> {
    let out = &out.into();
    if let Some(partial) = Partial::read(out.work())? {
        refuse_other(config, &partial.config, out)?;
    }
    let place = out.place();
    if !place.holds(store::MANIFEST)? {
        return Ok(None);
    }
    let text = String::from_utf8(place.read(CONFIG, LONGEST_CONFIG)?).context(place.show(CONFIG))?;
    let made: HarvestConfig = shared::config::resolve(&text, &[]).with_context(|| place.show(CONFIG))?;
    refuse_other(config, &made, out)?;
    let store = Store::at(place)?;
    out.clean()?;
    Ok(Some(store))
}

fn refuse_other(config: &HarvestConfig, made: &HarvestConfig, out: &Output) -> Result<()> {
    let keys = partial::differing_keys(&config.as_begun(made), made)?;
    ensure!(
        keys.is_empty(),
        "{} holds a store made with other settings ({}): choose another place, or the same settings",
        out.show(),
        keys.join(", ")
    );
    Ok(())
}

/// Harvests into `out`, from the beginning or from where an earlier run was stopped.
///
/// # Errors
/// [`Stopped`] when `stop` was raised, with a resumable state left behind; else what went wrong with text, model or disk. What
/// was finished stays.
pub fn run(
    config: &HarvestConfig,
    out: impl Into<Output>,
    inputs: &Inputs<'_>,
    stop: &StopFlag,
) -> Result<Summary> {
    run_to(config, &out.into(), inputs, stop)
}

fn run_to(config: &HarvestConfig, out: &Output, inputs: &Inputs<'_>, stop: &StopFlag) -> Result<Summary> {
    config.validate()?;
    let started = Instant::now();
    let taps = taps(config, inputs.model)?;
    let values = taps.iter().map(|tap| tap.1).sum();
    let work = out.work();
    let folders = Folders { store: work.to_owned(), partial: work.join(PARTIAL) };
    let _lock = claim(&folders)?;
    out.claim()?;
    space::check_memory(config, &taps)?;
    let begun = Partial::read(work)?;
    // Sizes are settled when a store is begun, and written down with it.
    let mut settled = config.clone();
    if let Some(partial) = &begun {
        refuse_other(config, &partial.config, out)?;
        settled = config.as_begun(&partial.config);
    }
    settled.bucket_vectors = Some(Count(settled.bucket_rows()));
    settled.shard_vectors = Some(Count(settled.shard_rows(values)));
    let config = &settled;
    tracing::info!(
        "shards of at most {} vectors, {} over all taps",
        grouped(config.shard_rows(values)),
        bytes(config.shard_rows(values) * values as u64 * config.dtype.size() as u64)
    );
    let (mut partial, halves) = match begun {
        Some(partial) => {
            ensure!(
                partial.model == inputs.provenance && partial.taps == taps,
                "the unfinished store {} was made with another model than {}: it cannot be resumed",
                out.show(),
                config.model
            );
            let halves = reread(work, &partial)?;
            (partial, halves)
        }
        None => begin(config, work, inputs, taps, stop)?,
    };
    let run = Run { config, folders, out, inputs, stop, halves: &halves };
    let (manifest, times) = run.finish(&mut partial).map_err(|error| summary::explain(error, &partial))?;
    out.clean()?;
    Ok(Summary::new(&manifest, started.elapsed(), times.model, times.disk))
}

/// The taps `config` asks of `model`, ascending, with their widths.
fn taps(config: &HarvestConfig, model: &dyn ActivationModel) -> Result<Vec<(TapPoint, usize)>> {
    let longest = model.context_length();
    if config.sequence_length > longest {
        let expected = format!("at most {longest}, the model's context");
        return Err(ConfigError::value("sequence_length", config.sequence_length, expected).into());
    }
    let points = config.tap_points(model.n_layers())?;
    Ok(points.into_iter().map(|point| (point, model.width(point.site))).collect())
}

/// Makes the folder ours: it must be new, empty, or an unfinished store nobody else is writing.
fn claim(folders: &Folders) -> Result<File> {
    let out = &folders.store;
    let occupied = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    ensure!(
        !occupied || folders.partial.is_dir(),
        "{} is not empty and holds no unfinished store: choose another folder",
        out.display()
    );
    fs::create_dir_all(&folders.partial)
        .with_context(|| format!("cannot create {}", folders.partial.display()))?;
    let path = folders.partial.join("lock");
    let lock = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => sweep(out, 3).map(|()| lock),
        Err(TryLockError::WouldBlock) => bail!("another process is harvesting into {}", out.display()),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Removes the temporary files that a killed harvest left in the middle of writing.
fn sweep(folder: &Path, depth: usize) -> Result<()> {
    let context = || format!("cannot clean up {}", folder.display());
    for entry in fs::read_dir(folder).with_context(context)? {
        let entry = entry.with_context(context)?;
        if entry.file_type().with_context(context)?.is_dir() {
            if depth > 1 {
                sweep(&entry.path(), depth - 1)?;
            }
        } else if entry.file_name().to_string_lossy().starts_with(files::TEMPORARY) {
            fs::remove_file(entry.path()).with_context(context)?;
        }
    }
    Ok(())
}

/// The first phase: text to sequences, on disk, and the state that the second phase advances.
fn begin(
    config: &HarvestConfig,
    out: &Path,
    inputs: &Inputs<'_>,
    taps: Vec<(TapPoint, usize)>,
    stop: &StopFlag,
) -> Result<(Partial, [Tokens; 2])> {
    let corpus = sequences::corpus(config, inputs.encode, &inputs.tokenizer, stop)?;
    let half = |split: Split| -> Result<Half> {
        let tokens = &corpus.halves[split as usize];
        let file = partial::write_tokens(&store::tokens_path(out, split), tokens)?;
        Ok(Half { n_sequences: tokens.n_sequences(), tokens: file, buckets: Vec::new() })
    };
    let halves = [half(Split::Train)?, half(Split::HeldOut)?];
    let partial = Partial {
        version: store::manifest::VERSION,
        config: config.clone(),
        model: inputs.provenance.clone(),
        n_layers: inputs.model.n_layers(),
        d_model: inputs.d_model,
        tokenizer: inputs.tokenizer.clone(),
        taps,
        text: corpus.text,
        text_counts: corpus.counts,
        halves,
    };
    files::write_bytes(&out.join(CONFIG), shared::config::to_toml(config)?.as_bytes())?;
    partial.write(out)?;
    Ok((partial, corpus.halves))
}

fn reread(out: &Path, partial: &Partial) -> Result<[Tokens; 2]> {
    let read = |split: Split| {
        let half = &partial.halves[split as usize];
        store::read_tokens(out, split, &half.tokens, half.n_sequences, partial.config.sequence_length)
    };
    Ok([read(Split::Train)?, read(Split::HeldOut)?])
}

/// The second phase.
struct Run<'a> {
    config: &'a HarvestConfig,
    folders: Folders,
    out: &'a Output,
    inputs: &'a Inputs<'a>,
    stop: &'a StopFlag,
    halves: &'a [Tokens; 2],
}

impl Run<'_> {
    fn finish(&self, partial: &mut Partial) -> Result<(Manifest, Times)> {
        let (tokenizer, dropped) = (partial.tokenizer.clone(), partial.dropped());
        let keep = Keep { tokenizer: &tokenizer, dropped: &dropped };
        let plans = self.halves.each_ref().map(|half| plan::buckets(half, keep, self.config.bucket_rows()));
        self.out.send_shards(partial, self.stop)?;
        space::check(self.out, partial, &plans)?;
        let total: u64 = self.halves.iter().map(|half| half.ids.len() as u64).sum();
        let bar = progress::bar(total, "harvest", "tokens");
        let mut times = Times::default();
        for split in Split::ALL {
            for (index, bucket) in plans[split as usize].iter().enumerate() {
                if index < partial.halves[split as usize].buckets.len() {
                    self.skip(&bar, bucket.sequences.len());
                    continue;
                }
                self.fill(partial, keep, (split, index), bucket, &bar, &mut times)?;
                self.close(partial, keep, (split, index), bucket, &mut times)?;
            }
        }
        bar.finish_and_clear();
        let moments = bucket::total_moments(&self.folders.partial, plans[0].len(), &partial.taps)?;
        let manifest = partial.finish(&self.folders.store, &moments)?;
        self.out.finish(&manifest)?;
        Ok((manifest, times))
    }

    fn skip(&self, bar: &ProgressBar, sequences: usize) {
        bar.inc((sequences * self.config.sequence_length) as u64);
        // What an earlier run did says nothing about this run's speed.
        bar.reset_eta();
    }

    /// Runs the model over the bucket's sequences and spools its vectors.
    fn fill(
        &self,
        partial: &Partial,
        keep: Keep<'_>,
        (split, index): (Split, usize),
        bucket: &Bucket,
        bar: &ProgressBar,
        times: &mut Times,
    ) -> Result<()> {
        let tokens = &self.halves[split as usize];
        let start = bucket.sequences.start;
        let count = |n: usize| keep.count(tokens, start..(start + n).min(bucket.sequences.end));
        let mut spool = spool::Spool::open(
            &self.folders.partial,
            &partial.taps,
            self.config.dtype,
            (split, index),
            count,
        )?;
        // Batches begin where they would have begun without a stop, so that their arithmetic is the same.
        self.skip(bar, spool.n_sequences());
        let feed = feed::Feed { model: self.inputs.model, tokens, keep, taps: &partial.taps };
        while start + spool.n_sequences() < bucket.sequences.end {
            if self.stop.is_raised() {
                spool.save()?;
                bar.finish_and_clear();
                return Err(Stopped.into());
            }
            let first = start + spool.n_sequences();
            let end = (first + self.config.batch).min(bucket.sequences.end);
            let (before, mut disk) = (Instant::now(), Duration::ZERO);
            feed.run(first..end, &mut |tap, value, rows| {
                let now = Instant::now();
                let place = || {
                    let (point, _) = partial.taps[tap];
                    format!("{point}, {} sequences {first}..{end}", split.folder())
                };
                spool.append(tap, value, rows, self.config.dtype).with_context(place)?;
                disk += now.elapsed();
                Ok(())
            })?;
            times.model += before.elapsed().saturating_sub(disk);
            times.disk += disk;
            spool.advance(end - first)?;
            bar.inc(((end - first) * self.config.sequence_length) as u64);
            bar.set_message(summary::shares(times.model, times.disk));
        }
        spool.save()
    }

    /// Writes the full bucket as shards and records it.
    fn close(
        &self,
        partial: &mut Partial,
        keep: Keep<'_>,
        (split, index): (Split, usize),
        bucket: &Bucket,
        times: &mut Times,
    ) -> Result<()> {
        let before = Instant::now();
        let layout = plan::layout(&self.halves[split as usize], keep, bucket, self.config.seed, split, index);
        let first = partial.halves[split as usize].n_shards();
        let (shards, moments) =
            bucket::write(&self.folders, self.config, &partial.taps, &layout, split, first)?;
        if split == Split::Train {
            bucket::save_moments(&self.folders.partial, index, &partial.taps, &moments)?;
        }
        partial.halves[split as usize].buckets.push(shards);
        partial.write(&self.folders.store)?;
        spool::clear(&self.folders.partial, &partial.taps)?;
        self.out.send_shards(partial, self.stop)?;
        times.disk += before.elapsed();
        Ok(())
    }
}
