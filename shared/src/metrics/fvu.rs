//! Fraction of variance unexplained: `FVU = mean_x ‖x − x̂‖² / mean_x ‖x − x̄‖²`, with `x̄` the mean of
//! all rows seen (arXiv 2408.05147 §4). Perfect reconstruction is 0, predicting the mean is 1.

use crate::error::ShapeError;
use crate::rows::Rows;

/// Accumulates squared error and exact variance in one pass.
///
/// The variance is kept as mean and summed squared deviation and merged by the parallel update of
/// Chan, Golub & LeVeque (1979), which does not cancel when the mean is large beside the spread.
#[derive(Debug, Clone, PartialEq)]
pub struct Fvu {
    n_rows: u64,
    squared_error: f64,
    squared_deviation: f64,
    mean: Vec<f64>,
}

impl Fvu {
    /// Nothing seen yet, for rows of `width` values.
    #[must_use]
    pub fn new(width: usize) -> Self {
        Self { n_rows: 0, squared_error: 0.0, squared_deviation: 0.0, mean: vec![0.0; width] }
    }

    /// Adds rows `x` and their reconstructions, both `[n_rows, width]`.
    ///
    /// # Errors
    /// If the two differ in shape, or are not `width` wide.
    pub fn update(&mut self, x: Rows<'_>, reconstruction: Rows<'_>) -> Result<(), ShapeError> {
        x.expect_width("x", self.mean.len())?;
        reconstruction.expect_width("reconstruction", self.mean.len())?;
        crate::error::check_len(
            "reconstruction",
            &[x.n_rows(), self.mean.len()],
            reconstruction.data().len(),
        )?;
        for (row, guess) in x.iter().zip(reconstruction) {
            self.n_rows += 1;
            #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
            let n = self.n_rows as f64;
            for ((mean, &value), &guess) in self.mean.iter_mut().zip(row).zip(guess) {
                let value = f64::from(value);
                let before = value - *mean;
                *mean += before / n;
                self.squared_deviation += before * (value - *mean);
                self.squared_error += (value - f64::from(guess)).powi(2);
            }
        }
        Ok(())
    }

    /// Adds what another accumulator has seen.
    ///
    /// # Errors
    /// If it holds rows of another width.
    pub fn merge(&mut self, other: &Self) -> Result<(), ShapeError> {
        if other.mean.len() != self.mean.len() {
            let (expected, found) = (self.mean.len(), other.mean.len());
            return Err(ShapeError::Width { name: "fvu", expected, found });
        }
        if other.n_rows == 0 {
            return Ok(());
        }
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
        let (mine, theirs) = (self.n_rows as f64, other.n_rows as f64);
        let total = mine + theirs;
        for (mean, &their_mean) in self.mean.iter_mut().zip(&other.mean) {
            let delta = their_mean - *mean;
            self.squared_deviation += delta * delta * mine * theirs / total;
            *mean += delta * theirs / total;
        }
        self.squared_deviation += other.squared_deviation;
        self.squared_error += other.squared_error;
        self.n_rows += other.n_rows;
        Ok(())
    }

    /// Rows seen.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// The mean of the rows seen, `[width]`.
    #[must_use]
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// `mean ‖x − x̂‖²`, summed over the width; `None` before the first row.
    #[must_use]
    pub fn mean_squared_error(&self) -> Option<f64> {
        self.per_row(self.squared_error)
    }

    /// `mean ‖x − x̄‖²`, summed over the width; `None` before the first row.
    #[must_use]
    pub fn variance(&self) -> Option<f64> {
        self.per_row(self.squared_deviation)
    }

    /// The fraction; `None` when there is no variance to explain (no rows, or all equal).
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        (self.squared_deviation > 0.0).then(|| self.squared_error / self.squared_deviation)
    }

    fn per_row(&self, sum: f64) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
        let n = self.n_rows as f64;
        (self.n_rows > 0).then(|| sum / n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const X: [f32; 8] = [1.0, 10.0, 3.0, 10.0, 1.0, 14.0, 3.0, 14.0];

    fn rows(data: &[f32]) -> Rows<'_> {
        Rows::new(data, 2).unwrap()
    }

    #[test]
    fn known_answers() {
        let mut perfect = Fvu::new(2);
        assert_eq!(perfect.value(), None);
        perfect.update(rows(&X), rows(&X)).unwrap();
        assert_eq!((perfect.value(), perfect.variance()), (Some(0.0), Some(5.0)));

        let mut mean = Fvu::new(2);
        mean.update(rows(&X), rows(&[2.0, 12.0].repeat(4))).unwrap();
        assert_eq!((mean.value(), mean.mean_squared_error()), (Some(1.0), Some(5.0)));

        // The mean, off by the spread in one dimension: 1 + 4/5.
        let mut offset = Fvu::new(2);
        offset.update(rows(&X), rows(&[2.0, 14.0].repeat(4))).unwrap();
        assert_eq!(offset.value(), Some(1.8));
    }

    #[test]
    fn a_large_mean_does_not_cancel() {
        let x: Vec<f32> = (0..1000).flat_map(|i| [4_000_000.0 + (i % 2) as f32, 0.0]).collect();
        let mut fvu = Fvu::new(2);
        fvu.update(rows(&x), rows(&x)).unwrap();
        assert!((fvu.variance().unwrap() - 0.25).abs() < 1e-9);
    }

    #[test]
    fn refuses_other_shapes() {
        let mut fvu = Fvu::new(2);
        assert!(fvu.update(rows(&X), rows(&X[..4])).is_err());
        assert!(fvu.update(Rows::new(&X, 4).unwrap(), Rows::new(&X, 4).unwrap()).is_err());
        assert!(fvu.merge(&Fvu::new(3)).is_err());
    }

    proptest! {
        /// One pass in pieces equals the two-pass definition.
        #[test]
        fn batching_and_merging_do_not_matter(
            x in prop::collection::vec(-9.0f32..9.0, 12),
            guess in prop::collection::vec(-9.0f32..9.0, 12),
            cut in 0usize..=6,
        ) {
            let mut first = Fvu::new(2);
            first.update(rows(&x).slice(0, cut), rows(&guess).slice(0, cut)).unwrap();
            let mut second = Fvu::new(2);
            second.update(rows(&x).slice(cut, 6), rows(&guess).slice(cut, 6)).unwrap();
            first.merge(&second).unwrap();
            let mean: Vec<f64> =
                (0..2).map(|j| x.iter().skip(j).step_by(2).map(|&v| f64::from(v)).sum::<f64>() / 6.0).collect();
            let deviation: f64 = x.iter().enumerate().map(|(i, &v)| (f64::from(v) - mean[i % 2]).powi(2)).sum();
            let error: f64 = x.iter().zip(&guess).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
            prop_assume!(deviation > 1e-3);
            prop_assert!((first.value().unwrap() - error / deviation).abs() <= 1e-12 * (1.0 + error / deviation));
        }
    }
}
