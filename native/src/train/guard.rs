//! Batches that must not be learned from: not finite, or with an error far above what is usual; and when it is not the
//! batches but what was learned that is bad.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shared::loss::Losses;

/// A batch whose error is this many times the running mean is not learned from.
const EXPLODED: f64 = 20.0;
/// Weight of the newest batch in the running mean.
const NEWEST: f64 = 0.05;
/// So many bad batches in a row say that the parameters are bad.
const TOO_MANY: u32 = 16;
/// So often a run may go back to earlier parameters.
const RETRIES: u32 = 3;

/// Watches the loss.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Bits of the running mean of the squared error; `None` before the first batch.
    running_bits: Option<u64>,
    in_a_row: u32,
    /// Batches skipped in all.
    pub skipped: u64,
    /// How often earlier parameters were taken up again.
    pub rolled_back: u32,
}

/// What to do about a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Learn from it.
    Learn,
    /// Leave it.
    Skip,
    /// Leave it, and go back to earlier parameters.
    RollBack,
}

impl Guard {
    /// Whether the last batch was learned from.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.in_a_row == 0
    }

    /// The guard of a run that has gone back to `earlier`.
    #[must_use]
    pub fn after_rolling_back(&self, earlier: &Self) -> Self {
        Self { skipped: self.skipped, rolled_back: self.rolled_back + 1, in_a_row: 0, ..earlier.clone() }
    }

    /// What to do about a batch with these losses.
    ///
    /// # Errors
    /// If too many batches in a row were bad although earlier parameters were tried.
    pub fn accept(&mut self, losses: &Losses) -> Result<Verdict> {
        let running = self.running_bits.map(f64::from_bits);
        let usual = running.is_none_or(|running| losses.mse <= EXPLODED * running);
        if losses.total().is_finite() && usual {
            let running = running.map_or(losses.mse, |r| r + NEWEST * (losses.mse - r));
            self.running_bits = Some(running.to_bits());
            self.in_a_row = 0;
            return Ok(Verdict::Learn);
        }
        self.skipped += 1;
        self.in_a_row += 1;
        if self.in_a_row < TOO_MANY {
            return Ok(Verdict::Skip);
        }
        if self.rolled_back >= RETRIES {
            bail!(
                "{TOO_MANY} batches in a row could not be learned from (last squared error {:.3e}, usual {:.3e}), after \
                 going back to earlier parameters {RETRIES} times; the last checkpoint is untouched: look at the data, \
                 or train with a lower lr",
                losses.mse,
                running.unwrap_or(f64::NAN),
            );
        }
        Ok(Verdict::RollBack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(mse: f64) -> Losses {
        Losses { mse, reconstruction: mse, sparsity: 0.0, auxiliary: 0.0, l0: 1.0 }
    }

    #[test]
    fn bad_batches_are_skipped_and_counted() {
        let mut guard = Guard::default();
        let mses = [f64::NAN, 1.0, f64::INFINITY, 21.0, 19.0];
        let verdicts = mses.map(|mse| guard.accept(&losses(mse)).unwrap());
        assert_eq!(verdicts, [Verdict::Skip, Verdict::Learn, Verdict::Skip, Verdict::Skip, Verdict::Learn]);
        assert_eq!(guard.skipped, 3);
    }

    #[test]
    fn repeating_ones_go_back_and_then_end_the_run() {
        let mut guard = Guard::default();
        for back in 0..RETRIES {
            let verdicts: Vec<_> = (0..TOO_MANY).map(|_| guard.accept(&losses(f64::NAN)).unwrap()).collect();
            let at = verdicts.iter().position(|verdict| *verdict == Verdict::RollBack);
            assert_eq!(at, Some(TOO_MANY as usize - 1));
            guard = guard.after_rolling_back(&Guard::default());
            assert_eq!((guard.rolled_back, guard.skipped), (back + 1, u64::from((back + 1) * TOO_MANY)));
        }
        let outcomes: Vec<bool> = (0..TOO_MANY).map(|_| guard.accept(&losses(f64::NAN)).is_err()).collect();
        assert_eq!(outcomes.iter().position(|&failed| failed), Some(TOO_MANY as usize - 1));
    }
}
