//! Adam with β₁ = 0 (Gemma Scope, arXiv 2408.05147 §3.2): no first moment, and lazily decayed second ones.
//!
//! ```text
//! v ← β₂ v + (1 − β₂) g²       p ← p − lr · g / (√(v / (1 − β₂ᵗ)) + eps)
//! ```

/// β₂ of the second moments.
pub const BETA2: f64 = 0.999;
/// Added to the root of the second moment.
pub const EPS: f32 = 1e-8;

/// The scalars of one Adam update of one group of values.
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    lr: f32,
    decay: f32,
    gain: f32,
    correction: f32,
}

impl Adam {
    /// The update of step `step` (counted from 1) for values last updated in step `last` (0 = never).
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the update is computed in f32")]
    pub fn new(lr: f64, step: u64, last: u64) -> Self {
        let power = |n: u64| BETA2.powi(i32::try_from(n).unwrap_or(i32::MAX));
        Self {
            lr: lr as f32,
            decay: power(step.saturating_sub(last)) as f32,
            gain: (1.0 - BETA2) as f32,
            correction: (1.0 / (1.0 - power(step))) as f32,
        }
    }

    /// Updates values and moments from their gradients.
    #[inline(always)]
    pub fn update(&self, values: &mut [f32], moments: &mut [f32], gradients: &[f32]) {
        for ((p, v), &g) in values.iter_mut().zip(moments).zip(gradients) {
            *v = self.decay * *v + self.gain * g * g;
            *p -= self.lr * g / ((*v * self.correction).sqrt() + EPS);
        }
    }

    /// [`Adam::update`] of a single value.
    #[inline(always)]
    pub fn update_one(&self, value: &mut f32, moment: &mut f32, gradient: f32) {
        self.update(std::slice::from_mut(value), std::slice::from_mut(moment), &[gradient]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value with gradient only in some steps ends where textbook Adam, run densely in f64, puts it.
    #[test]
    fn lazy_decay_equals_the_dense_optimiser() {
        let gradient = |step: u64| if step.is_multiple_of(7) { (step as f64).sin() } else { 0.0 };
        let (lr, steps) = (1e-2, 200u64);
        let (mut p, mut v) = (1.0f64, 0.0f64);
        for step in 1..=steps {
            let g = gradient(step);
            v = BETA2 * v + (1.0 - BETA2) * g * g;
            p -= lr * g / ((v / (1.0 - BETA2.powi(step as i32))).sqrt() + 1e-8);
        }
        let (mut lazy_p, mut lazy_v, mut last) = (1.0f32, 0.0f32, 0);
        for step in (1..=steps).filter(|s| s.is_multiple_of(7)) {
            Adam::new(lr, step, last).update_one(&mut lazy_p, &mut lazy_v, gradient(step) as f32);
            last = step;
        }
        assert!((f64::from(lazy_p) - p).abs() < 1e-6, "{lazy_p} against {p}");
        let caught_up = f64::from(lazy_v) * BETA2.powi((steps - last) as i32);
        assert!((caught_up - v).abs() < 1e-6 * v, "{caught_up} against {v}");
    }
}
