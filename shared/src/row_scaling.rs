//! Vectors put on one scale, each by its own statistics, before they are encoded; undone after they are decoded.
//!
//! Weights alone cannot express this, so it is part of a [`Sae`](crate::Sae). It is defined here once, with sums in f64
//! and one rounding to f32, so that every backend encodes the same bits and [`crate::certify`] speaks about those.
//!
//! ```text
//! Standardise   x' = (x − μ) / (σ + ε)     x̂ = σ x̂' + μ     μ = Σx / d, σ² = Σ(x − μ)² / (d − 1)
//! Norm          x' = √d x / ‖x‖            x̂ = x̂' ‖x‖ / √d
//! ```
//! The first is `LN` in OpenAI's sparse_autoencoder (`model.py`), `standardize` in mlsae (`model/autoencoder.py`) and
//! `layer_norm` in SAELens (`saes/sae.py`), all with ε = 1e-5, which is not undone; the second SAELens'
//! `constant_norm_rescale` and Llamascopium's `token-wise`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::rows::Rows;

/// How every vector is scaled on its own before it is encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum RowScaling {
    /// Not at all.
    #[default]
    None,
    /// To mean zero and an unbiased standard deviation of almost one. A constant vector becomes zeros.
    Standardise {
        /// Added to the standard deviation before dividing by it; finite and not negative.
        eps: f32,
    },
    /// To a Euclidean norm of √d. A vector of zeros stays one.
    Norm,
}

/// What puts a reconstruction back on its vector's own scale: `x̂ = scale · x̂' + shift`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Undo {
    /// σ, or ‖x‖ / √d.
    pub scale: f64,
    /// μ, or zero.
    pub shift: f64,
}

impl RowScaling {
    /// The standardisation that every published format with one uses: ε = 1e-5.
    pub const LAYER_NORM: Self = Self::Standardise { eps: 1e-5 };

    /// Whether nothing is scaled.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// What undoes the scaling of `x`.
    #[must_use]
    pub fn undo(self, x: &[f32]) -> Undo {
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        let d = x.len() as f64;
        match self {
            Self::None => Undo { scale: 1.0, shift: 0.0 },
            Self::Standardise { .. } => {
                let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / d;
                let squares: f64 = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
                Undo { scale: (squares / (d - 1.0)).sqrt(), shift: mean }
            }
            Self::Norm => {
                let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
                Undo { scale: (squares / d).sqrt(), shift: 0.0 }
            }
        }
    }

    /// Writes what the encoder reads of `x` to `out`, which is as long.
    pub fn apply(self, x: &[f32], out: &mut [f32]) {
        let Undo { scale, shift } = self.undo(x);
        let divisor = match self {
            Self::Standardise { eps } => scale + f64::from(eps),
            Self::None | Self::Norm => scale,
        };
        for (out, &x) in out.iter_mut().zip(x) {
            let centred = f64::from(x) - shift;
            // Where the divisor is zero so is every value; 0/0 would be a NaN.
            let value = if divisor == 0.0 { 0.0 } else { centred / divisor };
            #[expect(clippy::cast_possible_truncation, reason = "the one rounding")]
            let value = value as f32;
            *out = value;
        }
    }

    /// What the encoder reads of `x`, row after row; `x` itself where nothing is scaled.
    #[must_use]
    pub fn scaled(self, x: Rows<'_>) -> Cow<'_, [f32]> {
        if self.is_none() {
            return Cow::Borrowed(x.data());
        }
        let mut out = vec![0.0; x.data().len()];
        for (out, x) in out.chunks_exact_mut(x.width()).zip(x) {
            self.apply(x, out);
        }
        Cow::Owned(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(scaling: RowScaling, x: &[f32]) -> Vec<f32> {
        scaling.scaled(Rows::new(x, x.len()).unwrap()).into_owned()
    }

    /// Mean 3, deviations −2, −1, 3, 0: σ² = 14 / 3.
    #[test]
    fn standardising_by_hand() {
        let x = [1.0, 2.0, 6.0, 3.0];
        let sigma = (14.0f64 / 3.0).sqrt();
        assert_eq!(RowScaling::LAYER_NORM.undo(&x), Undo { scale: sigma, shift: 3.0 });
        for (eps, tolerance) in [(0.0, 1e-7), (0.5, 1e-7)] {
            let found = scaled(RowScaling::Standardise { eps }, &x);
            for (found, deviation) in found.into_iter().zip([-2.0, -1.0, 3.0, 0.0]) {
                let wanted = deviation / (sigma + f64::from(eps));
                assert!((f64::from(found) - wanted).abs() < tolerance, "{found} for {wanted}");
            }
        }
    }

    #[test]
    fn norms_by_hand() {
        assert_eq!(scaled(RowScaling::Norm, &[3.0, 0.0, 4.0, 0.0]), [1.2, 0.0, 1.6, 0.0]);
        assert_eq!(RowScaling::Norm.undo(&[3.0, 0.0, 4.0, 0.0]), Undo { scale: 2.5, shift: 0.0 });
    }

    #[test]
    fn rows_without_a_scale_and_extreme_ones_stay_finite() {
        for scaling in [RowScaling::LAYER_NORM, RowScaling::Standardise { eps: 0.0 }, RowScaling::Norm] {
            assert_eq!(scaled(scaling, &[0.0; 3]), [0.0; 3], "{scaling:?}");
            for x in [[f32::MAX, -f32::MAX, f32::MAX], [1e-45, 0.0, -1e-45], [f32::MAX; 3]] {
                assert!(scaled(scaling, &x).iter().all(|v| v.is_finite()), "{scaling:?} of {x:?}");
                let Undo { scale, shift } = scaling.undo(&x);
                assert!(scale.is_finite() && shift.is_finite());
            }
        }
        assert_eq!(scaled(RowScaling::LAYER_NORM, &[7.5; 3]), [0.0; 3]);
    }

    #[test]
    fn every_row_has_statistics_of_its_own() {
        let x = [1.0f32, 2.0, 4.0, 10.0, 20.0, 40.0];
        let both = RowScaling::Norm.scaled(Rows::new(&x, 3).unwrap()).into_owned();
        assert_eq!(both[..3], scaled(RowScaling::Norm, &x[..3])[..]);
        for (a, b) in both[..3].iter().zip(&both[3..]) {
            assert!((a - b).abs() < 1e-6, "both rows point the same way");
        }
        assert!(matches!(RowScaling::None.scaled(Rows::new(&x, 3).unwrap()), Cow::Borrowed(_)));
    }
}
