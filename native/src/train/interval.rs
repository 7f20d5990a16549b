//! What is summed between two lines of the log.

use std::time::{Duration, Instant};

use shared::config::train::TrainConfig;
use shared::loss::Sparsity;
use shared::metrics::Dead;

use super::forward::Forward;
use super::log::Line;
use super::step::Settings;

/// Sums since the last line of the log.
#[derive(Debug)]
pub(super) struct Interval {
    started: Instant,
    waited: Duration,
    first_step: u64,
    pub(super) n_steps: u64,
    loss: f64,
    mse: f64,
    l0: f64,
    lambda: f64,
}

impl Interval {
    pub(super) fn new(first_step: u64, waited: Duration) -> Self {
        let started = Instant::now();
        Self { started, waited, first_step, n_steps: 0, loss: 0.0, mse: 0.0, l0: 0.0, lambda: 0.0 }
    }

    pub(super) fn add(&mut self, forward: &Forward, settings: &Settings<'_>) {
        let losses = forward.losses();
        self.n_steps += 1;
        self.loss += losses.total();
        self.mse += losses.mse;
        self.l0 += losses.l0;
        self.lambda += match settings.objective.sparsity {
            Sparsity::Norm { lambda, .. } => lambda,
            sparsity => sparsity.effective_lambda(losses.l0),
        };
    }

    pub(super) fn line(
        &self,
        variance: f64,
        settings: &Settings<'_>,
        dead: &Dead,
        config: &TrainConfig,
        skipped: u64,
        step: u64,
        waited: Duration,
    ) -> Line {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (n, rows) = (self.n_steps as f64, ((step - self.first_step) * config.batch as u64) as f64);
        Line {
            step,
            tokens: step * config.batch as u64,
            loss: self.loss / n,
            mse: self.mse / n,
            l0: self.l0 / n,
            fvu: self.mse / n / variance,
            dead: dead.share_within(config.dead_window.0).unwrap_or(0.0),
            lambda: self.lambda / n,
            lr: settings.lr,
            skipped,
            tokens_per_s: rows / seconds,
            waiting: (waited - self.waited).as_secs_f64() / seconds,
        }
    }
}
