//! One autoencoder in training: batch by batch forward and update, log and checkpoints in between.
//!
//! [`super::suite`] brings the batches, [`super::finish`] is the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use shared::config::to_toml;
use shared::config::train::{EncoderPrecision, Loss, Thresholds, TrainConfig};
use shared::loss::{AuxForm, AuxK, DeadPull, Examples, MultiTopK, Objective, Prefix};
use shared::metrics::Dead;

use super::checkpoint::{self, State};
use super::engine::{Batch, Engine, Pass, SharedDevice};
use super::guard::{Guard, Verdict};
use super::init;
use super::interval::Interval;
use super::log::Log;
use super::normalise::Scaling;
use super::order::{Batches, Pairs, Position};
use super::pressure::Pressure;
use super::schedule::{betas, rates};
use super::shards::Shards;
use super::sieve::has_bf16;
use super::source::{ActivationSource, Wiring};
use super::step::{Settings, Trainer};
use super::writer::Writer;
use crate::files::write_bytes;

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
        wiring: &Wiring,
        config: &TrainConfig,
    ) -> Result<Self> {
        let scaling = Scaling::measure(&**source, wiring, config.max_norm, config.normalise)?;
        let mut sample = Pairs::default();
        let n_taps = wiring.inputs.len();
        let all = usize::try_from(source.n_vectors())?.saturating_mul(n_taps);
        let rows = all.min(init::sample_rows(n_taps));
        let mut shards = Shards::new(source, std::slice::from_ref(wiring), config.seed);
        let mut batches = Batches::new(wiring.clone(), scaling.clone(), Position::default(), rows as u64);
        batches.fill(&mut shards, rows, &mut sample)?;
        Ok(Self { scaling, sample })
    }
}

/// One autoencoder in training.
pub(super) struct Run<'a> {
    pub(super) source: &'a Arc<dyn ActivationSource>,
    pub(super) wiring: Wiring,
    pub(super) config: &'a TrainConfig,
    pub(super) out: PathBuf,
    pub(super) identity: Value,
    pub(super) state: State,
    engine: Engine,
    writer: Writer,
    log: Log,
    interval: Interval,
    pub(super) started: Instant,
    pub(super) first_step: u64,
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
        device: Option<&SharedDevice>,
        beginning: impl FnOnce() -> Result<Beginning>,
    ) -> Result<Self> {
        let widths = wiring.widths(&**source);
        let mut state = match checkpoint::load(out, config, widths, &identity)? {
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
        let engine = Engine::new(&mut state.trainer, device, config)?;
        let log = Log::open(&out.join("log.jsonl"), first_step, config)?;
        write_bytes(&out.join("config.toml"), to_toml(config)?.as_bytes())?;
        Ok(Self {
            source,
            wiring,
            config,
            out: out.to_owned(),
            identity,
            state,
            engine,
            writer: Writer::default(),
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
    pub(super) fn step(&mut self, batch: &Batch<'_>, position: Position, waited: Duration) -> Result<()> {
        self.writer.look()?;
        let started = Instant::now();
        let (config, step) = (self.config, self.state.trainer.step);
        let objective = self.objective(batch)?;
        let [lr, own_lr] = rates(config, step);
        let settings = Settings { lr, own_lr, betas: betas(config), objective: &objective };
        let widths = self.wiring.widths(&**self.source);
        let powers = self.state.pressure.powers(config);
        let pass = self.engine.forward(&self.state.trainer, batch, widths, &objective, powers)?;
        self.state.position = position;
        match self.state.guard.accept(&pass.losses())? {
            Verdict::Learn => {
                self.engine.update(&mut self.state.trainer, &pass, &settings)?;
                let State { trainer, dead, pressure, .. } = &mut self.state;
                dead.update_fired(batch.n_rows() as u64, pass.fired(trainer));
                let mean_powers = || pass.mean_powers(trainer, powers);
                pressure.observe(config, step, pass.losses().l0, mean_powers);
                self.resample(&pass)?;
                self.interval.add(&pass, &settings, started.elapsed());
            }
            Verdict::Skip => {}
            Verdict::RollBack => return self.roll_back(waited),
        }
        let (step, left) = self.steps();
        if step.is_multiple_of(config.log_every) || left == 0 {
            self.write_line(&settings, waited)?;
        }
        if step.is_multiple_of(config.checkpoint_every) {
            self.write(to_keep(config, &self.state))?;
        }
        Ok(())
    }

    /// Begins dead latents again, when it is time; never while the learning rate falls, when they could not learn any more.
    fn resample(&mut self, pass: &Pass) -> Result<()> {
        let (config, step) = (self.config, self.state.trainer.step);
        let due = config.resample_every > 0 && step.is_multiple_of(config.resample_every);
        if due && rates(config, step)[0] >= config.lr {
            let dead = self.state.dead.mask_within(config.dead_window.0);
            let rest = self.engine.rest(pass)?;
            self.engine.fetch(&mut self.state.trainer)?;
            let begun = self.state.trainer.resample(&rest, &dead, config.seed);
            self.state.dead.revive(begun);
            self.engine.replace(&mut self.state.trainer)?;
        }
        Ok(())
    }

    /// Takes up earlier parameters, and goes on with what comes next in the data.
    fn roll_back(&mut self, waited: Duration) -> Result<()> {
        self.writer.wait()?;
        let widths = self.wiring.widths(&**self.source);
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
        self.engine.replace(&mut self.state.trainer)?;
        self.log = Log::open(&self.out.join("log.jsonl"), step, self.config)?;
        self.interval = Interval::new(step, waited);
        Ok(())
    }

    /// Brings the host's parameters up to date.
    pub(super) fn fetch(&mut self) -> Result<()> {
        self.engine.fetch(&mut self.state.trainer)
    }

    /// Writes a checkpoint; one of a device's is written while training goes on.
    pub(super) fn save(&mut self) -> Result<()> {
        self.write(false)
    }

    /// Waits until the last checkpoint is written.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.writer.wait()
    }

    /// Writes a checkpoint, and keeps it as the one to go back to where `keep` says so.
    fn write(&mut self, keep: bool) -> Result<()> {
        // Two copies of what a device has are never on the host.
        self.writer.wait()?;
        let write = move |out: &Path, state: &State, identity: &Value| {
            checkpoint::save(out, state, identity)?;
            if keep { checkpoint::keep(out) } else { Ok(()) }
        };
        let Some(trainer) = self.engine.copy()? else {
            return write(&self.out, &self.state, &self.identity);
        };
        let State { position, guard, dead, scaling, pressure, .. } = &self.state;
        let (guard, dead, scaling) = (guard.clone(), dead.clone(), scaling.clone());
        let state = State { trainer, position: *position, guard, dead, scaling, pressure: pressure.clone() };
        let (out, identity) = (self.out.clone(), self.identity.clone());
        self.writer.begin(move || write(&out, &state, &identity))
    }

    /// The objective of the next step.
    fn objective(&self, batch: &Batch<'_>) -> Result<Objective> {
        let (config, State { dead, pressure, trainer, .. }) = (self.config, &self.state);
        let mask = || dead.mask_within(config.dead_window.0);
        let lengths = config.prefix_lengths();
        let normalised = config.activation.chooses() && config.loss == Loss::Mse;
        let normaliser = if normalised { self.state.scaling.variance() } else { 1.0 };
        Ok(Objective {
            sparsity: pressure.sparsity(config, trainer.step),
            prefixes: lengths.into_iter().map(|n_latents| Prefix { n_latents, weight: 1.0 }).collect(),
            aux_k: (config.aux_k > 0).then(|| AuxK {
                form: config.aux_form,
                k: config.aux_k,
                weight: config.aux_weight,
                dead: mask(),
            }),
            multi: config.multi_topk.then_some(MultiTopK { k: 4 * config.k, weight: 0.125 }),
            dead_pull: (config.dead_loss > 0.0).then(|| DeadPull { weight: config.dead_loss, dead: mask() }),
            normaliser,
            examples: self.examples(batch)?,
            l0_by_layer: config.thresholds == Thresholds::PerLayer,
        })
    }

    /// What the objective must know of each row of `batch`.
    fn examples(&self, batch: &Batch<'_>) -> Result<Examples> {
        let (config, scaling) = (self.config, &self.state.scaling);
        let (by_layer, fvu) = (config.thresholds == Thresholds::PerLayer, config.loss == Loss::Fvu);
        let (pairs, mut examples) = (batch.pairs, Examples::default());
        if by_layer || fvu {
            examples.layers.clone_from(&pairs.inputs);
        }
        if fvu {
            let width = scaling.widths()[1];
            examples.weights = examples.fvu_weights(batch.moments(width)?, width, &pairs.undo);
        }
        if config.aux_k > 0 && config.aux_form == AuxForm::Mlsae && !scaling.rows.is_none() {
            // All taps have the same C, which the encoder's units do not know.
            let scale = scaling.released().input;
            examples.deviations = pairs.undo.iter().map(|(deviation, _)| deviation / scale).collect();
        }
        Ok(examples)
    }

    fn write_line(&mut self, settings: &Settings<'_>, waited: Duration) -> Result<()> {
        let State { trainer, guard, dead, scaling, .. } = &self.state;
        if self.interval.n_steps > 0 {
            let variance = scaling.variance();
            let (skipped, step) = (guard.skipped, trainer.step);
            let mut line = self.interval.line(variance, settings, dead, self.config, skipped, step, waited);
            let widths = self.wiring.widths(&**self.source);
            line.speed = self.interval.speed(self.config, widths, self.steps().1);
            self.message = line.message(self.source.maker());
            self.log.write(&line)?;
        }
        self.interval = Interval::new(trainer.step, waited);
        Ok(())
    }
}

/// Whether the checkpoint just written, or read, is one to go back to. It follows from the step alone, so that a run that was
/// killed goes back as far as one that was not.
fn to_keep(config: &TrainConfig, state: &State) -> bool {
    let step = state.trainer.step;
    step > 0 && step.is_multiple_of(config.checkpoint_every) && state.guard.is_calm()
}
