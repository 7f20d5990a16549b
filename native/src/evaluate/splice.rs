//! What the language model loses when a tap's value is replaced by its reconstruction.
//!
//! Three passes over the same tokens: untouched, the tap replaced by `x̂`, the tap replaced by zero. (For a transcoder the tap
//! that is replaced is the one it reconstructs.)
//! Positions the autoencoder was never trained on (special tokens, dropped positions, massive activations) keep their own
//! value in all three. Losses are compared on predictions made at a replaced position about a token at a
//! replaced position: what nothing was done to, and special tokens to come, do not count.
//!
//! ```text
//! delta loss = CE(x̂) − CE(clean)      loss recovered = (CE(0) − CE(x̂)) / (CE(0) − CE(clean))
//! ```

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shared::lm::{LanguageModel, LmError, Splicer, Tap, TapAction, TokenBatch};
use shared::tap::{Site, TapPoint};
use shared::{Rows, ShapeError};

use super::Subject;
use crate::store::Tokens;

/// Measured in the language model; all losses in nats a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpliceReport {
    /// Sequences run.
    pub n_sequences: usize,
    /// Predictions compared.
    pub n_predictions: u64,
    /// Positions that kept their own value: special tokens, dropped positions, massive activations.
    pub n_kept: u64,
    /// Loss of the untouched model.
    pub ce_clean: f64,
    /// Loss with the tap replaced by its reconstruction.
    pub ce_spliced: f64,
    /// Loss with the tap replaced by zero.
    pub ce_zero: f64,
    /// `ce_spliced − ce_clean`.
    pub delta_loss: f64,
    /// Standard error of `delta_loss` over sequences; absent for a single sequence.
    pub delta_loss_error: Option<f64>,
    /// `(ce_zero − ce_spliced) / (ce_zero − ce_clean)`; absent when removing the tap costs nothing.
    pub loss_recovered: Option<f64>,
}

/// Which of all token positions keep their own activation, `[n_sequences · sequence_length]`: those whose
/// vectors are not `stored` (by position and token id), because the autoencoder was never trained on them.
#[must_use]
pub fn kept_positions(tokens: &Tokens, stored: impl Fn(usize, u32) -> bool) -> Vec<bool> {
    let position = |i: usize| i % tokens.sequence_length.max(1);
    tokens.ids.iter().enumerate().map(|(i, &id)| !stored(position(i), id)).collect()
}

/// Accumulates the losses of any number of autoencoders batch by batch.
///
/// The untouched model runs once for all of them, and each goes on from the block of its tap.
#[derive(Debug)]
pub struct SpliceMeter<'a> {
    model: &'a LanguageModel,
    subjects: Vec<(&'a Subject, Totals)>,
}

impl<'a> SpliceMeter<'a> {
    /// Nothing seen yet; vectors beyond a subject's limit keep their own value too.
    #[must_use]
    pub fn new(model: &'a LanguageModel, subjects: &'a [Subject]) -> Self {
        Self { model, subjects: subjects.iter().map(|subject| (subject, Totals::default())).collect() }
    }

    /// Adds sequences of `length` tokens; `kept` has one entry a token.
    ///
    /// # Errors
    /// If the model refuses the tokens, or tap and autoencoder do not fit.
    pub fn add(&mut self, ids: &[u32], length: usize, kept: &[bool]) -> Result<()> {
        let tokens = TokenBatch::new(ids, length)?;
        let mut seen = Untouched::new(self.subjects.iter().map(|(subject, _)| subject.input));
        let clean = self.model.forward_nll(tokens, &mut seen)?;
        let mut without: Vec<(TapPoint, Vec<bool>, Vec<f32>)> = Vec::new();
        for (subject, totals) in &mut self.subjects {
            let mut kept = kept.to_vec();
            let input = seen.value(subject.input)?;
            kept.iter_mut().zip(input.iter()).for_each(|(kept, x)| *kept |= !subject.limit.keeps(x));
            totals.n_kept += kept.iter().filter(|&&k| k).count() as u64;
            let go_on = |tap: &mut dyn Tap| -> Result<Vec<f32>> {
                let Some((before, first)) = start(subject.input) else {
                    return Ok(self.model.forward_nll(tokens, tap)?);
                };
                Ok(self.model.forward_nll_from(tokens, seen.value(before)?, first, tap)?)
            };
            let written = subject.reconstruct(input, &kept)?;
            let spliced = go_on(&mut Written { point: subject.output, rows: Some(written), kept: &kept })?;
            let known = without.iter().position(|(point, mask, _)| (*point, mask) == (subject.output, &kept));
            let known = match known {
                Some(known) => known,
                None => {
                    let mut nothing = Written { point: subject.output, rows: None, kept: &kept };
                    without.push((subject.output, kept.clone(), go_on(&mut nothing)?));
                    without.len() - 1
                }
            };
            totals.add(&clean, &spliced, &without[known].2, &counted(&kept, length), length)?;
        }
        Ok(())
    }

    /// The reports, in the order of the subjects.
    ///
    /// # Errors
    /// If there was nothing to compare.
    pub fn finish(self) -> Result<Vec<SpliceReport>> {
        self.subjects.iter().map(|(_, totals)| totals.report()).collect()
    }
}

/// The tap that holds the residual stream a block reads, and the block, from which on everything at `point` can be run
/// again; none for the embedding, which is the beginning.
pub(super) fn start(point: TapPoint) -> Option<(TapPoint, usize)> {
    match (point.site, point.layer) {
        (Site::Embed, _) => None,
        (_, 0) => Some((TapPoint::new(Site::Embed, 0), 0)),
        (_, layer) => Some((TapPoint::new(Site::Resid, layer - 1), layer)),
    }
}

/// Values of the untouched model: the inputs of autoencoders, and where to go on from.
pub(super) struct Untouched(BTreeMap<TapPoint, (usize, Vec<f32>)>);

impl Untouched {
    /// To be seen at `points`.
    pub(super) fn new(points: impl Iterator<Item = TapPoint>) -> Self {
        let points = points.flat_map(|point| [Some(point), start(point).map(|(before, _)| before)]);
        Self(points.flatten().map(|point| (point, (0, Vec::new()))).collect())
    }

    pub(super) fn value(&self, point: TapPoint) -> Result<Rows<'_>> {
        match self.0.get(&point) {
            Some((width, rows)) if *width > 0 => Ok(Rows::new(rows, *width)?),
            _ => bail!("the model has no tap {point}, so nothing could be spliced"),
        }
    }
}

impl Tap for Untouched {
    fn wants(&self, point: TapPoint) -> bool {
        self.0.contains_key(&point)
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.0.insert(point, (value.width(), value.data().to_vec()));
        Ok(TapAction::Keep)
    }
}

/// Puts rows, or zeros, in the place of what is at `point`, except at kept positions.
pub(super) struct Written<'k> {
    pub(super) point: TapPoint,
    /// One a position that is not kept.
    pub(super) rows: Option<Vec<f32>>,
    pub(super) kept: &'k [bool],
}

impl Tap for Written<'_> {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.point
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        let mut rows = self.rows.take();
        let replace = |x: Rows<'_>| Ok(rows.take().unwrap_or_else(|| vec![0.0; x.data().len()]));
        Splicer::new(point, self.kept.to_vec(), replace).visit(point, value)
    }
}

/// Which predictions are compared, `[batch, length − 1]`: from a replaced position to a replaced position.
pub(super) fn counted(kept: &[bool], length: usize) -> Vec<bool> {
    kept.chunks(length.max(1)).flat_map(|s| s.windows(2).map(|w| !w[0] && !w[1])).collect()
}

/// Sums of losses and of per-sequence differences.
#[derive(Debug, Default)]
struct Totals {
    n_kept: u64,
    n: u64,
    clean: f64,
    spliced: f64,
    zero: f64,
    /// Mean difference of each sequence.
    differences: Vec<f64>,
}

impl Totals {
    fn add(
        &mut self,
        clean: &[f32],
        spliced: &[f32],
        zero: &[f32],
        counted: &[bool],
        length: usize,
    ) -> Result<()> {
        for (name, losses) in [("clean", clean), ("spliced", spliced), ("zero", zero)] {
            if losses.len() != counted.len() {
                let (shape, expected, found) = (vec![counted.len()], counted.len(), losses.len());
                return Err(ShapeError::Length { name: "losses", shape, expected, found }.into());
            }
            if let Some(bad) = losses.iter().find(|l| !l.is_finite()) {
                bail!("the {name} pass gave a loss of {bad}");
            }
        }
        let per_sequence = length.saturating_sub(1).max(1);
        for start in (0..counted.len()).step_by(per_sequence) {
            let (mut n, mut difference) = (0u32, 0.0);
            for i in (start..start + per_sequence).filter(|&i| counted[i]) {
                let (c, s, z) = (f64::from(clean[i]), f64::from(spliced[i]), f64::from(zero[i]));
                (self.clean, self.spliced, self.zero) = (self.clean + c, self.spliced + s, self.zero + z);
                (n, difference) = (n + 1, difference + s - c);
            }
            if n > 0 {
                self.n += u64::from(n);
                self.differences.push(difference / f64::from(n));
            }
        }
        Ok(())
    }

    fn report(&self) -> Result<SpliceReport> {
        if self.n == 0 {
            bail!("no predictions to compare: give more held-out sequences");
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = self.n as f64;
        let (clean, spliced, zero) = (self.clean / n, self.spliced / n, self.zero / n);
        Ok(SpliceReport {
            n_sequences: self.differences.len(),
            n_predictions: self.n,
            n_kept: self.n_kept,
            ce_clean: clean,
            ce_spliced: spliced,
            ce_zero: zero,
            delta_loss: spliced - clean,
            delta_loss_error: standard_error(&self.differences),
            loss_recovered: (zero > clean).then(|| (zero - spliced) / (zero - clean)),
        })
    }
}

/// The standard error of the mean of `values`; `None` for fewer than two.
pub(super) fn standard_error(values: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (n > 1.0).then(|| (squares / (n - 1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_are_dropped_positions_and_special_tokens() {
        let tokens = Tokens { sequence_length: 3, ids: vec![5, 1, 5, 5, 5, 1] };
        let kept = kept_positions(&tokens, |position, id| position != 0 && id != 1);
        assert_eq!(kept, [true, true, false, true, false, true]);
        assert_eq!(counted(&kept, 3), [false, false, false, false]);
        assert_eq!(counted(&[true, false, false, true, false, false], 3), [false, true, false, true]);
    }

    #[test]
    fn totals_follow_the_definitions_and_the_mask() {
        let mut totals = Totals { n_kept: 2, ..Totals::default() };
        let counted = [true, false, true, true];
        totals
            .add(&[1.0, 99.0, 2.0, 3.0], &[1.5, 0.0, 2.5, 4.5], &[5.0, 0.0, 6.0, 7.0], &counted, 3)
            .unwrap();
        let report = totals.report().unwrap();
        assert_eq!((report.n_sequences, report.n_predictions, report.n_kept), (2, 3, 2));
        assert_eq!((report.ce_clean, report.ce_zero), (2.0, 6.0));
        assert!((report.delta_loss - 2.5 / 3.0).abs() < 1e-12);
        assert!((report.loss_recovered.unwrap() - (1.0 - 2.5 / 12.0)).abs() < 1e-12);
        // Sequence means 0.5 and 1.0: standard error = (0.5 / √2) / √2.
        assert!((report.delta_loss_error.unwrap() - 0.25).abs() < 1e-12);
    }

    #[test]
    fn nothing_and_nonsense_are_errors() {
        assert!(Totals::default().report().is_err());
        let mut totals = Totals::default();
        assert!(totals.add(&[1.0], &[1.0, 2.0], &[1.0], &[true], 2).is_err());
        assert!(totals.add(&[1.0], &[f32::NAN], &[1.0], &[true], 2).is_err());
    }
}
