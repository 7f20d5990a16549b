//! What is summed between two lines of the log.

use std::time::{Duration, Instant};

use shared::config::train::TrainConfig;
use shared::loss::Sparsity;
use shared::metrics::Dead;

use super::engine::Pass;
use super::log::Line;
use super::speed::{Speed, memory_mib, peak};
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
    /// In steps, and in their encoder products.
    busy: Duration,
    encoder_seconds: f64,
    active: usize,
}

impl Interval {
    pub(super) fn new(first_step: u64, waited: Duration) -> Self {
        let started = Instant::now();
        Self {
            started,
            waited,
            first_step,
            n_steps: 0,
            loss: 0.0,
            mse: 0.0,
            l0: 0.0,
            lambda: 0.0,
            busy: Duration::ZERO,
            encoder_seconds: 0.0,
            active: 0,
        }
    }

    /// A step that took `busy`.
    pub(super) fn add(&mut self, pass: &Pass, settings: &Settings<'_>, busy: Duration) {
        let losses = pass.losses();
        self.busy += busy;
        self.encoder_seconds += pass.encoder_seconds();
        self.active += pass.n_active();
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
            speed: Speed::default(),
        }
    }

    /// Where the time went, for [`Interval::line`].
    pub(super) fn speed(&self, config: &TrainConfig, [d_in, d_out]: [usize; 2], left: u64) -> Speed {
        let (seconds, busy) = (self.started.elapsed().as_secs_f64().max(1e-9), self.busy.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (n, left, active, rows) =
            (self.n_steps as f64, left as f64, self.active as f64, config.batch as f64);
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
        let [d_in, d_out, width] = [d_in, d_out, config.width].map(|d| d as f64);
        let encoder_flops = 2.0 * n * rows * d_in * width;
        // Of each active latent: its decoding, the gradients of its direction, its value and its encoder row.
        let flops = encoder_flops + active * (6.0 * d_out + 2.0 * d_in);
        let peak = peak(config.encoder_precision);
        let encoder = encoder_flops / self.encoder_seconds.max(1e-9);
        Speed {
            eta_s: left * seconds / n.max(1.0),
            training: busy / seconds,
            encoder_gflops: encoder / 1e9,
            encoder_share: peak.map(|peak| encoder / peak),
            mfu: peak.map(|peak| flops / busy.max(1e-9) / peak),
            resident_mib: memory_mib("VmRSS:"),
        }
    }
}
