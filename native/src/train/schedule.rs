//! Learning rates as functions of the step, counted from 0.

use shared::config::train::{LatentFunction, TrainConfig};

use super::adam::Betas;

/// Learning rates of a step: of weights and biases, and of the parameters of the latent function.
#[must_use]
pub fn rates(config: &TrainConfig, step: u64) -> [f64; 2] {
    let factor = lr_factor(config, step);
    // A gate's own parameters are a scale and a bias like any other.
    let own = if config.activation == LatentFunction::JumpRelu { config.threshold_lr } else { config.lr };
    [config.lr * factor, own * factor]
}

/// The optimiser's constants.
#[must_use]
pub fn betas(config: &TrainConfig) -> Betas {
    Betas { first: config.beta1, second: config.beta2, eps: config.adam_eps }
}

/// Cosine warm-up from a tenth (arXiv 2408.05147 §3.2), then constant, then linear to zero at the very end.
fn lr_factor(config: &TrainConfig, step: u64) -> f64 {
    let warm = ramp(step, config.lr_warmup_steps);
    let up = 0.1 + 0.9 * (1.0 - (std::f64::consts::PI * warm).cos()) / 2.0;
    let total = to_f64(config.total_steps());
    let decay_steps = total * config.lr_decay_share;
    let left = total - to_f64(step);
    if left < decay_steps { up * left / decay_steps } else { up }
}

/// Linear from 0 at step 0 to 1 at step `over`.
pub(super) fn ramp(step: u64, over: u64) -> f64 {
    if step >= over { 1.0 } else { to_f64(step) / to_f64(over) }
}

fn to_f64(n: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^53")]
    let n = n as f64;
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::config::Count;

    fn config() -> TrainConfig {
        TrainConfig {
            lambda: Some(6e-4),
            steps: Some(Count(10_000)),
            lr: 7e-5,
            threshold_lr: 1e-3,
            lr_warmup_steps: 1000,
            lr_decay_share: 0.2,
            sparsity_warmup_steps: 2000,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn known_values() {
        let lr = |step| rates(&config(), step)[0] / 7e-5;
        for (step, want) in [(0, 0.1), (500, 0.55), (1000, 1.0), (8000, 1.0), (9000, 0.5), (9999, 0.0005)] {
            assert!((lr(step) - want).abs() < 1e-9, "step {step}: {} against {want}", lr(step));
        }
        assert!((rates(&config(), 9000)[1] - 5e-4).abs() < 1e-12);
        let gated = TrainConfig { activation: LatentFunction::Gated, ..config() };
        assert_eq!(rates(&gated, 5000), [7e-5; 2]);
        assert_eq!([ramp(0, 2000), ramp(1000, 2000), ramp(5000, 2000), ramp(0, 0)], [0.0, 0.5, 1.0, 1.0]);
    }
}
