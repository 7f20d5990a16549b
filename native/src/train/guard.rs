//! Batches that must not be learned from: not finite, or with an error far above what is usual.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shared::loss::Losses;

/// A batch whose error is this many times the running mean is not learned from.
const EXPLODED: f64 = 20.0;
/// Weight of the newest batch in the running mean.
const NEWEST: f64 = 0.05;
/// So many bad batches in a row end the run.
const TOO_MANY: u32 = 16;

/// Watches the loss.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Bits of the running mean of the squared error; `None` before the first batch.
    running_bits: Option<u64>,
    in_a_row: u32,
    /// Batches skipped in all.
    pub skipped: u64,
}

impl Guard {
    /// Whether to learn from a batch with these losses.
    ///
    /// # Errors
    /// If too many batches in a row were bad.
    pub fn accept(&mut self, losses: &Losses) -> Result<bool> {
        let running = self.running_bits.map(f64::from_bits);
        let usual = running.is_none_or(|running| losses.mse <= EXPLODED * running);
        if losses.total().is_finite() && usual {
            let running = running.map_or(losses.mse, |r| r + NEWEST * (losses.mse - r));
            self.running_bits = Some(running.to_bits());
            self.in_a_row = 0;
            return Ok(true);
        }
        self.skipped += 1;
        self.in_a_row += 1;
        if self.in_a_row >= TOO_MANY {
            bail!(
                "{TOO_MANY} batches in a row could not be learned from (last squared error {:.3e}, usual {:.3e}); \
                 the last checkpoint is untouched: look at the data, or resume with a lower lr",
                losses.mse,
                running.unwrap_or(f64::NAN),
            );
        }
        Ok(false)
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
        assert!(!guard.accept(&losses(f64::NAN)).unwrap());
        assert!(guard.accept(&losses(1.0)).unwrap());
        assert!(!guard.accept(&losses(f64::INFINITY)).unwrap());
        assert!(!guard.accept(&losses(21.0)).unwrap());
        assert!(guard.accept(&losses(19.0)).unwrap());
        assert_eq!(guard.skipped, 3);
    }

    #[test]
    fn repeating_ones_end_the_run() {
        let mut guard = Guard::default();
        let outcomes: Vec<bool> = (0..TOO_MANY).map(|_| guard.accept(&losses(f64::NAN)).is_err()).collect();
        assert_eq!(outcomes.iter().position(|&failed| failed), Some(TOO_MANY as usize - 1));
    }
}
