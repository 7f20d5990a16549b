//! The scale and mean of the data, taken without its outliers, and the norm above which a vector is one.
//!
//! Language models put massive activations at a few positions (attention sinks): vectors a hundred times as
//! long as the rest, one in ten thousand. They would set the scalar C (a mean of squares) for everyone, and
//! one of them in a batch fires every latent its way and fills Adam's second moments with values that take
//! ten thousand steps to fade. Like BOS, whose norm is as enormous, they are not trained on.

use anyhow::{Result, ensure};

use super::source::{ActivationSource, Statistics, Wiring};

/// How raw vectors of one tap become training rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalisation {
    /// The scalar C that vectors are divided by: C² = mean ‖x‖² of the vectors kept.
    pub scale: f64,
    /// The mean of the vectors kept, raw, `[width]`.
    pub mean: Vec<f64>,
    /// Vectors longer than this, raw, are left out; infinite keeps all.
    pub limit: f64,
}

impl Normalisation {
    /// Measures the first shard of `source` at `tap`; vectors longer than `max_norm` times the median norm are left out.
    /// With `max_norm` 0 nothing is, and the source's own scale and mean are taken.
    ///
    /// # Errors
    /// If the shard cannot be read, or holds nothing but zeros.
    pub fn measure(source: &dyn ActivationSource, tap: usize, max_norm: f64) -> Result<Self> {
        if max_norm <= 0.0 {
            let Statistics { scale, mean } = source.statistics(tap)?;
            return Ok(Self { scale, mean, limit: f64::INFINITY });
        }
        let vectors = source.read(0, &[tap])?.remove(0);
        let width = source.taps()[tap].width;
        let mut norms: Vec<f64> = vectors.chunks_exact(width).map(norm).collect();
        ensure!(!norms.is_empty(), "the first shard holds no vectors");
        let middle = norms.len() / 2;
        let limit = max_norm * *norms.select_nth_unstable_by(middle, f64::total_cmp).1;
        let Statistics { scale, mean } = Statistics::of(&vectors, width, |row| norm(row) <= limit)?;
        Ok(Self { scale, mean, limit })
    }

    /// Whether a raw vector is trained on; one that is not finite is, so that the guard sees it.
    #[must_use]
    pub fn keeps(&self, row: &[f32]) -> bool {
        let norm = norm(row);
        norm <= self.limit || !norm.is_finite()
    }

    /// mean ‖x − x̄‖² of the normalised data.
    #[must_use]
    pub fn variance(&self) -> f64 {
        let mean: f64 = self.mean.iter().map(|m| (m / self.scale).powi(2)).sum();
        (1.0 - mean).max(f64::MIN_POSITIVE)
    }
}

/// How raw inputs and targets become training rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaling {
    /// Of the inputs.
    pub input: Normalisation,
    /// Of the targets, where they are not the inputs.
    pub target: Option<Normalisation>,
}

impl Scaling {
    /// Measures both taps of `wiring`.
    ///
    /// # Errors
    /// As [`Normalisation::measure`].
    pub fn measure(source: &dyn ActivationSource, wiring: Wiring, max_norm: f64) -> Result<Self> {
        let measure = |tap| Normalisation::measure(source, tap, max_norm);
        Ok(Self { input: measure(wiring.input)?, target: wiring.target.map(measure).transpose()? })
    }

    /// Of what is reconstructed.
    #[must_use]
    pub fn output(&self) -> &Normalisation {
        self.target.as_ref().unwrap_or(&self.input)
    }
}

fn norm(row: &[f32]) -> f64 {
    shared::reference::dot(row, row).sqrt()
}
