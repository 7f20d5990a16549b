//! Adam, lazily: with β₁ = 0 (Gemma Scope, arXiv 2408.05147 §3.2) there is no first moment, and second ones may decay late.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
//! p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps)
//! ```

/// The constants of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Betas {
    /// β₁.
    pub first: f64,
    /// β₂.
    pub second: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// The scalars of one Adam update of one group of values.
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    lr: f32,
    momentum: f32,
    momentum_gain: f32,
    momentum_correction: f32,
    decay: f32,
    gain: f32,
    correction: f32,
    eps: f32,
}

impl Adam {
    /// The update of step `step` (counted from 1) for values last updated in step `last` (0 = never).
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the update is computed in f32")]
    pub fn new(betas: Betas, lr: f64, step: u64, last: u64) -> Self {
        let power = |beta: f64, n: u64| beta.powi(i32::try_from(n).unwrap_or(i32::MAX));
        Self {
            lr: lr as f32,
            momentum: betas.first as f32,
            momentum_gain: (1.0 - betas.first) as f32,
            momentum_correction: (1.0 / (1.0 - power(betas.first, step))) as f32,
            decay: power(betas.second, step.saturating_sub(last)) as f32,
            gain: (1.0 - betas.second) as f32,
            correction: (1.0 / (1.0 - power(betas.second, step))) as f32,
            eps: betas.eps as f32,
        }
    }

    /// Updates values and moments from their gradients. `first` is empty with β₁ = 0.
    #[inline(always)]
    pub fn update(&self, values: &mut [f32], first: &mut [f32], second: &mut [f32], gradients: &[f32]) {
        let values = values.iter_mut().zip(second).zip(gradients);
        if first.is_empty() {
            for ((p, v), &g) in values {
                *v = self.decay * *v + self.gain * g * g;
                *p -= self.lr * g / ((*v * self.correction).sqrt() + self.eps);
            }
        } else {
            for (((p, v), &g), m) in values.zip(first) {
                *m = self.momentum * *m + self.momentum_gain * g;
                *v = self.decay * *v + self.gain * g * g;
                let g = *m * self.momentum_correction;
                *p -= self.lr * g / ((*v * self.correction).sqrt() + self.eps);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BETAS: Betas = Betas { first: 0.0, second: 0.999, eps: 1e-8 };

    /// Textbook Adam in f64, run densely.
    fn textbook(betas: Betas, steps: u64, gradient: impl Fn(u64) -> f64) -> (f64, f64) {
        let (mut p, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
        for step in 1..=steps {
            let (g, t) = (gradient(step), step as i32);
            m = betas.first * m + (1.0 - betas.first) * g;
            v = betas.second * v + (1.0 - betas.second) * g * g;
            let mean = m / (1.0 - betas.first.powi(t));
            p -= 1e-2 * mean / ((v / (1.0 - betas.second.powi(t))).sqrt() + betas.eps);
        }
        (p, v)
    }

    /// A value with gradient only in some steps ends where textbook Adam puts it.
    #[test]
    fn lazy_decay_equals_the_dense_optimiser() {
        let gradient = |step: u64| if step.is_multiple_of(7) { (step as f64).sin() } else { 0.0 };
        let steps = 200u64;
        let (p, v) = textbook(BETAS, steps, gradient);
        let (mut lazy_p, mut lazy_v, mut last) = ([1.0f32], [0.0f32], 0);
        for step in (1..=steps).filter(|s| s.is_multiple_of(7)) {
            let adam = Adam::new(BETAS, 1e-2, step, last);
            adam.update(&mut lazy_p, &mut [], &mut lazy_v, &[gradient(step) as f32]);
            last = step;
        }
        assert!((f64::from(lazy_p[0]) - p).abs() < 1e-6, "{lazy_p:?} against {p}");
        let caught_up = f64::from(lazy_v[0]) * BETAS.second.powi((steps - last) as i32);
        assert!((caught_up - v).abs() < 1e-6 * v, "{caught_up} against {v}");
    }

    #[test]
    fn momentum_equals_the_dense_optimiser() {
        let betas = Betas { first: 0.9, ..BETAS };
        let gradient = |step: u64| (step as f64).sin();
        let (p, _) = textbook(betas, 200, gradient);
        let (mut values, mut first, mut second) = ([1.0f32], [0.0f32], [0.0f32]);
        for step in 1..=200 {
            let adam = Adam::new(betas, 1e-2, step, step - 1);
            adam.update(&mut values, &mut first, &mut second, &[gradient(step) as f32]);
        }
        assert!((f64::from(values[0]) - p).abs() < 1e-5, "{values:?} against {p}");
    }
}
