//! One autoencoder in training: batch by batch forward and update, log and checkpoints in between, weights at the end.
//!
//! [`super::suite`] brings the batches.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::config::to_toml;
use shared::config::train::{EncoderPrecision, TrainConfig};
use shared::fold::Scales;
use shared::loss::{AuxK, DeadPull, MultiTopK, Objective, Prefix};
use shared::metrics::{Dead, Fvu, L0};
use shared::{Rows, Sae};

use super::checkpoint::{self, State};
use super::forward::Forward;
use super::guard::{Guard, Verdict};
use super::init;
use super::interval::Interval;
use super::log::{Line, Log};
use super::normalise::Scaling;
use super::order::{Batches, Pairs, Position, Shards};
use super::pressure::Pressure;
use super::schedule::{betas, rates};
use super::sieve::has_bf16;
use super::source::{ActivationSource, Wiring};
use super::step::{Settings, Trainer};
use crate::cpu::CpuBackend;
use crate::files::write_bytes;
use crate::input_limit;
use crate::sae_files::{SaeFile, release};

/// Held-out vectors that the final metrics are taken on.
const HELD_OUT_ROWS: usize = 20_000;

/// How a run ended, also written to `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Steps taken.
    pub steps: u64,
    /// Vectors trained on.
    pub tokens: u64,
    /// Mean L0 over the last tenth of the steps.
    pub l0: f64,
    /// FVU over the last tenth of the steps.
    pub fvu: f64,
    /// Share of latents that did not fire within the dead window.
    pub dead: f64,
    /// Mean L0 on held-out vectors, when there are some.
    pub held_out_l0: Option<f64>,
    /// FVU on held-out vectors, when there are some.
    pub held_out_fvu: Option<f64>,
    /// Batches not learned from.
    pub skipped: u64,
    /// How often earlier parameters were taken up again.
    pub rolled_back: u32,
    /// Training speed of this process, over all its steps.
    pub tokens_per_s: f64,
}

/// `run.json`: what was done, to which data, with what result.
#[derive(Serialize, Deserialize)]
struct RunFile {
    writer: String,
    identity: Value,
    config: TrainConfig,
    data: Value,
    /// The scalar C that was folded into the weights.
    scale: f64,
    /// That of a transcoder's targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    target_scale: Option<f64>,
    /// Raw vectors longer than this were not trained on.
    max_input_norm: Option<f64>,
    metrics: Summary,
}

/// The summary of a finished run in `out`.
pub(super) fn finished(out: &Path, identity: &Value) -> Result<Option<Summary>> {
    let path = out.join("run.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: RunFile =
        serde_json::from_str(&text).with_context(|| format!("{} is not a training run", path.display()))?;
    if file.identity != *identity {
        bail!("{} holds another finished run; give another --out, or remove it", out.display());
    }
    Ok(Some(file.metrics))
}

/// What the first steps of every run over the same data need of it.
#[derive(Debug, Clone)]
pub(super) struct Beginning {
    scaling: Scaling,
    /// Normalised rows.
    sample: Pairs,
}

impl Beginning {
    /// Measures `source`.
    pub(super) fn measure(
        source: &Arc<dyn ActivationSource>,
        wiring: Wiring,
        config: &TrainConfig,
    ) -> Result<Self> {
        let scaling = Scaling::measure(&**source, wiring, config.max_norm)?;
        let mut sample = Pairs::default();
        let rows = usize::try_from(source.n_vectors())?.min(init::SAMPLE_ROWS);
        let mut shards = Shards::new(source, &[wiring], config.seed);
        let mut batches = Batches::new(wiring, scaling.clone(), Position::default(), rows as u64);
        batches.fill(&mut shards, rows, &mut sample)?;
        Ok(Self { scaling, sample })
    }
}

/// One autoencoder in training.
pub(super) struct Run<'a> {
    source: &'a Arc<dyn ActivationSource>,
    wiring: Wiring,
    config: &'a TrainConfig,
    out: PathBuf,
    identity: Value,
    state: State,
    log: Log,
    interval: Interval,
    started: Instant,
    first_step: u64,
    /// The last line of the log, for people.
    pub(super) message: String,
}

impl<'a> Run<'a> {
    /// Goes on from the checkpoint in `out`, or begins.
    pub(super) fn start(
        source: &'a Arc<dyn ActivationSource>,
        wiring: Wiring,
        config: &'a TrainConfig,
        out: &Path,
        identity: Value,
        beginning: impl FnOnce() -> Result<Beginning>,
    ) -> Result<Self> {
        let widths = widths(&**source, wiring);
        let state = match checkpoint::load(out, config, widths, &identity)? {
            Some(state) => {
                tracing::info!("{}: going on from step {}", out.display(), state.trainer.step);
                if to_keep(config, &state) {
                    checkpoint::keep(out)?;
                }
                state
            }
            None => {
                let Beginning { scaling, sample } = beginning()?;
                let params = init::params(config, &scaling, &sample)?;
                let mut trainer = Trainer::new(params, config.beta1 > 0.0);
                trainer.set_precision(config.encoder_precision);
                State {
                    trainer,
                    position: Position::default(),
                    guard: Guard::default(),
                    dead: Dead::new(config.width),
                    scaling,
                    pressure: Pressure::new(config),
                }
            }
        };
        if config.encoder_precision == EncoderPrecision::Bf16 && !has_bf16() {
            tracing::warn!("this processor has no AVX512-BF16: the encoder product is computed in f32");
        }
        let first_step = state.trainer.step;
        let log = Log::open(&out.join("log.jsonl"), first_step, config)?;
        write_bytes(&out.join("config.toml"), to_toml(config)?.as_bytes())?;
        Ok(Self {
            source,
            wiring,
            config,
            out: out.to_owned(),
            identity,
            state,
            log,
            interval: Interval::new(first_step, Duration::ZERO),
            started: Instant::now(),
            first_step,
            message: String::new(),
        })
    }

    /// Where the next row comes from.
    pub(super) fn position(&self) -> Position {
        self.state.position
    }

    /// How the data was measured when the run began.
    pub(super) fn scaling(&self) -> &Scaling {
        &self.state.scaling
    }

    /// Steps taken, and left.
    pub(super) fn steps(&self) -> (u64, u64) {
        let step = self.state.trainer.step;
        (step, self.config.total_steps().saturating_sub(step))
    }

    /// Learns from a batch, after which the stream stands at `position` and has been waited for `waited`.
    pub(super) fn step(&mut self, batch: &Pairs, position: Position, waited: Duration) -> Result<()> {
        let started = Instant::now();
        let (config, step) = (self.config, self.state.trainer.step);
        let objective = self.objective();
        let [lr, own_lr] = rates(config, step);
        let settings = Settings { lr, own_lr, betas: betas(config), objective: &objective };
        let [d_in, d_out] = widths(&**self.source, self.wiring);
        let (x, y) = (Rows::new(&batch.x, d_in)?, Rows::new(batch.targets(), d_out)?);
        let forward = self.state.trainer.forward(x, y, &objective)?;
        self.state.position = position;
        match self.state.guard.accept(&forward.losses())? {
            Verdict::Learn => {
                self.state.trainer.update(&forward, &settings)?;
                let params = &self.state.trainer.params;
                self.state.dead.update_fired(x.n_rows() as u64, forward.fired(params));
                self.state.pressure.observe(config, step, &forward, params);
                self.resample(&forward);
                self.interval.add(&forward, &settings, started.elapsed());
            }
            Verdict::Skip => {}
            Verdict::RollBack => return self.roll_back(waited),
        }
        let (step, left) = self.steps();
        if step.is_multiple_of(config.log_every) || left == 0 {
            self.write_line(&settings, waited)?;
        }
        if step.is_multiple_of(config.checkpoint_every) {
            self.save()?;
            if to_keep(config, &self.state) {
                checkpoint::keep(&self.out)?;
            }
        }
        Ok(())
    }

    /// Begins dead latents again, when it is time; never while the learning rate falls, when they could not learn any more.
    fn resample(&mut self, forward: &Forward) {
        let (config, step) = (self.config, self.state.trainer.step);
        let due = config.resample_every > 0 && step.is_multiple_of(config.resample_every);
        if due && rates(config, step)[0] >= config.lr {
            let dead = self.state.dead.mask_within(config.dead_window.0);
            let begun = self.state.trainer.resample(forward, &dead, config.seed);
            self.state.dead.revive(begun);
        }
    }

    /// Takes up earlier parameters, and goes on with what comes next in the data.
    fn roll_back(&mut self, waited: Duration) -> Result<()> {
        let widths = widths(&**self.source, self.wiring);
        let earlier = checkpoint::load_earlier(&self.out, self.config, widths, &self.identity)?;
        let earlier = earlier.with_context(|| {
            format!(
                "batches could not be learned from since step {}, and there is no checkpoint of an earlier step to go back \
                 to (checkpoint_every is {}): look at the data, or train with a lower lr",
                self.state.trainer.step,
                self.config.checkpoint_every
            )
        })?;
        let step = earlier.trainer.step;
        tracing::warn!(
            "{}: batches could not be learned from since step {}; going back to step {step}",
            self.out.display(),
            self.state.trainer.step
        );
        let guard = self.state.guard.after_rolling_back(&earlier.guard);
        self.state = State { guard, position: self.state.position, ..earlier };
        self.log = Log::open(&self.out.join("log.jsonl"), step, self.config)?;
        self.interval = Interval::new(step, waited);
        Ok(())
    }

    /// Writes a checkpoint.
    pub(super) fn save(&self) -> Result<()> {
        checkpoint::save(&self.out, &self.state, &self.identity)
    }

    /// The objective of the next step.
    fn objective(&self) -> Objective {
        let (config, State { dead, pressure, trainer, .. }) = (self.config, &self.state);
        let mask = || dead.mask_within(config.dead_window.0);
        let lengths = config.prefix_lengths();
        let normaliser =
            if config.activation.chooses() { self.state.scaling.output().variance() } else { 1.0 };
        Objective {
            sparsity: pressure.sparsity(config, trainer.step),
            prefixes: lengths.into_iter().map(|n_latents| Prefix { n_latents, weight: 1.0 }).collect(),
            aux_k: (config.aux_k > 0).then(|| AuxK {
                k: config.aux_k,
                weight: config.aux_weight,
                dead: mask(),
            }),
            multi: config.multi_topk.then_some(MultiTopK { k: 4 * config.k, weight: 0.125 }),
            dead_pull: (config.dead_loss > 0.0).then(|| DeadPull { weight: config.dead_loss, dead: mask() }),
            normaliser,
        }
    }

    fn write_line(&mut self, settings: &Settings<'_>, waited: Duration) -> Result<()> {
        let State { trainer, guard, dead, scaling, .. } = &self.state;
        if self.interval.n_steps > 0 {
            let variance = scaling.output().variance();
            let (skipped, step) = (guard.skipped, trainer.step);
            let mut line = self.interval.line(variance, settings, dead, self.config, skipped, step, waited);
            let widths = widths(&**self.source, self.wiring);
            line.speed = self.interval.speed(self.config, widths, self.steps().1);
            self.message = line.message(self.source.maker());
            self.log.write(&line)?;
        }
        self.interval = Interval::new(trainer.step, waited);
        Ok(())
    }

    /// Writes the autoencoder and what is to be said of it.
    pub(super) fn finish(&self) -> Result<Summary> {
        let elapsed = self.started.elapsed().as_secs_f64();
        let batch = self.config.batch as u64;
        let State { trainer, guard, dead, .. } = &self.state;
        let (l0, fvu) = self.last_tenth()?;
        let sae = {
            let Scaling { input, .. } = &self.state.scaling;
            let scales = Scales { input: input.scale, output: self.state.scaling.output().scale };
            trainer.params.release(scales)?
        };
        let (held_out_l0, held_out_fvu) = self.held_out(&sae)?;
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let metrics = Summary {
            steps: trainer.step,
            tokens: trainer.step * batch,
            l0,
            fvu,
            dead: dead.share_within(self.config.dead_window.0).unwrap_or(0.0),
            held_out_l0,
            held_out_fvu,
            skipped: guard.skipped,
            rolled_back: guard.rolled_back,
            tokens_per_s: ((trainer.step - self.first_step) * batch) as f64 / elapsed.max(1e-9),
        };
        let mut metadata = self.source.metadata();
        let taps = self.source.taps();
        metadata.tap = taps[self.wiring.input].point;
        metadata.target = self.wiring.target.and_then(|target| taps[target].point);
        let data = self.wiring.provenance(&**self.source);
        metadata.provenance.insert("training".to_owned(), json!(self.config));
        metadata.provenance.insert(input_limit::PROVENANCE_KEY.to_owned(), json!(self.max_input_norm()));
        metadata.provenance.insert("data".to_owned(), data.clone());
        release(&self.out, &SaeFile { sae, metadata })?;
        checkpoint::save(&self.out, &self.state, &self.identity)?;
        let file = RunFile {
            writer: format!("stratascope {}", env!("CARGO_PKG_VERSION")),
            identity: self.identity.clone(),
            config: self.config.clone(),
            data,
            scale: self.state.scaling.input.scale,
            target_scale: self.state.scaling.target.as_ref().map(|target| target.scale),
            max_input_norm: self.max_input_norm(),
            metrics: metrics.clone(),
        };
        // Last: its presence says that the run is finished.
        write_bytes(&self.out.join("run.json"), &serde_json::to_vec_pretty(&file)?)?;
        Ok(metrics)
    }

    fn max_input_norm(&self) -> Option<f64> {
        Some(self.state.scaling.input.limit).filter(|limit| limit.is_finite())
    }

    /// L0 and FVU over the log lines of the last tenth of the steps.
    fn last_tenth(&self) -> Result<(f64, f64)> {
        let text = fs::read_to_string(self.out.join("log.jsonl")).context("cannot read the log back")?;
        let lines: Vec<Line> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let from = self.config.total_steps() - self.config.total_steps() / 10;
        let last: Vec<&Line> = lines.iter().filter(|line| line.step >= from).collect();
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = last.len().max(1) as f64;
        Ok((last.iter().map(|l| l.l0).sum::<f64>() / n, last.iter().map(|l| l.fvu).sum::<f64>() / n))
    }

    /// L0 and FVU of the released weights on vectors that were never trained on, outliers left out as in training.
    fn held_out(&self, sae: &Sae) -> Result<(Option<f64>, Option<f64>)> {
        let mut raw = self.source.held_out(&self.wiring.taps(), HELD_OUT_ROWS)?;
        let Scaling { input, target } = &self.state.scaling;
        let y = target.as_ref().and_then(|_| raw.pop());
        let x = raw.pop().unwrap_or_default();
        let [d_in, d_out] = widths(&**self.source, self.wiring);
        let y = y.as_deref().unwrap_or(&x);
        let keeps = |(x, y): &(&[f32], &[f32])| {
            input.keeps(x) && target.as_ref().is_none_or(|target| target.keeps(y))
        };
        let kept = x.chunks_exact(d_in).zip(y.chunks_exact(d_out)).filter(keeps);
        let (x, y): (Vec<&[f32]>, Vec<&[f32]>) = kept.unzip();
        let backend = CpuBackend::new(sae.clone());
        let (mut l0, mut fvu) = (L0::new(), Fvu::new(d_out));
        for (x, y) in x.chunks(1024).zip(y.chunks(1024)) {
            let (x, y) = (x.concat(), y.concat());
            let x = Rows::new(&x, d_in)?;
            let codes = backend.encode(x)?;
            l0.update(&codes);
            fvu.update(Rows::new(&y, d_out)?, Rows::new(&backend.decode(x, &codes)?, d_out)?)?;
        }
        Ok((l0.mean(), fvu.value()))
    }
}

/// Widths of inputs and targets.
fn widths(source: &dyn ActivationSource, wiring: Wiring) -> [usize; 2] {
    [wiring.input, wiring.target.unwrap_or(wiring.input)].map(|tap| source.taps()[tap].width)
}

/// Whether the checkpoint just written, or read, is one to go back to. It follows from the step alone, so that a run that was
/// killed goes back as far as one that was not.
fn to_keep(config: &TrainConfig, state: &State) -> bool {
    let step = state.trainer.step;
    step > 0 && step.is_multiple_of(config.checkpoint_every) && state.guard.is_calm()
}
