//! Training one autoencoder, or many from one stream of batches.
//!
//! Every autoencoder has its own folder, log and checkpoints. The data is read once for all of them. One that fails stops
//! alone; the others go on. After a kill they may stand at different batches: the stream begins again at the earliest, and
//! those ahead of it wait.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::ProgressBar;
use shared::Rows;
use shared::config::train::TrainConfig;

use super::checkpoint;
use super::order::Batches;
use super::run::{Beginning, Run, Summary, finished};
use super::source::ActivationSource;
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

/// Trains all `jobs` on the batches of one stream; returns how each ended, in their order.
///
/// # Errors
/// If the jobs disagree about the stream, data cannot be read, or a stop was asked for ([`Stopped`], after checkpoints).
pub fn run_all(
    source: &Arc<dyn ActivationSource>,
    jobs: &[Job],
    stop: &StopFlag,
) -> Result<Vec<Result<Summary>>> {
    check(jobs)?;
    let mut results: Vec<Option<Result<Summary>>> = Vec::new();
    let (mut runs, mut beginning) = (Vec::new(), None);
    for (index, job) in jobs.iter().enumerate() {
        let identity = checkpoint::identity(&job.config, source.provenance())?;
        let started = finished(&job.out, &identity).and_then(|done| match done {
            Some(summary) => {
                tracing::info!("{} is already trained with this configuration and data", job.out.display());
                Ok((Some(summary), None))
            }
            None => {
                // Measured when the first run needs it, and only once.
                let begin = || match &beginning {
                    Some(known) => Ok(Beginning::clone(known)),
                    None => Ok(beginning.insert(Beginning::measure(source, &job.config)?).clone()),
                };
                Ok((None, Some(Run::start(source, &job.config, &job.out, identity, begin)?)))
            }
        });
        match started {
            Ok((summary, run)) => {
                results.push(summary.map(Ok));
                runs.extend(run.map(|run| (index, run)));
            }
            Err(error) if error.is::<Stopped>() => return Err(error),
            Err(error) => results.push(Some(Err(error))),
        }
    }
    Suite { source, jobs, runs, results }.train(stop)
}

/// Whether one stream can serve all jobs.
fn check(jobs: &[Job]) -> Result<()> {
    let first = jobs.first().context("there is nothing to train")?;
    for job in jobs {
        job.config.check().with_context(|| job.name.clone())?;
        let (a, b) = (&first.config, &job.config);
        let stream = |c: &TrainConfig| (c.batch, c.seed, c.max_norm.to_bits(), c.tap);
        ensure!(
            stream(a) == stream(b),
            "{} and {} cannot share a stream: batch, seed, max_norm and tap must be the same",
            first.name,
            job.name
        );
    }
    Ok(())
}

struct Suite<'a> {
    source: &'a Arc<dyn ActivationSource>,
    jobs: &'a [Job],
    /// Those not finished, with the number of their job.
    runs: Vec<(usize, Run<'a>)>,
    results: Vec<Option<Result<Summary>>>,
}

impl Suite<'_> {
    fn train(mut self, stop: &StopFlag) -> Result<Vec<Result<Summary>>> {
        let Some((first, _)) = self.runs.iter().min_by_key(|(_, run)| run.position()) else {
            return self.end();
        };
        let (normalisation, batch) = (self.normalisation(*first)?, self.jobs[*first].config.batch);
        let (done, left) = self.progress();
        let bar = progress::bar((done + left) * batch as u64, "train", "tokens");
        bar.set_position(done * batch as u64);
        bar.reset_eta();
        let position = self.runs.iter().map(|(_, run)| run.position()).min().unwrap_or_default();
        let seed = self.jobs[*first].config.seed;
        let mut batches = Batches::new(self.source, &normalisation, seed, position, left * batch as u64);
        let (mut x, mut saved) = (Vec::new(), Instant::now());
        self.retire(&bar);
        while !self.runs.is_empty() {
            let before = batches.position();
            if let Err(error) = batches.fill(batch, &mut x) {
                // The data failed, not the runs: what was learned so far is kept.
                self.save()?;
                bar.abandon();
                return Err(error);
            }
            let rows = Rows::new(&x, self.source.width())?;
            let (after, waited) = (batches.position(), batches.waited());
            self.each(|run| if run.position() == before { run.step(rows, after, waited) } else { Ok(()) });
            self.show(&bar, batch);
            let minutes =
                self.jobs.iter().map(|job| job.config.checkpoint_minutes).fold(f64::INFINITY, f64::min);
            let stopping = stop.is_raised();
            if stopping || saved.elapsed() > Duration::from_secs_f64(60.0 * minutes) {
                self.save()?;
                saved = Instant::now();
            }
            self.retire(&bar);
            if stopping && !self.runs.is_empty() {
                bar.abandon();
                return Err(Stopped.into());
            }
        }
        bar.finish_and_clear();
        self.end()
    }

    fn normalisation(&self, job: usize) -> Result<super::normalise::Normalisation> {
        let first = self.runs.iter().find(|(index, _)| *index == job).context("there is no such run")?;
        let normalisation = first.1.normalisation().clone();
        let same = self.runs.iter().all(|(_, run)| *run.normalisation() == normalisation);
        ensure!(same, "the runs were begun on differently measured data: train them one by one");
        Ok(normalisation)
    }

    /// Steps done and left, of the run that is furthest from its end.
    fn progress(&self) -> (u64, u64) {
        self.runs.iter().map(|(_, run)| run.steps()).max_by_key(|(_, left)| *left).unwrap_or_default()
    }

    /// Does something to every run; one that fails stops alone.
    fn each(&mut self, mut act: impl FnMut(&mut Run<'_>) -> Result<()>) {
        let results = &mut self.results;
        self.runs.retain_mut(|(index, run)| match act(run) {
            Ok(()) => true,
            Err(error) => {
                results[*index] = Some(Err(error));
                false
            }
        });
    }

    fn save(&mut self) -> Result<()> {
        self.each(|run| run.save());
        ensure!(
            !self.runs.is_empty() || self.results.iter().any(Option::is_some),
            "nothing is left to train"
        );
        Ok(())
    }

    /// Writes out the runs that have taken all their steps.
    fn retire(&mut self, bar: &ProgressBar) {
        let (results, jobs) = (&mut self.results, self.jobs);
        self.runs.retain(|(index, run)| {
            if run.steps().1 > 0 {
                return true;
            }
            if jobs.len() > 1 {
                bar.suspend(|| tracing::info!("{}: {}", jobs[*index].name, run.message));
            }
            results[*index] = Some(run.finish());
            false
        });
    }

    fn show(&self, bar: &ProgressBar, batch: usize) {
        bar.set_position(self.progress().0 * batch as u64);
        if let Some((index, run)) = self.runs.first() {
            let message = match self.jobs.len() {
                1 => run.message.clone(),
                n => format!("{} of {n} · {} · {}", self.runs.len(), self.jobs[*index].name, run.message),
            };
            bar.set_message(message);
        }
    }

    fn end(self) -> Result<Vec<Result<Summary>>> {
        let missing = || Err(anyhow!("was not trained to its end"));
        Ok(self.results.into_iter().map(|result| result.unwrap_or_else(missing)).collect())
    }
}
