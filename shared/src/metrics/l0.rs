//! Mean number of active latents a row: `L0 = mean_x ‖f(x)‖₀` (arXiv 2408.05147 §4).

use super::ratio;
use crate::codes::Codes;

/// Counts rows and active latents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct L0 {
    n_rows: u64,
    n_active: u64,
}

impl L0 {
    /// Nothing seen yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the rows of `codes`.
    pub fn update(&mut self, codes: &Codes) {
        self.add(codes.n_rows() as u64, codes.n_active() as u64);
    }

    /// Adds `n_rows` rows that together have `n_active` active latents.
    pub fn add(&mut self, n_rows: u64, n_active: u64) {
        self.n_rows += n_rows;
        self.n_active += n_active;
    }

    /// Adds what another accumulator has seen.
    pub fn merge(&mut self, other: &Self) {
        self.add(other.n_rows, other.n_active);
    }

    /// Rows seen.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// Active latents a row on average; `None` before the first row.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        ratio(self.n_active, self.n_rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::CodesBuilder;

    #[test]
    fn is_a_mean_over_rows_not_over_batches() {
        let mut builder = CodesBuilder::new(5);
        for latent in [0, 2, 4] {
            builder.push(latent, 1.0);
        }
        builder.end_row().unwrap();
        let three = builder.finish();
        let mut builder = CodesBuilder::new(5);
        for _ in 0..3 {
            builder.end_row().unwrap();
        }
        let silent = builder.finish();

        let mut l0 = L0::new();
        assert_eq!(l0.mean(), None);
        l0.update(&three);
        assert_eq!(l0.mean(), Some(3.0));
        let mut other = L0::new();
        other.update(&silent);
        l0.merge(&other);
        assert_eq!((l0.mean(), l0.n_rows()), (Some(0.75), 4));
    }
}
