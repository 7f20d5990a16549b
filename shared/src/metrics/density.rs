//! Firing density: the share of rows in which a latent is active, and its histogram on a log10 scale.

use super::ratio;
use crate::codes::Codes;
use crate::error::ShapeError;

/// Counts in how many rows each latent was active.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Density {
    n_rows: u64,
    counts: Vec<u64>,
}

impl Density {
    /// Nothing seen yet, for `n_latents` latents.
    #[must_use]
    pub fn new(n_latents: usize) -> Self {
        Self { n_rows: 0, counts: vec![0; n_latents] }
    }

    /// Adds the rows of `codes`.
    ///
    /// # Errors
    /// If the codes index another dictionary width.
    pub fn update(&mut self, codes: &Codes) -> Result<(), ShapeError> {
        check_width(&self.counts, codes.n_latents())?;
        self.n_rows += codes.n_rows() as u64;
        for (latents, _) in codes.iter() {
            for &latent in latents {
                self.counts[latent as usize] += 1;
            }
        }
        Ok(())
    }

    /// Adds what another accumulator has seen.
    ///
    /// # Errors
    /// If it counts another number of latents.
    pub fn merge(&mut self, other: &Self) -> Result<(), ShapeError> {
        check_width(&self.counts, other.counts.len())?;
        self.n_rows += other.n_rows;
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        Ok(())
    }

    /// Rows seen.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// Rows in which each latent was active, `[n]`.
    #[must_use]
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Share of rows in which each latent was active, `[n]` in `[0, 1]`; all 0 before the first row.
    #[must_use]
    pub fn densities(&self) -> Vec<f64> {
        self.counts.iter().map(|&count| ratio(count, self.n_rows).unwrap_or(0.0)).collect()
    }

    /// The densities of latents that fired, binned by log10 between `10^lowest` and 1.
    ///
    /// `bins_per_decade` bins of equal width on the log scale; densities below `10^lowest` count in the
    /// first bin, and latents that never fired in [`Log10Histogram::n_never`].
    #[must_use]
    pub fn log10_histogram(&self, lowest: i32, bins_per_decade: u32) -> Log10Histogram {
        let per_decade = bins_per_decade.max(1);
        let n_bins = lowest.min(-1).unsigned_abs().saturating_mul(per_decade);
        let low = f64::from(lowest.min(-1));
        let log10_edges =
            (0..=n_bins).map(|i| low + f64::from(i) / f64::from(per_decade)).collect::<Vec<_>>();
        let (mut counts, mut n_never) = (vec![0u64; n_bins as usize], 0);
        for density in self.densities() {
            if density <= 0.0 {
                n_never += 1;
                continue;
            }
            let log = density.log10();
            // Bins are [low, high), the last one closed so that density 1 has a place.
            let bin = log10_edges.partition_point(|&edge| edge <= log).clamp(1, counts.len()) - 1;
            counts[bin] += 1;
        }
        Log10Histogram { log10_edges, counts, n_never }
    }
}

/// A histogram of densities on a log10 scale.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Log10Histogram {
    /// Bin edges, log10 of density, ascending; one more than there are bins.
    pub log10_edges: Vec<f64>,
    /// Latents in each bin.
    pub counts: Vec<u64>,
    /// Latents that never fired and so have no logarithm.
    pub n_never: u64,
}

fn check_width(counts: &[u64], found: usize) -> Result<(), ShapeError> {
    if counts.len() == found {
        Ok(())
    } else {
        Err(ShapeError::Width { name: "codes", expected: counts.len(), found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::CodesBuilder;

    /// Latent 0 fires in every row, 1 in one of ten, 2 in one of a hundred, 3 never.
    fn known() -> Density {
        let mut density = Density::new(4);
        for batch in 0..10 {
            let mut builder = CodesBuilder::new(4);
            for row in 0..10 {
                builder.push(0, 1.0);
                if row == 0 {
                    builder.push(1, 1.0);
                }
                if row == 0 && batch == 0 {
                    builder.push(2, 1.0);
                }
                builder.end_row().unwrap();
            }
            density.update(&builder.finish()).unwrap();
        }
        density
    }

    #[test]
    fn densities_are_shares_of_all_rows() {
        assert_eq!(known().densities(), [1.0, 0.1, 0.01, 0.0]);
        let mut twice = known();
        twice.merge(&known()).unwrap();
        assert_eq!((twice.densities(), twice.n_rows()), (vec![1.0, 0.1, 0.01, 0.0], 200));
    }

    #[test]
    fn histogram_places_every_latent_once() {
        let histogram = known().log10_histogram(-4, 2);
        assert_eq!(histogram.log10_edges, [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]);
        assert_eq!(histogram.counts, [0, 0, 0, 0, 1, 0, 1, 1]);
        assert_eq!(histogram.n_never, 1);
        let coarse = known().log10_histogram(-1, 1);
        assert_eq!((coarse.counts, coarse.n_never), (vec![3], 1));
    }

    #[test]
    fn refuses_other_widths() {
        assert!(known().update(&CodesBuilder::new(5).finish()).is_err());
        assert!(known().merge(&Density::new(5)).is_err());
    }
}
