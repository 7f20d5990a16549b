//! Learning rates and the weight of the sparsity term as functions of the step, counted from 0.

use shared::config::train::TrainConfig;
use shared::loss::Sparsity;

use super::step::Settings;

/// The settings of step `step` of a run.
#[must_use]
pub fn settings(config: &TrainConfig, step: u64) -> Settings {
    let factor = lr_factor(config, step);
    let ramp = ramp(step, config.sparsity_warmup_steps);
    let sparsity = match config.target_l0 {
        Some(target) => Sparsity::Target { lambda: ramp * config.target_weight, target },
        None => Sparsity::Fixed { lambda: ramp * config.lambda.unwrap_or(0.0) },
    };
    Settings {
        lr: config.lr * factor,
        threshold_lr: config.threshold_lr * factor,
        bandwidth: config.bandwidth,
        sparsity,
    }
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
fn ramp(step: u64, over: u64) -> f64 {
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
        let lr = |step| settings(&config(), step).lr / 7e-5;
        for (step, want) in [(0, 0.1), (500, 0.55), (1000, 1.0), (8000, 1.0), (9000, 0.5), (9999, 0.0005)] {
            assert!((lr(step) - want).abs() < 1e-9, "step {step}: {} against {want}", lr(step));
        }
        let at = |step| settings(&config(), step);
        assert_eq!(at(0).sparsity, Sparsity::Fixed { lambda: 0.0 });
        assert_eq!(at(1000).sparsity, Sparsity::Fixed { lambda: 3e-4 });
        assert_eq!(at(5000).sparsity, Sparsity::Fixed { lambda: 6e-4 });
        assert!((at(9000).threshold_lr - 5e-4).abs() < 1e-12);
    }

    #[test]
    fn a_target_is_pulled_at_with_its_weight() {
        let config = TrainConfig { lambda: None, target_l0: Some(40.0), target_weight: 2.0, ..config() };
        let Sparsity::Target { lambda, target } = settings(&config, 1000).sparsity else {
            panic!("no target")
        };
        assert_eq!((lambda, target), (1.0, 40.0));
    }
}
