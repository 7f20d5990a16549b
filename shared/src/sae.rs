//! The one in-memory form of a released sparse autoencoder: latent-major, validated by construction.
//!
//! Outside layouts and names (transposes, `d_sae`, pre-encoder biases, log thresholds) end in
//! `format/`; training parameters are another type. What is here reads raw activations:
//!
//! ```text
//! z = W_enc x + b_enc          f = σ(z)          x̂ = W_decᵀ f + b_dec
//! ```
//! (Gemma Scope, arXiv 2408.05147 §2; a pre-encoder bias is folded into `b_enc` by the readers.) Two things may be added:
//! a skip connection, `x̂ = W_decᵀ f + b_dec + W_skip x` (affine transcoders, arXiv 2501.18823 §3), and a
//! [`RowScaling`], with which everything but the skip connection is about the scaled vector:
//!
//! ```text
//! x' = (x − μ) / (σ + ε)       f = σ(W_enc x' + b_enc)       x̂ = σ (W_decᵀ f + b_dec) + μ + W_skip x
//! ```

use crate::codes::Codes;
use crate::error::{ShapeError, check_finite, check_len};
use crate::forward::Dims;
use crate::row_scaling::RowScaling;
use crate::rows::Rows;

/// The nonlinearity between pre-activations and latents.
#[derive(Debug, Clone, PartialEq)]
pub enum Activation {
    /// `f = z · 1[z > θ]` with a threshold `θ [n] ≥ 0` per latent, strictly greater
    /// (JumpReLU, arXiv 2407.14435 eq. 3). A threshold of zero is the ReLU.
    JumpRelu {
        /// One threshold per latent.
        threshold: Vec<f32>,
    },
    /// `f = max(z, 0)`.
    Relu,
    /// The `k` largest pre-activations of a row, then ReLU (arXiv 2406.04093); ties go to the lower latent.
    TopK {
        /// How many latents may be active.
        k: usize,
    },
}

impl Activation {
    /// The threshold of `latent` when activation is decided latent by latent, `None` for top-k.
    #[must_use]
    pub fn threshold(&self, latent: usize) -> Option<f32> {
        match self {
            Self::JumpRelu { threshold } => Some(threshold[latent]),
            Self::Relu => Some(0.0),
            Self::TopK { .. } => None,
        }
    }
}

/// What a [`Sae`] is made of, before it is checked.
#[derive(Debug, Clone, PartialEq)]
pub struct SaeParts {
    /// Width of the vectors the encoder reads.
    pub d_in: usize,
    /// Width of the vectors the decoder writes; equals `d_in` unless this is a transcoder.
    pub d_out: usize,
    /// Encoder rows `[n, d_in]`.
    pub w_enc: Vec<f32>,
    /// Encoder bias `[n]`.
    pub b_enc: Vec<f32>,
    /// Decoder directions `[n, d_out]`.
    pub w_dec: Vec<f32>,
    /// Decoder bias `[d_out]`.
    pub b_dec: Vec<f32>,
    /// The nonlinearity.
    pub activation: Activation,
    /// The skip connection `[d_out, d_in]`, which reads vectors as they are.
    pub w_skip: Option<Vec<f32>>,
    /// How each vector is scaled before it is encoded.
    pub rows: RowScaling,
}

/// A released sparse autoencoder; every length agrees and every value is finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Sae {
    parts: SaeParts,
    n_latents: usize,
}

impl Sae {
    /// Checks `parts` and takes them.
    ///
    /// # Errors
    /// If a dimension is zero, a length does not fit, a value is not finite, a threshold or ε is negative,
    /// `k` is zero or above the width, or vectors of a single value are to be standardised.
    pub fn new(parts: SaeParts) -> Result<Self, ShapeError> {
        let SaeParts { d_in, d_out, .. } = parts;
        let n = parts.b_enc.len();
        for (dimension, value) in [("d_in", d_in), ("d_out", d_out), ("n_latents", n)] {
            if value == 0 {
                return Err(ShapeError::Dimension { name: "sae", dimension, value });
            }
        }
        if u32::try_from(n).is_err() {
            return Err(ShapeError::Dimension { name: "sae", dimension: "n_latents", value: n });
        }
        check_len("w_enc", &[n, d_in], parts.w_enc.len())?;
        check_len("w_dec", &[n, d_out], parts.w_dec.len())?;
        check_len("b_dec", &[d_out], parts.b_dec.len())?;
        check_finite("w_enc", &parts.w_enc)?;
        check_finite("b_enc", &parts.b_enc)?;
        check_finite("w_dec", &parts.w_dec)?;
        check_finite("b_dec", &parts.b_dec)?;
        if let Some(w_skip) = &parts.w_skip {
            check_len("w_skip", &[d_out, d_in], w_skip.len())?;
            check_finite("w_skip", w_skip)?;
        }
        if let RowScaling::Standardise { eps } = parts.rows {
            if !(eps.is_finite() && eps >= 0.0) {
                let (value, expected) = (eps.to_string(), "a finite number of at least 0");
                return Err(ShapeError::Value { name: "eps", index: 0, value, expected });
            }
            // The unbiased deviation divides by d − 1.
            if d_in < 2 {
                return Err(ShapeError::Dimension {
                    name: "standardised rows",
                    dimension: "d_in",
                    value: d_in,
                });
            }
        }
        match &parts.activation {
            Activation::Relu => {}
            Activation::TopK { k } if *k == 0 || *k > n => {
                return Err(ShapeError::Dimension { name: "sae", dimension: "k", value: *k });
            }
            Activation::TopK { .. } => {}
            Activation::JumpRelu { threshold } => {
                check_len("threshold", &[n], threshold.len())?;
                check_finite("threshold", threshold)?;
                if let Some(index) = threshold.iter().position(|&t| t < 0.0) {
                    let value = threshold[index].to_string();
                    return Err(ShapeError::Value {
                        name: "threshold",
                        index,
                        value,
                        expected: "at least 0",
                    });
                }
            }
        }
        Ok(Self { parts, n_latents: n })
    }

    /// The three sizes.
    #[must_use]
    pub fn dims(&self) -> Dims {
        Dims { d_in: self.parts.d_in, d_out: self.parts.d_out, n_latents: self.n_latents }
    }

    /// Encoder rows `[n, d_in]`.
    #[must_use]
    pub fn w_enc(&self) -> &[f32] {
        &self.parts.w_enc
    }

    /// The encoder row of one latent, `[d_in]`.
    #[must_use]
    pub fn encoder_row(&self, latent: usize) -> &[f32] {
        &self.parts.w_enc[latent * self.parts.d_in..(latent + 1) * self.parts.d_in]
    }

    /// Encoder bias `[n]`.
    #[must_use]
    pub fn b_enc(&self) -> &[f32] {
        &self.parts.b_enc
    }

    /// Decoder directions `[n, d_out]`.
    #[must_use]
    pub fn w_dec(&self) -> &[f32] {
        &self.parts.w_dec
    }

    /// The decoder direction of one latent, `[d_out]`.
    #[must_use]
    pub fn decoder_direction(&self, latent: usize) -> &[f32] {
        &self.parts.w_dec[latent * self.parts.d_out..(latent + 1) * self.parts.d_out]
    }

    /// Decoder bias `[d_out]`.
    #[must_use]
    pub fn b_dec(&self) -> &[f32] {
        &self.parts.b_dec
    }

    /// The nonlinearity.
    #[must_use]
    pub fn activation(&self) -> &Activation {
        &self.parts.activation
    }

    /// The skip connection `[d_out, d_in]`, if there is one.
    #[must_use]
    pub fn w_skip(&self) -> Option<&[f32]> {
        self.parts.w_skip.as_deref()
    }

    /// How each vector is scaled before it is encoded.
    #[must_use]
    pub fn rows(&self) -> RowScaling {
        self.parts.rows
    }

    /// `Ok` when `codes` are of this dictionary and `x` has the vectors they were made from, one for each row of codes.
    ///
    /// # Errors
    /// Names what has which other size.
    pub fn check_decode(&self, x: Rows<'_>, codes: &Codes) -> Result<(), ShapeError> {
        if codes.n_latents() != self.n_latents {
            let (name, expected, found) = ("codes", self.n_latents, codes.n_latents());
            return Err(ShapeError::Width { name, expected, found });
        }
        x.expect_width("x", self.parts.d_in)?;
        check_len("x", &[codes.n_rows(), self.parts.d_in], x.data().len())
    }

    /// Gives the parts back.
    #[must_use]
    pub fn into_parts(self) -> SaeParts {
        self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> SaeParts {
        SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            b_enc: vec![0.0; 3],
            w_dec: vec![1.0, 0.0, 0.0, 1.0, 0.6, 0.8],
            b_dec: vec![0.0; 2],
            activation: Activation::JumpRelu { threshold: vec![0.5; 3] },
            w_skip: None,
            rows: RowScaling::None,
        }
    }

    #[test]
    fn well_formed_parts_pass() {
        let sae = Sae::new(parts()).unwrap();
        assert_eq!(sae.dims(), Dims { d_in: 2, d_out: 2, n_latents: 3 });
        assert_eq!(sae.decoder_direction(2), [0.6, 0.8]);
        let more = SaeParts { w_skip: Some(vec![0.5; 4]), rows: RowScaling::LAYER_NORM, ..parts() };
        assert_eq!(Sae::new(more.clone()).unwrap().into_parts(), more);
    }

    #[test]
    fn what_is_decoded_must_fit_what_was_encoded() {
        let sae = Sae::new(parts()).unwrap();
        let mut codes = crate::codes::CodesBuilder::new(3);
        codes.end_row().unwrap();
        let codes = codes.finish();
        let check = |values: &[f32], width| sae.check_decode(Rows::new(values, width).unwrap(), &codes);
        assert!(check(&[0.0; 2], 2).is_ok());
        assert!(check(&[0.0; 4], 2).is_err(), "two vectors for one row of codes");
        assert!(check(&[], 2).is_err() && check(&[0.0; 3], 3).is_err());
    }

    #[test]
    fn each_law_is_enforced() {
        let broken: [fn(&mut SaeParts); 12] = [
            |p| p.d_in = 0,
            |p| p.w_enc.truncate(5),
            |p| p.w_dec[1] = f32::NAN,
            |p| p.b_dec.push(0.0),
            |p| p.activation = Activation::JumpRelu { threshold: vec![-0.1; 3] },
            |p| p.activation = Activation::JumpRelu { threshold: vec![0.1; 2] },
            |p| p.activation = Activation::TopK { k: 4 },
            |p| p.w_skip = Some(vec![0.0; 3]),
            |p| p.w_skip = Some(vec![0.0, 0.0, f32::INFINITY, 0.0]),
            |p| p.rows = RowScaling::Standardise { eps: -1e-5 },
            |p| p.rows = RowScaling::Standardise { eps: f32::NAN },
            |p| {
                let (w_enc, d_in) = (vec![0.5; 3], 1);
                *p = SaeParts { d_in, w_enc, rows: RowScaling::LAYER_NORM, ..parts() };
            },
        ];
        for (i, breaks) in broken.iter().enumerate() {
            let mut p = parts();
            breaks(&mut p);
            assert!(Sae::new(p).is_err(), "law {i} not enforced");
        }
    }
}
