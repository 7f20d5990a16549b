//! What a run's sparsity term is at each step, and the state that decides it.
//!
//! A JumpReLU is held at its target by a quadratic term in L0 ([`shared::loss::Sparsity::TargetL0`]), which needs no state.
//! Where a norm is penalised (ReLU, gated), the gradient of L0 does not exist; the weight λ is steered instead, by a
//! proportional-integral controller on the relative error of the L0 that was seen. p-annealing lowers the power of the norm in steps,
//! and rescales λ at each so that the penalty itself does not jump (arXiv 2408.00113 §4).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use shared::config::train::{LatentFunction, TrainConfig};
use shared::loss::Sparsity;

use super::schedule::ramp;

/// λ of a steered penalty at the start: near where runs on normalised data end.
const FIRST_LAMBDA: f64 = 0.03;
/// How far ln λ moves in a step for each unit of ln(L0 / L0*), for good.
const INTEGRAL: f64 = 0.1;
/// How far it is moved for as long as the error lasts. L0 answers to λ late; without this it swings.
const PROPORTIONAL: f64 = 3.0;
/// The largest |ln(L0 / L0*)| that is taken at its word. Near the target λ is steered tightly, so that L0 stays there while p or
/// the learning rate fall; a start at twice the target must not multiply λ, which costs reconstruction for good (on resid.14 of
/// SmolLM2-135M 7 % of FVU with 1.0).
const LARGEST_ERROR: f64 = 0.3;
/// Batches whose norms decide how λ is rescaled when p changes.
const QUEUE: usize = 10;

/// The state of the sparsity term.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pressure {
    /// Bits of λ, so that it is read back exactly; without the part that lasts as long as the error.
    lambda: u64,
    /// Bits of the last ln(L0 / L0*); zero with a fixed λ.
    error: u64,
    /// Updates of p so far.
    updates: u32,
    /// Per batch, bits of the mean norms under the current and the next p.
    norms: VecDeque<[u64; 2]>,
}

impl Pressure {
    /// At the start of a run.
    #[must_use]
    pub fn new(config: &TrainConfig) -> Self {
        let lambda = config.lambda.unwrap_or(FIRST_LAMBDA);
        Self { lambda: lambda.to_bits(), error: 0, updates: 0, norms: VecDeque::new() }
    }

    /// λ as it stands.
    #[must_use]
    pub fn lambda(&self) -> f64 {
        f64::from_bits(self.lambda) * (PROPORTIONAL * f64::from_bits(self.error)).exp()
    }

    /// The sparsity term of step `step`.
    #[must_use]
    pub fn sparsity(&self, config: &TrainConfig, step: u64) -> Sparsity {
        let ramp = ramp(step, config.sparsity_warmup_steps);
        match (config.activation, config.target_l0) {
            (LatentFunction::TopK | LatentFunction::BatchTopK, _) => Sparsity::None,
            (LatentFunction::JumpRelu, Some(target)) => {
                Sparsity::TargetL0 { lambda: ramp * config.target_weight, target }
            }
            (LatentFunction::JumpRelu, None) => Sparsity::L0 { lambda: ramp * self.lambda() },
            (LatentFunction::Relu | LatentFunction::Gated, _) => Sparsity::Norm {
                lambda: ramp * self.lambda(),
                p: power(config, self.updates),
                decoder_norm: config.decoder_norm,
            },
        }
    }

    /// Takes note of a batch that was learned from in step `step` (counted from 0).
    ///
    /// `l0` is the batch's, and `mean_powers` are the means of what the penalty counts, to the powers of [`Pressure::powers`]; they are
    /// asked for only near an update of p.
    pub fn observe(
        &mut self,
        config: &TrainConfig,
        step: u64,
        l0: f64,
        mean_powers: impl FnOnce() -> [f64; 2],
    ) {
        if !config.activation.has_norm() {
            return;
        }
        if let Some(target) = config.target_l0 {
            // A step without any active latent says "too sparse" as loudly as is listened to.
            let error = (l0 / target).ln().clamp(-LARGEST_ERROR, LARGEST_ERROR);
            self.error = error.to_bits();
            self.lambda = (f64::from_bits(self.lambda) * (INTEGRAL * error).exp()).to_bits();
        }
        self.anneal(config, step, mean_powers);
    }

    /// The current power of the norm, and the next.
    #[must_use]
    pub fn powers(&self, config: &TrainConfig) -> [f64; 2] {
        [self.updates, self.updates + 1].map(|n| power(config, n))
    }

    fn anneal(&mut self, config: &TrainConfig, step: u64, mean_powers: impl FnOnce() -> [f64; 2]) {
        let Some(due) = due(config, self.updates) else { return };
        if step + (QUEUE as u64) < due {
            return;
        }
        self.norms.push_back(mean_powers().map(f64::to_bits));
        self.norms.truncate(QUEUE);
        if step >= due {
            let [now, next] = [0, 1].map(|i| self.norms.iter().map(|n| f64::from_bits(n[i])).sum::<f64>());
            if next > 0.0 {
                self.lambda = (f64::from_bits(self.lambda) * now / next).to_bits();
            }
            self.updates += 1;
            self.norms.clear();
        }
    }
}

/// p after `updates` updates, from 1 to `p_end` in equal parts.
fn power(config: &TrainConfig, updates: u32) -> f64 {
    1.0 - (1.0 - config.p_end) * f64::from(updates) / f64::from(config.p_updates)
}

/// The step at whose end the next update is due; none when there is no more. All come before the learning rate falls, which is
/// when latents stop to follow.
fn due(config: &TrainConfig, updates: u32) -> Option<u64> {
    if config.p_end >= 1.0 || updates >= config.p_updates {
        return None;
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "step counts are far below 2^53"
    )]
    let step = {
        let span = (1.0 - config.lr_decay_share - config.p_start).max(0.0);
        let share = config.p_start + span * f64::from(updates) / f64::from(config.p_updates);
        (share * config.total_steps() as f64) as u64
    };
    Some(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::config::Count;

    #[test]
    fn p_falls_in_equal_parts_from_its_start_on() {
        let config = TrainConfig {
            activation: LatentFunction::Relu,
            lambda: Some(0.1),
            p_end: 0.2,
            p_start: 0.25,
            p_updates: 4,
            lr_decay_share: 0.0,
            steps: Some(Count(800)),
            ..TrainConfig::default()
        };
        let dues: Vec<_> = (0..5).map(|n| due(&config, n)).collect();
        assert_eq!(dues, [Some(200), Some(350), Some(500), Some(650), None]);
        let powers: Vec<_> = (0..=4).map(|n| (power(&config, n) * 10.0).round()).collect();
        assert_eq!(powers, [10.0, 8.0, 6.0, 4.0, 2.0]);
        let decaying = TrainConfig { lr_decay_share: 0.25, ..config.clone() };
        assert_eq!((0..4).map(|n| due(&decaying, n)).collect::<Vec<_>>(), [200, 300, 400, 500].map(Some));
        let still = TrainConfig { p_end: 1.0, ..config };
        assert_eq!((due(&still, 0), power(&still, 0)), (None, 1.0));
        let Sparsity::Norm { lambda, p, decoder_norm } = Pressure::new(&still).sparsity(&still, 5) else {
            panic!("no norm")
        };
        assert_eq!((lambda, p, decoder_norm), (0.1, 1.0, false));
    }
}
