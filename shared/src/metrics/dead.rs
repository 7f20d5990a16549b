//! Dead latents: those that did not fire once in the last so many rows.

use super::ratio;
use crate::codes::Codes;
use crate::error::ShapeError;

/// Remembers for every latent the last row in which it fired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dead {
    n_rows: u64,
    /// One more than the index of the last row that fired; 0 = never.
    last_fired: Vec<u64>,
}

impl Dead {
    /// Nothing seen yet, for `n_latents` latents.
    #[must_use]
    pub fn new(n_latents: usize) -> Self {
        Self { n_rows: 0, last_fired: vec![0; n_latents] }
    }

    /// Continues from a saved state: rows seen, and per latent one more than the index of the last row
    /// in which it fired (0 = never).
    ///
    /// # Errors
    /// If a latent claims to have fired after the last row.
    pub fn resume(n_rows: u64, last_fired: Vec<u64>) -> Result<Self, ShapeError> {
        match last_fired.iter().position(|&row| row > n_rows) {
            None => Ok(Self { n_rows, last_fired }),
            Some(index) => Err(ShapeError::Value {
                name: "last fired rows",
                index,
                value: last_fired[index].to_string(),
                expected: "at most the number of rows seen",
            }),
        }
    }

    /// Adds the rows of `codes`, in order.
    ///
    /// # Errors
    /// If the codes index another dictionary width.
    pub fn update(&mut self, codes: &Codes) -> Result<(), ShapeError> {
        if codes.n_latents() != self.last_fired.len() {
            let (expected, found) = (self.last_fired.len(), codes.n_latents());
            return Err(ShapeError::Width { name: "codes", expected, found });
        }
        for (latents, _) in codes.iter() {
            self.n_rows += 1;
            for &latent in latents {
                self.last_fired[latent as usize] = self.n_rows;
            }
        }
        Ok(())
    }

    /// Adds `n_rows` rows of which only the set of latents that fired is known; they count as having
    /// fired in the last of those rows. Latents outside the dictionary are ignored.
    pub fn update_fired(&mut self, n_rows: u64, fired: impl IntoIterator<Item = u32>) {
        self.n_rows += n_rows;
        for latent in fired {
            if let Some(last) = self.last_fired.get_mut(latent as usize) {
                *last = self.n_rows;
            }
        }
    }

    /// Counts latents as having fired in the last row: they have just been begun again. Others are ignored.
    pub fn revive(&mut self, latents: impl IntoIterator<Item = u32>) {
        self.update_fired(0, latents);
    }

    /// Rows seen.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// Per latent one more than the index of the last row in which it fired, 0 = never, `[n]`.
    #[must_use]
    pub fn last_fired(&self) -> &[u64] {
        &self.last_fired
    }

    /// The share of latents that did not fire in the last `window` rows (or in all rows, when fewer were
    /// seen); `None` before the first row.
    #[must_use]
    pub fn share_within(&self, window: u64) -> Option<f64> {
        let horizon = self.n_rows.saturating_sub(window);
        let dead = self.last_fired.iter().filter(|&&row| row <= horizon).count() as u64;
        ratio(dead, self.last_fired.len() as u64).filter(|_| self.n_rows > 0)
    }

    /// Which latents did not fire in the last `window` rows, `[n]`; none as long as fewer rows were seen.
    #[must_use]
    pub fn mask_within(&self, window: u64) -> Vec<bool> {
        let horizon = self.n_rows.checked_sub(window);
        self.last_fired.iter().map(|&row| horizon.is_some_and(|horizon| row <= horizon)).collect()
    }

    /// The share of latents that never fired; `None` before the first row.
    #[must_use]
    pub fn share(&self) -> Option<f64> {
        self.share_within(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::CodesBuilder;

    fn rows(fired: &[&[u32]]) -> Codes {
        let mut builder = CodesBuilder::new(4);
        for row in fired {
            for &latent in *row {
                builder.push(latent, 1.0);
            }
            builder.end_row().unwrap();
        }
        builder.finish()
    }

    #[test]
    fn never_fired_and_not_fired_lately_differ() {
        let mut dead = Dead::new(4);
        assert_eq!(dead.share(), None);
        dead.update(&rows(&[&[0, 1], &[1], &[1, 2]])).unwrap();
        assert_eq!(dead.share(), Some(0.25));
        assert_eq!(dead.share_within(1), Some(0.5));
        assert_eq!(dead.share_within(2), Some(0.5));
        assert_eq!(dead.share_within(3), Some(0.25));
        assert_eq!(dead.mask_within(2), [true, false, false, true]);
        assert_eq!(dead.mask_within(4), [false; 4]);
        let mut resumed = Dead::resume(dead.n_rows(), dead.last_fired().to_vec()).unwrap();
        resumed.update(&rows(&[&[3]])).unwrap();
        assert_eq!((resumed.share(), resumed.share_within(1)), (Some(0.0), Some(0.75)));
    }

    #[test]
    fn sets_of_a_batch_count_as_its_last_row() {
        let mut dead = Dead::new(4);
        dead.update_fired(10, [0, 3, 99]);
        dead.update_fired(5, [0]);
        assert_eq!((dead.share(), dead.share_within(5)), (Some(0.5), Some(0.75)));
    }

    #[test]
    fn refuses_other_widths_and_impossible_states() {
        assert!(Dead::new(3).update(&rows(&[&[0]])).is_err());
        assert!(Dead::resume(2, vec![3]).is_err());
    }
}
