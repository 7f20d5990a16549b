//! Linear maps that bring the residual stream of every layer into one space, before one dictionary reads them all.
//!
//! ```text
//! h' = h + W_l h + b_l          h = (I + W_l)⁻¹ (h' − b_l)
//! ```
//! The form is that of the tuned lens (arXiv 2303.08112 eq. 7), which multi-layer SAEs were also trained behind (arXiv 2409.04185
//! §3.5).

use crate::error::{ShapeError, check_finite, check_len};
use crate::reference::dot;

/// The map of one layer, and what undoes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Translator {
    weight: Vec<f32>,
    bias: Vec<f32>,
    inverse: Vec<f32>,
}

impl Translator {
    /// The map of `weight` `[d, d]` (output, input; without the identity) and `bias` `[d]`.
    ///
    /// # Errors
    /// If lengths disagree, a value is not finite, or `I + W` has no inverse.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>) -> Result<Self, ShapeError> {
        let d = bias.len();
        check_len("translator weight", &[d, d], weight.len())?;
        check_finite("translator weight", &weight)?;
        check_finite("translator bias", &bias)?;
        let mut map: Vec<f64> = weight.iter().map(|&w| f64::from(w)).collect();
        map.iter_mut().step_by(d + 1).for_each(|diagonal| *diagonal += 1.0);
        let inverse =
            inverse(map, d).map(|values| values.into_iter().map(narrow).collect()).map_err(|column| {
                ShapeError::Value {
                    name: "translator weight",
                    index: column * d + column,
                    value: "part of a map that is not one to one".to_owned(),
                    expected: "I + W with an inverse",
                }
            })?;
        Ok(Self { weight, bias, inverse })
    }

    /// The width of the vectors.
    #[must_use]
    pub fn width(&self) -> usize {
        self.bias.len()
    }

    /// `W` `[d, d]`, output by input.
    #[must_use]
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// `b` `[d]`.
    #[must_use]
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// `(I + W)⁻¹` `[d, d]`.
    #[must_use]
    pub fn inverse(&self) -> &[f32] {
        &self.inverse
    }

    /// `h + W h + b`, summed in f64; `h` is `[d]`.
    #[must_use]
    pub fn forward(&self, h: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.width().max(1));
        let value = |((w, &b), &h_i): ((&[f32], &f32), &f32)| f64::from(h_i) + dot(w, h) + f64::from(b);
        rows.zip(&self.bias).zip(h).map(value).map(narrow).collect()
    }

    /// The vector `[d]` that [`Translator::forward`] makes `y` of.
    #[must_use]
    pub fn backward(&self, y: &[f32]) -> Vec<f32> {
        let less: Vec<f64> = y.iter().zip(&self.bias).map(|(&y, &b)| f64::from(y) - f64::from(b)).collect();
        let rows = self.inverse.chunks_exact(self.width().max(1));
        rows.map(|row| row.iter().zip(&less).map(|(&a, v)| f64::from(a) * v).sum()).map(narrow).collect()
    }

    /// `(I + W)ᵀ v` `[d]`: what reads `h` as `v` reads the translated vector.
    #[must_use]
    pub fn pull_back(&self, v: &[f32]) -> Vec<f32> {
        let mut sums: Vec<f64> = v.iter().map(|&v| f64::from(v)).collect();
        for (row, &v) in self.weight.chunks_exact(self.width().max(1)).zip(v) {
            sums.iter_mut().zip(row).for_each(|(sum, &w)| *sum += f64::from(v) * f64::from(w));
        }
        sums.into_iter().map(narrow).collect()
    }

    /// `(I + W)⁻¹ v` `[d]`: the direction that becomes `v` when it is translated.
    #[must_use]
    pub fn lift(&self, v: &[f32]) -> Vec<f32> {
        self.inverse.chunks_exact(self.width().max(1)).map(|row| narrow(dot(row, v))).collect()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "vectors and weights are f32")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// The inverse of `a` `[d, d]` by elimination with pivots (Golub & Van Loan, Matrix Computations §3.4).
///
/// # Errors
/// The first column without a pivot, where there is no inverse.
pub fn inverse(mut a: Vec<f64>, d: usize) -> Result<Vec<f64>, usize> {
    let mut inverse = vec![0.0; d * d];
    inverse.iter_mut().step_by(d + 1).for_each(|one| *one = 1.0);
    let largest = a.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
    for column in 0..d {
        let size = |row: &usize| a[row * d + column].abs();
        let pivot = (column..d).max_by(|x, y| size(x).total_cmp(&size(y))).unwrap_or(column);
        // Below the rounding of the largest entry nothing is left to divide by.
        if size(&pivot) <= f64::EPSILON * largest {
            return Err(column);
        }
        for values in [&mut a, &mut inverse] {
            (0..d).for_each(|i| values.swap(column * d + i, pivot * d + i));
        }
        let scale = 1.0 / a[column * d + column];
        for values in [&mut a, &mut inverse] {
            values[column * d..(column + 1) * d].iter_mut().for_each(|v| *v *= scale);
        }
        for row in (0..d).filter(|row| *row != column) {
            let factor = a[row * d + column];
            if factor != 0.0 {
                subtract(&mut a, factor, row, column, d);
                subtract(&mut inverse, factor, row, column, d);
            }
        }
    }
    Ok(inverse)
}

/// Takes `factor` times one row of `values` `[d, d]` from another.
fn subtract(values: &mut [f64], factor: f64, from: usize, row: usize, d: usize) {
    let (low, high) = (from.min(row) * d, from.max(row) * d);
    let (first, second) = values.split_at_mut(high);
    let (first, second) = (&mut first[low..low + d], &mut second[..d]);
    let (target, source) = if from < row { (first, second) } else { (second, first) };
    target.iter_mut().zip(source.iter()).for_each(|(target, source)| *target -= factor * source);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I + W = [[2, 1], [0, 4]], b = (1, −1).
    fn hand() -> Translator {
        Translator::new(vec![1.0, 1.0, 0.0, 3.0], vec![1.0, -1.0]).unwrap()
    }

    #[test]
    fn a_map_by_hand() {
        let map = hand();
        assert_eq!(map.inverse(), [0.5, -0.125, 0.0, 0.25]);
        assert_eq!(map.forward(&[3.0, 2.0]), [9.0, 7.0]);
        assert_eq!(map.backward(&[9.0, 7.0]), [3.0, 2.0]);
        assert_eq!(map.pull_back(&[1.0, 2.0]), [2.0, 9.0]);
        assert_eq!(map.lift(&[8.0, 4.0]), [3.5, 1.0]);
    }

    #[test]
    fn what_has_no_pivot_on_the_diagonal_is_inverted_and_what_has_no_inverse_is_refused() {
        // I + W = [[0, 1], [2, 0]].
        let swapped = Translator::new(vec![-1.0, 1.0, 2.0, -1.0], vec![0.0; 2]).unwrap();
        assert_eq!(swapped.inverse(), [0.0, 0.5, 1.0, 0.0]);
        for (weight, bias) in [
            (vec![0.0, 1.0, 1.0, 0.0], vec![0.0; 2]),
            (vec![0.0; 3], vec![0.0; 2]),
            (vec![f32::NAN, 0.0, 0.0, 0.0], vec![0.0; 2]),
            (vec![0.0; 4], vec![f32::INFINITY, 0.0]),
        ] {
            assert!(Translator::new(weight, bias).is_err());
        }
    }

    #[test]
    fn a_way_there_and_back_is_none() {
        let d = 40;
        let noise = |seed: usize| ((seed * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.3;
        let map = Translator::new((0..d * d).map(noise).collect(), (0..d).map(noise).collect()).unwrap();
        let h: Vec<f32> = (0..d).map(|i| noise(i * i + 3)).collect();
        for (there, back) in h.iter().zip(map.backward(&map.forward(&h))) {
            assert!((there - back).abs() < 1e-5, "{back} for {there}");
        }
        let dots = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let v: Vec<f32> = (0..d).map(|i| noise(3 * i + 1)).collect();
        let moved: Vec<f32> = map.forward(&h).iter().zip(map.bias()).map(|(y, b)| y - b).collect();
        assert!((dots(&map.pull_back(&v), &h) - dots(&v, &moved)).abs() < 1e-5);
    }
}
