//! How alike neighbouring layers are: in their activation vectors, and in the latents that are active at them
//! (arXiv 2409.04185 §4: latents are active at more layers where the residual stream changes less).

use super::layer_use::check_layers;
use super::ratio;
use crate::codes::Codes;
use crate::error::ShapeError;
use crate::reference::dot;
use crate::rows::Rows;

/// Mean cosine of the vectors of the same tokens at two layers, raw and less the mean vector of each layer. A vector of
/// length zero has cosine zero with everything.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCosine {
    means: [Vec<f32>; 2],
    n_rows: u64,
    raw: f64,
    centred: f64,
}

impl LayerCosine {
    /// Nothing seen yet; `means` are the two layers' mean vectors, `[d]`.
    #[must_use]
    pub fn new(means: [Vec<f32>; 2]) -> Self {
        Self { means, n_rows: 0, raw: 0.0, centred: 0.0 }
    }

    /// Adds the vectors `[n_rows, d]` of the same tokens at the two layers.
    ///
    /// # Errors
    /// If widths or numbers of rows differ.
    pub fn update(&mut self, layers: [Rows<'_>; 2]) -> Result<(), ShapeError> {
        for (rows, mean) in layers.iter().zip(&self.means) {
            rows.expect_width("vectors of a layer", mean.len())?;
        }
        let [expected, found] = layers.map(|rows| rows.n_rows());
        if expected != found {
            return Err(ShapeError::Width { name: "rows of a layer", expected, found });
        }
        let mut centred = self.means.clone();
        for (x, y) in layers[0].iter().zip(layers[1].iter()) {
            self.raw += cosine(x, y);
            for ((out, row), mean) in centred.iter_mut().zip([x, y]).zip(&self.means) {
                out.iter_mut().zip(row).zip(mean).for_each(|((out, x), m)| *out = x - m);
            }
            self.centred += cosine(&centred[0], &centred[1]);
        }
        self.n_rows += expected as u64;
        Ok(())
    }

    /// The mean cosine; `None` before the first row.
    #[must_use]
    pub fn raw(&self) -> Option<f64> {
        self.per_row(self.raw)
    }

    /// The mean cosine of vectors less their layer's mean; `None` before the first row.
    #[must_use]
    pub fn centred(&self) -> Option<f64> {
        self.per_row(self.centred)
    }

    fn per_row(&self, sum: f64) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^53")]
        let n = self.n_rows as f64;
        (self.n_rows > 0).then(|| sum / n)
    }
}

fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let norms = (dot(x, x) * dot(y, y)).sqrt();
    if norms > 0.0 { dot(x, y) / norms } else { 0.0 }
}

/// Of the latents active at one or both of two neighbouring layers on a token, how many are at both (Jaccard index, pooled
/// over tokens).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerOverlap {
    n_latents: usize,
    both: Vec<u64>,
    either: Vec<u64>,
}

impl LayerOverlap {
    /// Nothing seen yet of `n_layers` layers.
    #[must_use]
    pub fn new(n_latents: usize, n_layers: usize) -> Self {
        let pairs = n_layers.saturating_sub(1);
        Self { n_latents, both: vec![0; pairs], either: vec![0; pairs] }
    }

    /// Adds the codes of the same rows at every layer.
    ///
    /// # Errors
    /// If there is another number of layers, of latents, or of rows at one of them.
    pub fn update(&mut self, layers: &[Codes]) -> Result<(), ShapeError> {
        check_layers(layers, self.both.len() + 1, self.n_latents)?;
        for (pair, (both, either)) in layers.windows(2).zip(self.both.iter_mut().zip(&mut self.either)) {
            for ((lower, _), (upper, _)) in pair[0].iter().zip(pair[1].iter()) {
                let common = in_both(lower, upper);
                *both += common;
                *either += (lower.len() + upper.len()) as u64 - common;
            }
        }
        Ok(())
    }

    /// The share between layers `pair` and `pair + 1`; `None` where nothing was active.
    #[must_use]
    pub fn value(&self, pair: usize) -> Option<f64> {
        ratio(self.both[pair], self.either[pair])
    }
}

/// The number of common values of two ascending lists.
fn in_both(a: &[u32], b: &[u32]) -> u64 {
    let (mut i, mut j, mut n) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        n += u64::from(a[i] == b[j]);
        let (x, y) = (a[i], b[j]);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    n
}

#[cfg(test)]
mod tests {
    use super::super::layer_use::tests::codes;
    use super::*;

    #[test]
    fn cosines_by_hand() {
        let mut cosine = LayerCosine::new([vec![1.0, 0.0], vec![0.0, 1.0]]);
        assert_eq!(cosine.raw(), None);
        let (x, y) = ([2.0, 0.0, 1.0, 1.0], [3.0, 4.0, 0.0, 0.0]);
        let [x, y] = [&x, &y].map(|rows| Rows::new(rows, 2).unwrap());
        cosine.update([x, y]).unwrap();
        // (2, 0)·(3, 4) = 0.6 and nothing with zero; centred (1, 0)·(3, 3) and (0, 1)·(0, −1).
        assert!((cosine.raw().unwrap() - 0.3).abs() < 1e-12);
        assert!((cosine.centred().unwrap() - (0.5f64.sqrt() - 1.0) / 2.0).abs() < 1e-12);
        assert!(cosine.update([x, y.slice(0, 1)]).is_err());
        assert!(cosine.update([x, Rows::new(&[1.0], 1).unwrap()]).is_err());
    }

    #[test]
    fn overlaps_by_hand() {
        let mut overlap = LayerOverlap::new(9, 3);
        let layers = [
            codes(9, &[&[(0, 1.0), (3, 1.0), (7, 1.0)], &[]]),
            codes(9, &[&[(3, 1.0), (4, 1.0), (7, 1.0)], &[(1, 1.0)]]),
            codes(9, &[&[(8, 1.0)], &[]]),
        ];
        overlap.update(&layers).unwrap();
        assert_eq!((overlap.value(0), overlap.value(1)), (Some(2.0 / 5.0), Some(0.0)));
        assert!(overlap.update(&layers[..2]).is_err());
        assert_eq!(LayerOverlap::new(9, 2).value(0), None);
    }
}
