//! The scale and mean of the data, taken without its outliers, and the norm above which a vector is one.
//!
//! Language models put massive activations at a few positions (attention sinks): vectors a hundred times as
//! long as the rest, one in ten thousand. They would set the scalar C (a mean of squares) for everyone, and
//! one of them in a batch fires every latent its way and fills Adam's second moments with values that take
//! ten thousand steps to fade. Like BOS, whose norm is as enormous, they are not trained on.

use std::sync::Arc;

use anyhow::{Result, ensure};
use shared::config::train::Normalise;
use shared::fold::Scales;
use shared::{RowScaling, Rows};

use super::source::{ActivationSource, Statistics, Vectors, Wiring};

/// Rows that a scale, a mean and a median norm are taken from, at least, where there are so many.
const ENOUGH_ROWS: usize = 4096;

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
    /// Measures `vectors` of `source` at `tap`, scaled by `rows`; those longer, raw, than `max_norm` times the median norm are
    /// left out. With `max_norm` 0 nothing is, and of vectors not scaled the source's own scale and mean are taken.
    ///
    /// # Errors
    /// If the vectors cannot be read, or are nothing but zeros.
    pub fn measure(
        source: &dyn ActivationSource,
        tap: usize,
        vectors: impl FnOnce() -> Result<Vectors>,
        max_norm: f64,
        rows: RowScaling,
    ) -> Result<Self> {
        if max_norm <= 0.0 && rows.is_none() {
            let Statistics { scale, mean } = source.statistics(tap)?;
            return Ok(Self { scale, mean, limit: f64::INFINITY });
        }
        let vectors = vectors()?;
        let width = source.taps()[tap].width;
        // What is not finite is the guard's to see, and says nothing about scales.
        let norms = vectors.chunks_exact(width).map(norm);
        let mut norms: Vec<f64> = norms.filter(|norm| norm.is_finite()).collect();
        ensure!(!norms.is_empty(), "the first vectors are none, or not finite");
        let middle = norms.len() / 2;
        let median = *norms.select_nth_unstable_by(middle, f64::total_cmp).1;
        let limit = if max_norm > 0.0 { max_norm * median } else { f64::INFINITY };
        let kept: Vec<f32> = vectors
            .chunks_exact(width)
            .filter(|row| norm(row) <= limit.min(f64::MAX))
            .flatten()
            .copied()
            .collect();
        let scaled = rows.scaled(Rows::new(&kept, width)?);
        let Statistics { scale, mean } = Statistics::of(&scaled, width, |_| true)?;
        // Standardised vectors have one length but for the ε: all taps get the same C, and share the weights.
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        let scale = if rows.is_none() { scale } else { ((width - 1).max(1) as f64).sqrt() };
        Ok(Self { scale, mean, limit })
    }

    /// Whether a raw vector is trained on; one that is not finite is, so that the guard sees it.
    #[must_use]
    pub fn keeps(&self, row: &[f32]) -> bool {
        self.keeps_norm(norm(row))
    }

    /// [`Normalisation::keeps`] of a raw vector of this norm.
    #[must_use]
    pub fn keeps_norm(&self, norm: f64) -> bool {
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
    /// How every input is scaled on its own, first.
    pub rows: RowScaling,
    /// Of the inputs, tap by tap.
    pub inputs: Vec<Normalisation>,
    /// Of the targets, where they are not the inputs.
    pub target: Option<Normalisation>,
}

impl Scaling {
    /// Measures all taps of `wiring`.
    ///
    /// # Errors
    /// As [`Normalisation::measure`].
    pub fn measure(
        source: &dyn ActivationSource,
        wiring: &Wiring,
        max_norm: f64,
        normalise: Normalise,
    ) -> Result<Self> {
        let rows = row_scaling(normalise);
        let taps = wiring.taps();
        let several = several_shards(source, &taps)?;
        let measure = |tap: &usize| {
            let vectors = || match (&several, taps.iter().position(|other| other == tap)) {
                (Some(several), Some(at)) => Ok(Arc::clone(&several[at])),
                _ => Ok(source.read(0, &[*tap])?.remove(0)),
            };
            Normalisation::measure(source, *tap, vectors, max_norm, rows)
        };
        Ok(Self {
            rows,
            inputs: wiring.inputs.iter().map(measure).collect::<Result<_>>()?,
            target: wiring.target.as_ref().map(measure).transpose()?,
        })
    }

    /// Width of the inputs, and of what is reconstructed.
    #[must_use]
    pub fn widths(&self) -> [usize; 2] {
        let input = self.inputs.first().map_or(0, |input| input.mean.len());
        [input, self.target.as_ref().map_or(input, |target| target.mean.len())]
    }

    /// The mean of the normalised inputs, tap by tap of equal weight.
    #[must_use]
    pub fn input_mean(&self) -> Vec<f64> {
        mean_of(&self.inputs)
    }

    /// The mean of what is reconstructed, normalised.
    #[must_use]
    pub fn output_mean(&self) -> Vec<f64> {
        mean_of(self.outputs())
    }

    /// The mean squared distance of what is reconstructed, normalised, from the mean of its tap.
    #[must_use]
    pub fn variance(&self) -> f64 {
        let outputs = self.outputs();
        #[expect(clippy::cast_precision_loss, reason = "a number of taps")]
        let n = outputs.len().max(1) as f64;
        outputs.iter().map(Normalisation::variance).sum::<f64>() / n
    }

    /// The scales that the weights are released with: those of a single tap; of several taps without a common scale, each keeps
    /// its own beside the weights.
    #[must_use]
    pub fn released(&self) -> Scales {
        let one = |of: &[Normalisation]| match of {
            [first, rest @ ..] if rest.iter().all(|other| other.scale == first.scale) => first.scale,
            _ => 1.0,
        };
        Scales { input: one(&self.inputs), output: one(self.outputs()) }
    }

    fn outputs(&self) -> &[Normalisation] {
        self.target.as_ref().map_or(&self.inputs, std::slice::from_ref)
    }
}

/// Where the first shard has too few rows to tell scales from, those of so many shards that there are enough, at each of
/// `taps`.
fn several_shards(source: &dyn ActivationSource, taps: &[usize]) -> Result<Option<Vec<Vectors>>> {
    let Some(&first) = taps.first() else { return Ok(None) };
    let width = source.taps()[first].width;
    if source.n_shards() < 2 || source.read(0, &[first])?[0].len() >= ENOUGH_ROWS * width {
        return Ok(None);
    }
    let mut all: Vec<Vec<f32>> = vec![Vec::new(); taps.len()];
    for shard in 0..source.n_shards() {
        for (all, vectors) in all.iter_mut().zip(source.read(shard, taps)?) {
            all.extend(vectors.iter());
        }
        if all[0].len() >= ENOUGH_ROWS * width {
            break;
        }
    }
    Ok(Some(all.into_iter().map(Arc::new).collect()))
}

/// What a configuration means by `normalise`.
#[must_use]
pub fn row_scaling(normalise: Normalise) -> RowScaling {
    match normalise {
        Normalise::Scalar => RowScaling::None,
        Normalise::Standardise => RowScaling::LAYER_NORM,
    }
}

fn mean_of(taps: &[Normalisation]) -> Vec<f64> {
    let mut mean = vec![0.0; taps.first().map_or(0, |tap| tap.mean.len())];
    #[expect(clippy::cast_precision_loss, reason = "a number of taps")]
    let n = taps.len() as f64;
    for tap in taps {
        mean.iter_mut().zip(&tap.mean).for_each(|(mean, m)| *mean += m / tap.scale / n);
    }
    mean
}

/// The norm of a raw vector.
pub(super) fn norm(row: &[f32]) -> f64 {
    shared::reference::dot(row, row).sqrt()
}
