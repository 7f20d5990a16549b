//! Training one autoencoder, or many from one stream of batches.
//!
//! Every autoencoder has its own folder, log and checkpoints. The data is read once for all of them. One that fails stops
//! alone; the others go on. After a kill they may stand at different batches: the stream begins again at the earliest, and
//! those ahead of it wait.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::ProgressBar;
use shared::config::train::{Normalise, TrainConfig};

use super::checkpoint;
use super::engine::{Batch, SharedDevice};
use super::finish::{Summary, finished};
use super::normalise::Scaling;
use super::order::{Batches, Pairs, Position};
use super::room::Room;
use super::run::{Beginning, Run};
use super::shards::Shards;
use super::source::{ActivationSource, Wiring};
use crate::cuda::Feed;
use crate::progress;
use crate::stop::{StopFlag, Stopped};

/// An autoencoder to train.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What it is called in messages.
    pub name: String,
    /// Its configuration.
    pub config: TrainConfig,
    /// Its folder.
    pub out: PathBuf,
}

/// Trains on `source` into folder `out`, going on where an interrupted run stopped.
///
/// # Errors
/// If data cannot be read, the folder belongs to another run, too many batches are bad, the disk refuses, or
/// a stop was asked for ([`Stopped`], after a checkpoint).
pub fn run(
    source: &Arc<dyn ActivationSource>,
    config: &TrainConfig,
    out: &Path,
    stop: &StopFlag,
) -> Result<Summary> {
    let name = out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let job = Job { name, config: config.clone(), out: out.to_owned() };
    let mut results = run_all(source, &[job], stop)?;
    results.pop().unwrap_or_else(|| Err(anyhow!("nothing was trained")))
}

/// Trains all `jobs` on one pass over the data; returns how each ended, in their order.
///
/// Those that read the same taps in batches of the same size share every batch; all share what is read from the source.
///
/// # Errors
/// If the jobs disagree about the order of the data, data cannot be read, or a stop was asked for ([`Stopped`], after
/// checkpoints).
pub fn run_all(
    source: &Arc<dyn ActivationSource>,
    jobs: &[Job],
    stop: &StopFlag,
) -> Result<Vec<Result<Summary>>> {
    run_all_on(source, jobs, None, stop)
}

/// [`run_all`] on a device, or on the processor.
///
/// # Errors
/// As [`run_all`], or if the device fails.
pub fn run_all_on(
    source: &Arc<dyn ActivationSource>,
    jobs: &[Job],
    device: Option<&SharedDevice>,
    stop: &StopFlag,
) -> Result<Vec<Result<Summary>>> {
    check(jobs)?;
    // Before anything takes memory of the device.
    let feed = |device: &SharedDevice| {
        let placement = Room::of(jobs, &**source).placement(device.memory()?.0);
        anyhow::Ok(Arc::new(Feed::new(device, placement)))
    };
    let feed = device.map(feed).transpose()?;
    let mut results: Vec<Option<Result<Summary>>> = Vec::new();
    let (mut runs, mut beginnings) = (Vec::new(), BTreeMap::new());
    for (index, job) in jobs.iter().enumerate() {
        match begin(source, job, device, &mut beginnings) {
            Ok((summary, run)) => {
                results.push(summary.map(Ok));
                runs.extend(run.map(|(wiring, run)| Member { job: index, wiring, run }));
            }
            Err(error) if error.is::<Stopped>() => return Err(error),
            Err(error) => results.push(Some(Err(error))),
        }
    }
    Suite { source, jobs, runs, results, feed }.train(stop)
}

/// What runs must have in common to share how their data were measured.
type Measured = (Wiring, u64, Normalise);

/// The summary of a job that is finished, or else its run.
#[expect(clippy::type_complexity, reason = "one or the other")]
fn begin<'a>(
    source: &'a Arc<dyn ActivationSource>,
    job: &'a Job,
    device: Option<&SharedDevice>,
    beginnings: &mut BTreeMap<Measured, Beginning>,
) -> Result<(Option<Summary>, Option<(Wiring, Run<'a>)>)> {
    let wiring = Wiring::of(&job.config, &**source)?;
    let identity = checkpoint::identity(&job.config, &wiring.provenance(&**source))?;
    if let Some(summary) = finished(&job.out, &identity)? {
        tracing::info!("{} is already trained with this configuration and data", job.out.display());
        return Ok((Some(summary), None));
    }
    // Measured when the first run needs it, and only once.
    let measured = (wiring.clone(), job.config.max_norm.to_bits(), job.config.normalise);
    let begin = || match beginnings.entry(measured) {
        Entry::Occupied(known) => Ok(known.get().clone()),
        Entry::Vacant(entry) => Ok(entry.insert(Beginning::measure(source, &wiring, &job.config)?).clone()),
    };
    let run = Run::start(source, wiring.clone(), &job.config, &job.out, identity, device, begin)?;
    Ok((None, Some((wiring, run))))
}

/// Whether one pass can serve all jobs.
fn check(jobs: &[Job]) -> Result<()> {
    let first = jobs.first().context("there is nothing to train")?;
    for job in jobs {
        job.config.check().with_context(|| job.name.clone())?;
        ensure!(!job.config.each_layer, "{} stands for an autoencoder of each layer", job.name);
        ensure!(
            job.config.seed == first.config.seed,
            "{} and {} cannot share the data: seed, which gives their order, must be the same",
            first.name,
            job.name
        );
    }
    Ok(())
}

/// A run that is not finished, with the number of its job.
struct Member<'a> {
    job: usize,
    wiring: Wiring,
    run: Run<'a>,
}

/// A stream of batches, shared by those runs that want the same.
struct Stream {
    wiring: Wiring,
    batch: usize,
    scaling: Scaling,
    batches: Batches,
}

impl Stream {
    fn serves(&self, member: &Member<'_>, jobs: &[Job]) -> bool {
        let same = self.wiring == member.wiring && self.batch == jobs[member.job].config.batch;
        same && self.scaling == *member.run.scaling()
    }
}

struct Suite<'a> {
    source: &'a Arc<dyn ActivationSource>,
    jobs: &'a [Job],
    runs: Vec<Member<'a>>,
    results: Vec<Option<Result<Summary>>>,
    /// Where a device gathers the batches.
    feed: Option<Arc<Feed>>,
}

impl Suite<'_> {
    fn train(mut self, stop: &StopFlag) -> Result<Vec<Result<Summary>>> {
        let mut streams = self.streams();
        let wirings: Vec<Wiring> = streams.iter().map(|stream| stream.wiring.clone()).collect();
        let mut shards = Shards::new(self.source, &wirings, self.jobs[0].config.seed);
        if let Some(feed) = &self.feed {
            let scaled = streams.iter().map(|stream| stream.scaling.rows).find(|rows| !rows.is_none());
            shards = shards.fed_to(Arc::clone(feed), scaled.unwrap_or_default());
        }
        let (done, left) = self.progress(&streams);
        let bar = progress::bar(done + left, "train", "tokens");
        bar.set_position(done);
        bar.reset_eta();
        let (mut pairs, mut saved) = (Pairs::default(), Instant::now());
        self.retire(&bar);
        // The one furthest behind goes first, so that all need the same shards at the same time.
        while let Some(stream) = self.next(&mut streams) {
            let before = stream.batches.position();
            shards.forget_before(before);
            let resident = match stream.batches.fill(&mut shards, stream.batch, &mut pairs) {
                Ok(resident) => resident,
                Err(error) => {
                    // The data failed, not the runs: what was learned so far is kept.
                    self.save()?;
                    self.each(|member| member.run.settle());
                    bar.abandon();
                    self.tell_failures();
                    return Err(error);
                }
            };
            let (after, waited) = (stream.batches.position(), shards.waited());
            let (jobs, batch) = (self.jobs, Batch::new(&pairs, resident));
            self.each(|member| {
                let ready = member.run.position() == before && stream.serves(member, jobs);
                if ready { member.run.step(&batch, after, waited) } else { Ok(()) }
            });
            self.show(&bar, &streams);
            let minutes =
                self.jobs.iter().map(|job| job.config.checkpoint_minutes).fold(f64::INFINITY, f64::min);
            let stopping = stop.is_raised();
            if stopping || saved.elapsed() > Duration::from_secs_f64(60.0 * minutes) {
                self.save()?;
                saved = Instant::now();
            }
            if stopping {
                self.each(|member| member.run.settle());
            }
            self.retire(&bar);
            if stopping && !self.runs.is_empty() {
                bar.abandon();
                self.tell_failures();
                return Err(Stopped.into());
            }
        }
        bar.finish_and_clear();
        self.end()
    }

    /// The streams that the runs need, each from the earliest position of its runs on.
    fn streams(&self) -> Vec<Stream> {
        let mut streams: Vec<Stream> = Vec::new();
        for member in &self.runs {
            if streams.iter().any(|stream| stream.serves(member, self.jobs)) {
                continue;
            }
            let (wiring, batch) = (member.wiring.clone(), self.jobs[member.job].config.batch);
            let scaling = member.run.scaling().clone();
            let batches = Batches::new(wiring.clone(), scaling.clone(), Position::default(), 0);
            let mut stream = Stream { wiring, batch, scaling, batches };
            let served = self.runs.iter().filter(|other| stream.serves(other, self.jobs));
            let position = served.map(|other| other.run.position()).min().unwrap_or_default();
            let left = self.steps(&stream).1 * batch as u64;
            stream.batches = Batches::new(stream.wiring.clone(), stream.scaling.clone(), position, left);
            streams.push(stream);
        }
        streams
    }

    /// The stream that is furthest behind, of those that somebody still needs.
    fn next<'s>(&self, streams: &'s mut Vec<Stream>) -> Option<&'s mut Stream> {
        streams.retain(|stream| self.runs.iter().any(|member| stream.serves(member, self.jobs)));
        streams.iter_mut().min_by_key(|stream| stream.batches.position())
    }

    /// Steps done and left, of the run of a stream that is furthest from its end.
    fn steps(&self, stream: &Stream) -> (u64, u64) {
        let served = self.runs.iter().filter(|member| stream.serves(member, self.jobs));
        served.map(|member| member.run.steps()).max_by_key(|(_, left)| *left).unwrap_or_default()
    }

    /// Vectors of all streams done and left.
    fn progress(&self, streams: &[Stream]) -> (u64, u64) {
        streams.iter().fold((0, 0), |(done, left), stream| {
            let (d, l) = self.steps(stream);
            (done + d * stream.batch as u64, left + l * stream.batch as u64)
        })
    }

    /// Does something to every run; one that fails stops alone.
    fn each(&mut self, mut act: impl FnMut(&mut Member<'_>) -> Result<()>) {
        let results = &mut self.results;
        self.runs.retain_mut(|member| match act(member) {
            Ok(()) => true,
            Err(error) => {
                results[member.job] = Some(Err(error));
                false
            }
        });
    }

    fn save(&mut self) -> Result<()> {
        self.each(|member| member.run.save());
        ensure!(
            !self.runs.is_empty() || self.results.iter().any(Option::is_some),
            "nothing is left to train"
        );
        Ok(())
    }

    /// Says which runs failed, where nobody is told otherwise.
    fn tell_failures(&self) {
        for (job, result) in self.jobs.iter().zip(&self.results) {
            if let Some(Err(error)) = result {
                tracing::warn!("{}: {error:#}", job.name);
            }
        }
    }

    /// Writes out the runs that have taken all their steps.
    fn retire(&mut self, bar: &ProgressBar) {
        let (results, jobs) = (&mut self.results, self.jobs);
        self.runs.retain_mut(|Member { job, run, .. }| {
            if run.steps().1 > 0 {
                return true;
            }
            if jobs.len() > 1 {
                bar.suspend(|| tracing::info!("{}: {}", jobs[*job].name, run.message));
            }
            results[*job] = Some(run.finish());
            false
        });
    }

    fn show(&self, bar: &ProgressBar, streams: &[Stream]) {
        bar.set_position(bar.length().unwrap_or(0).saturating_sub(self.progress(streams).1));
        if let Some(Member { job, run, .. }) = self.runs.first() {
            let message = match self.jobs.len() {
                1 => run.message.clone(),
                n => format!("{} of {n} · {} · {}", self.runs.len(), self.jobs[*job].name, run.message),
            };
            bar.set_message(message);
        }
    }

    fn end(self) -> Result<Vec<Result<Summary>>> {
        let missing = || Err(anyhow!("was not trained to its end"));
        Ok(self.results.into_iter().map(|result| result.unwrap_or_else(missing)).collect())
    }
}
