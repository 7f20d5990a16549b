//! What a batch says of its rows beside their values: which layer each is of, what its error weighs, and its own unit.

use super::{Objective, Sparsity, to_f64};
use crate::error::{ShapeError, check_len};

/// What is said of each row of a batch; nothing where a field is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Examples {
    /// The layer each row is of `[N]`, counted from 0; empty when all are of one.
    pub layers: Vec<u16>,
    /// Weight of each row's squared errors `[N]`; empty for 1.
    pub weights: Vec<f64>,
    /// σ of each row `[N]`: what a row's error is multiplied by when its scaling is undone; empty for 1.
    pub deviations: Vec<f64>,
}

impl Examples {
    /// The layer of `row`.
    #[must_use]
    pub fn layer(&self, row: usize) -> usize {
        self.layers.get(row).map_or(0, |&layer| usize::from(layer))
    }

    /// The weight of `row`.
    #[must_use]
    pub fn weight(&self, row: usize) -> f64 {
        self.weights.get(row).copied().unwrap_or(1.0)
    }

    /// σ of `row`.
    #[must_use]
    pub fn deviation(&self, row: usize) -> f64 {
        self.deviations.get(row).copied().unwrap_or(1.0)
    }

    /// Whether what is said is said of each of `n_rows` rows, of layers below `n_layers`.
    ///
    /// # Errors
    /// Names what has which other size.
    pub fn check(&self, n_rows: usize, n_layers: usize) -> Result<(), ShapeError> {
        let lengths = [
            ("layers", self.layers.len()),
            ("weights", self.weights.len()),
            ("deviations", self.deviations.len()),
        ];
        for (name, length) in lengths.into_iter().filter(|(_, length)| *length > 0) {
            check_len(name, &[n_rows], length)?;
        }
        match self.layers.iter().position(|&layer| n_layers > 1 && usize::from(layer) >= n_layers) {
            None => Ok(()),
            Some(index) => {
                let (value, expected) = (self.layers[index].to_string(), "a layer that has thresholds");
                Err(ShapeError::Value { name: "layers", index, value, expected })
            }
        }
    }

    /// The weights with which the mean weighted squared error is the mean over layers of their FVU (arXiv 2409.04185 §3):
    /// `FVU_l = mean (x̂_l − x_l)² / Var(x_l)`, mean and unbiased variance over all elements of the layer in the batch. Layers that
    /// the batch does not have, or whose elements are all equal, count for nothing.
    ///
    /// `moments [N]` are the [`row_moments`] of the targets, of `width` values in the units of the loss, and `undo` what brings each
    /// target back to its own: scale and shift.
    #[must_use]
    pub fn fvu_weights(&self, moments: &[[f64; 2]], width: usize, undo: &[(f64, f64)]) -> Vec<f64> {
        let n_layers = self.layers.iter().max().map_or(1, |&last| usize::from(last) + 1);
        // Elements of each layer, their sum, and the sum of their squares.
        let mut sums = vec![[0.0f64; 3]; n_layers];
        for (row, (&[whole, square], &(scale, shift))) in moments.iter().zip(undo).enumerate() {
            let [n, sum, squares] = &mut sums[self.layer(row)];
            let d = to_f64(width);
            *n += d;
            *sum += scale * whole + d * shift;
            *squares += scale * scale * square + 2.0 * scale * shift * whole + d * shift * shift;
        }
        let variance = |[n, sum, squares]: [f64; 3]| (squares - sum * sum / n) / (n - 1.0);
        let seen = to_f64(sums.iter().filter(|sums| variance(**sums) > 0.0).count());
        let weight = |(row, (scale, _)): (usize, &(f64, f64))| {
            let sums = sums[self.layer(row)];
            let variance = variance(sums);
            if variance > 0.0 {
                to_f64(undo.len()) / seen * scale * scale / (sums[0] * variance)
            } else {
                0.0
            }
        };
        undo.iter().enumerate().map(weight).collect()
    }
}

/// The sum of a row's values, and that of their squares.
#[must_use]
pub fn row_moments(row: &[f32]) -> [f64; 2] {
    let whole = row.iter().map(|&v| f64::from(v)).sum();
    [whole, row.iter().map(|&v| f64::from(v) * f64::from(v)).sum()]
}

/// Mean L0 of a batch: of all rows, or of those of each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Levels {
    /// Rows, and their mean L0.
    parts: Vec<(f64, f64)>,
}

impl Objective {
    /// The levels of a batch whose rows have `active` active latents.
    #[must_use]
    pub fn levels(&self, active: impl Iterator<Item = usize>) -> Levels {
        let mut parts = vec![(0.0, 0.0)];
        for (row, active) in active.enumerate() {
            let layer = if self.l0_by_layer { self.examples.layer(row) } else { 0 };
            if layer >= parts.len() {
                parts.resize(layer + 1, (0.0, 0.0));
            }
            parts[layer].0 += 1.0;
            parts[layer].1 += to_f64(active);
        }
        parts.iter_mut().for_each(|(rows, l0)| *l0 /= f64::max(*rows, 1.0));
        Levels { parts }
    }
}

impl Levels {
    /// The part of the sparsity term that depends on L0 alone: the mean over rows of the term of their layer.
    #[must_use]
    pub fn term(&self, sparsity: &Sparsity) -> f64 {
        let n: f64 = self.parts.iter().map(|part| part.0).sum();
        self.parts.iter().map(|(rows, l0)| rows / n * sparsity.of_l0(*l0)).sum()
    }

    /// What acts on the thresholds of `layer` as a fixed λ would.
    #[must_use]
    pub fn lambda(&self, sparsity: &Sparsity, layer: usize) -> f64 {
        let part = if self.parts.len() == 1 { self.parts.first() } else { self.parts.get(layer) };
        part.map_or(0.0, |(_, l0)| sparsity.effective_lambda(*l0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers of one and two rows of two values, each back in its own units by hand.
    #[test]
    fn weighted_errors_are_the_mean_fvu_of_the_layers() {
        let examples = Examples { layers: vec![1, 0, 1], ..Examples::default() };
        let rows = [[1.0f32, -1.0], [2.0, 4.0], [0.5, 1.5]];
        assert_eq!(row_moments(&rows[1]), [6.0, 20.0]);
        let undo = [(2.0, 1.0), (1.0, 0.0), (4.0, -1.0)];
        // Layer 0: 2, 4, of variance 2. Layer 1: 3, −1, 1, 5, of variance 20/3.
        let weights = examples.fvu_weights(&rows.map(|row| row_moments(&row)), 2, &undo);
        let errors = [[0.5f64, 0.0], [1.0, -1.0], [0.25, 0.5]];
        let found: f64 = weights.iter().zip(errors).map(|(w, e)| w * (e[0] * e[0] + e[1] * e[1]) / 3.0).sum();
        let fvu = [(1.0 + 1.0) / 2.0 / 2.0, (1.0 + 0.0 + 1.0 + 4.0) / 4.0 / (20.0 / 3.0)];
        assert!((found - (fvu[0] + fvu[1]) / 2.0).abs() < 1e-12, "{found} against {fvu:?}");
        // A layer without variance counts for nothing.
        let flat = [[1.0, -1.0], [3.0, 3.0], [0.5, 1.5]].map(|row| row_moments(&row));
        let flat = examples.fvu_weights(&flat, 2, &undo);
        assert_eq!(flat[1], 0.0);
        assert!((flat[0] / weights[0] - 2.0).abs() < 1e-12);
    }

    #[test]
    fn each_layer_is_pushed_by_its_own_level() {
        let sparsity = Sparsity::TargetL0 { lambda: 1.0, target: 10.0 };
        let objective = |l0_by_layer| Objective {
            examples: Examples { layers: vec![0, 2, 2, 0], ..Examples::default() },
            l0_by_layer,
            ..Objective::plain(sparsity)
        };
        let levels = |by_layer| objective(by_layer).levels([5, 10, 30, 5].into_iter());
        assert_eq!(levels(true).term(&sparsity), 0.5 * 0.25 + 0.5);
        let pushed = [0, 1, 2].map(|layer| levels(true).lambda(&sparsity, layer));
        assert!(pushed[0] < 0.0 && pushed[2] > 0.0, "{pushed:?}");
        let together = [0, 1, 2].map(|layer| levels(false).lambda(&sparsity, layer));
        assert_eq!(together, [sparsity.effective_lambda(12.5); 3]);
    }

    #[test]
    fn what_does_not_fit_the_rows_is_refused() {
        let examples = Examples { layers: vec![0, 3], weights: vec![1.0; 2], deviations: vec![1.0; 2] };
        assert!(examples.check(2, 4).is_ok() && examples.check(2, 1).is_ok());
        assert!(examples.check(2, 3).is_err() && examples.check(3, 4).is_err());
    }
}
