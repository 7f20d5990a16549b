//! What the language model loses when a tap's value is replaced by its reconstruction.
//!
//! Three passes over the same tokens: untouched, the tap replaced by `x̂`, the tap replaced by zero.
//! Positions the autoencoder was never trained on (special tokens, dropped positions, massive activations) keep their own
//! value in all three. Losses are compared on predictions made at a replaced position about a token at a
//! replaced position: what nothing was done to, and special tokens to come, do not count.
//!
//! ```text
//! delta loss = CE(x̂) − CE(clean)      loss recovered = (CE(0) − CE(x̂)) / (CE(0) − CE(clean))
//! ```

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shared::lm::{LanguageModel, LmError, Splicer, Tap, TokenBatch};
use shared::tap::TapPoint;
use shared::{Rows, ShapeError};

use crate::cpu::CpuBackend;
use crate::input_limit::{InputLimit, Outliers};
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

/// Accumulates losses batch by batch.
#[derive(Debug)]
pub struct SpliceMeter<'a> {
    backend: &'a CpuBackend,
    model: &'a LanguageModel,
    point: TapPoint,
    limit: InputLimit,
    n_kept: u64,
    totals: Totals,
}

impl<'a> SpliceMeter<'a> {
    /// Nothing seen yet; vectors beyond `limit` keep their own value too.
    #[must_use]
    pub fn new(
        backend: &'a CpuBackend,
        model: &'a LanguageModel,
        point: TapPoint,
        limit: InputLimit,
    ) -> Self {
        Self { backend, model, point, limit, n_kept: 0, totals: Totals::default() }
    }

    /// Adds sequences of `length` tokens; `kept` has one entry a token.
    ///
    /// # Errors
    /// If the model refuses the tokens, or tap and autoencoder do not fit.
    pub fn add(&mut self, ids: &[u32], length: usize, kept: &[bool]) -> Result<()> {
        let tokens = TokenBatch::new(ids, length)?;
        let mut outliers = Outliers::new(self.point, self.limit);
        let clean = self.model.forward_nll(tokens, &mut outliers)?;
        let mut kept = kept.to_vec();
        kept.iter_mut().zip(&outliers.long).for_each(|(kept, &long)| *kept |= long);
        let kept = kept.as_slice();
        self.n_kept += kept.iter().filter(|&&k| k).count() as u64;
        let reconstruct = |x: Rows<'_>| -> Result<Vec<f32>, LmError> {
            Ok(self.backend.encode(x).and_then(|codes| self.backend.decode(x, &codes))?)
        };
        let spliced = self.run(tokens, kept, reconstruct)?;
        let zero = self.run(tokens, kept, |x| Ok::<_, LmError>(vec![0.0; x.data().len()]))?;
        self.totals.add(&clean, &spliced, &zero, &counted(kept, length), length)?;
        Ok(())
    }

    fn run(
        &self,
        tokens: TokenBatch<'_>,
        kept: &[bool],
        replace: impl FnMut(Rows<'_>) -> Result<Vec<f32>, LmError>,
    ) -> Result<Vec<f32>> {
        let mut seen = Seen { inner: Splicer::new(self.point, kept.to_vec(), replace), visited: false };
        let losses = self.model.forward_nll(tokens, &mut seen)?;
        if !seen.visited {
            bail!("the model has no tap {}, so nothing could be spliced", self.point);
        }
        Ok(losses)
    }

    /// The report.
    ///
    /// # Errors
    /// If there was nothing to compare.
    pub fn finish(self) -> Result<SpliceReport> {
        self.totals.report(self.n_kept)
    }
}

/// Which predictions are compared, `[batch, length − 1]`: from a replaced position to a replaced position.
fn counted(kept: &[bool], length: usize) -> Vec<bool> {
    kept.chunks(length.max(1)).flat_map(|s| s.windows(2).map(|w| !w[0] && !w[1])).collect()
}

/// A tap that remembers whether the model ever asked it.
struct Seen<T> {
    inner: T,
    visited: bool,
}

impl<T: Tap> Tap for Seen<T> {
    fn wants(&self, point: TapPoint) -> bool {
        self.inner.wants(point)
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<shared::lm::TapAction, LmError> {
        self.visited = true;
        self.inner.visit(point, value)
    }
}

/// Sums of losses and of per-sequence differences.
#[derive(Debug, Default)]
struct Totals {
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

    fn report(&self, n_kept: u64) -> Result<SpliceReport> {
        if self.n == 0 {
            bail!("no predictions to compare: give more held-out sequences");
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (n, sequences) = (self.n as f64, self.differences.len() as f64);
        let (clean, spliced, zero) = (self.clean / n, self.spliced / n, self.zero / n);
        let mean = self.differences.iter().sum::<f64>() / sequences;
        let squares: f64 = self.differences.iter().map(|d| (d - mean).powi(2)).sum();
        Ok(SpliceReport {
            n_sequences: self.differences.len(),
            n_predictions: self.n,
            n_kept,
            ce_clean: clean,
            ce_spliced: spliced,
            ce_zero: zero,
            delta_loss: spliced - clean,
            delta_loss_error: (sequences > 1.0).then(|| (squares / (sequences - 1.0) / sequences).sqrt()),
            loss_recovered: (zero > clean).then(|| (zero - spliced) / (zero - clean)),
        })
    }
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
        let mut totals = Totals::default();
        let counted = [true, false, true, true];
        totals
            .add(&[1.0, 99.0, 2.0, 3.0], &[1.5, 0.0, 2.5, 4.5], &[5.0, 0.0, 6.0, 7.0], &counted, 3)
            .unwrap();
        let report = totals.report(2).unwrap();
        assert_eq!((report.n_sequences, report.n_predictions, report.n_kept), (2, 3, 2));
        assert_eq!((report.ce_clean, report.ce_zero), (2.0, 6.0));
        assert!((report.delta_loss - 2.5 / 3.0).abs() < 1e-12);
        assert!((report.loss_recovered.unwrap() - (1.0 - 2.5 / 12.0)).abs() < 1e-12);
        // Sequence means 0.5 and 1.0: standard error = (0.5 / √2) / √2.
        assert!((report.delta_loss_error.unwrap() - 0.25).abs() < 1e-12);
    }

    #[test]
    fn nothing_and_nonsense_are_errors() {
        assert!(Totals::default().report(0).is_err());
        let mut totals = Totals::default();
        assert!(totals.add(&[1.0], &[1.0, 2.0], &[1.0], &[true], 2).is_err());
        assert!(totals.add(&[1.0], &[f32::NAN], &[1.0], &[true], 2).is_err());
    }
}
