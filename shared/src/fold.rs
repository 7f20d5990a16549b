//! From training parameters to released weights: the pre-encoder bias and the scalar C are folded.
//!
//! Training reads `x = x_raw / C` and, with a pre-bias, `z = W_enc (x − b_dec) + b_enc`. Released weights
//! read `x_raw` with neither (arXiv 2408.05147, appendix on folding):
//!
//! ```text
//! b_enc' = C (b_enc − W_enc b_dec)    b_dec' = C b_dec    θ' = C θ    W_enc, W_dec unchanged
//! ```
//! Latents come out multiplied by C; L0 and FVU do not change.

use crate::error::{ShapeError, check_len};
use crate::sae::{Activation, Sae, SaeParts};

/// Training parameters of a JumpReLU autoencoder, borrowed, in units of the normalised data.
#[derive(Debug, Clone, Copy)]
pub struct Training<'a> {
    /// Encoder rows `[n, d_in]`.
    pub w_enc: &'a [f32],
    /// Encoder bias `[n]`.
    pub b_enc: &'a [f32],
    /// Decoder directions `[n, d_in]`.
    pub w_dec: &'a [f32],
    /// Decoder bias `[d_in]`.
    pub b_dec: &'a [f32],
    /// Thresholds θ `[n]` (not their logarithms). A raw-θ training may leave some below zero.
    pub threshold: &'a [f32],
    /// Whether the encoder read `x − b_dec`.
    pub pre_bias: bool,
}

/// The released form of `training` for raw activations `x_raw = scale · x`, folded in f64.
///
/// A negative θ (possible when θ itself is trained) becomes zero: released latents are never negative.
///
/// # Errors
/// If lengths disagree, a value is not finite, or `scale` is not a positive finite number.
pub fn fold(training: &Training<'_>, scale: f64) -> Result<Sae, ShapeError> {
    if !(scale.is_finite() && scale > 0.0) {
        let (value, expected) = (scale.to_string(), "a positive finite number");
        return Err(ShapeError::Value { name: "scale", index: 0, value, expected });
    }
    let (n, d_in) = (training.b_enc.len(), training.b_dec.len());
    check_len("w_enc", &[n, d_in], training.w_enc.len())?;
    let b_enc = training.b_enc.iter().enumerate().map(|(i, &bias)| {
        let row = &training.w_enc[i * d_in..(i + 1) * d_in];
        let shift = if training.pre_bias { crate::reference::dot(row, training.b_dec) } else { 0.0 };
        to_f32(scale * (f64::from(bias) - shift))
    });
    Sae::new(SaeParts {
        d_in,
        d_out: d_in,
        w_enc: training.w_enc.to_vec(),
        b_enc: b_enc.collect(),
        w_dec: training.w_dec.to_vec(),
        b_dec: training.b_dec.iter().map(|&b| to_f32(scale * f64::from(b))).collect(),
        activation: Activation::JumpRelu {
            threshold: training.threshold.iter().map(|&t| to_f32(scale * f64::from(t).max(0.0))).collect(),
        },
    })
}

fn to_f32(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "weights are stored as f32")]
    let value = value as f32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::{Parametrisation, Sparsity, TrainSae};
    use crate::reference;
    use crate::rows::Rows;

    const D: usize = 6;
    const N: usize = 11;

    /// A fixed irregular sequence in [-1, 1).
    fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn raw_reconstruction_is_c_times_the_normalised_one() {
        let scale = 37.3;
        for pre_bias in [true, false] {
            let (w_enc, b_enc) = (noise(1, N * D), noise(2, N));
            let (w_dec, b_dec) = (noise(3, N * D), noise(4, D));
            let threshold: Vec<f32> = noise(5, N).iter().map(|v| 0.2 + 0.1 * v).collect();
            let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let reference = TrainSae {
                d_in: D,
                w_enc: wide(&w_enc),
                b_enc: wide(&b_enc),
                w_dec: wide(&w_dec),
                b_dec: wide(&b_dec),
                threshold: wide(&threshold),
                parametrisation: Parametrisation::Raw,
                pre_bias,
            };
            let (w_enc, b_enc, w_dec, b_dec) = (&w_enc[..], &b_enc[..], &w_dec[..], &b_dec[..]);
            let training = Training { w_enc, b_enc, w_dec, b_dec, threshold: &threshold, pre_bias };
            let sae = fold(&training, scale).unwrap();

            let x = noise(6, 40 * D);
            let raw: Vec<f32> = x.iter().map(|&v| to_f32(scale * f64::from(v))).collect();
            let pass =
                reference.forward(Rows::new(&x, D).unwrap(), &Sparsity::Fixed { lambda: 0.0 }).unwrap();
            let codes = reference::encode(&sae, Rows::new(&raw, D).unwrap()).unwrap();
            let decoded = reference::decode(&sae, &codes).unwrap();

            let dense = codes.to_dense();
            let mut n_active = 0;
            for (k, (&got, &want)) in dense.iter().zip(&pass.f).enumerate() {
                assert_eq!(got != 0.0, want != 0.0, "active set differs at {k}");
                assert!((f64::from(got) / scale - want).abs() < 1e-5, "latent {k}: {got} / C against {want}");
                n_active += usize::from(want != 0.0);
            }
            assert!((40..300).contains(&n_active), "a test of active latents needs some: {n_active}");
            for ((&got, &x), residual) in decoded.iter().zip(&x).zip(&pass.residual) {
                let want = scale * (f64::from(x) + residual);
                assert!((f64::from(got) - want).abs() < 1e-5 * scale, "{got} against {want}");
            }
        }
    }

    #[test]
    fn the_pre_bias_matters_and_bad_scales_are_refused() {
        let training = Training {
            w_enc: &[1.0, 2.0],
            b_enc: &[0.5],
            w_dec: &[1.0, 0.0],
            b_dec: &[3.0, -1.0],
            threshold: &[-0.25],
            pre_bias: true,
        };
        let sae = fold(&training, 2.0).unwrap();
        assert_eq!((sae.b_enc(), sae.b_dec()), (&[-1.0f32][..], &[6.0f32, -2.0][..]));
        assert_eq!(sae.activation().threshold(0), Some(0.0));
        let plain = fold(&Training { pre_bias: false, ..training }, 2.0).unwrap();
        assert_eq!(plain.b_enc(), [1.0]);
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(fold(&training, scale).is_err());
        }
    }
}
