//! From training parameters to released weights: the pre-encoder bias and the scalar C are folded.
//!
//! Training reads `x = x_raw / C` and, with a pre-bias, `z = W_enc (x − b_dec) + b_enc`. Released weights
//! read `x_raw` with neither (arXiv 2408.05147, appendix on folding):
//!
//! ```text
//! b_enc' = C (b_enc − W_enc b_dec)    b_dec' = C b_dec    θ' = C θ    W_enc, W_dec unchanged
//! ```
//! Latents come out multiplied by C; L0 and FVU do not change. A transcoder has a C of its own for what it writes:
//! `W_dec' = W_dec · C_out / C_in`, and so for a skip connection, `W_skip' = W_skip · C_out / C_in`.

use crate::error::{ShapeError, check_len};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// How training decided which latents are active.
#[derive(Debug, Clone, Copy)]
pub enum Trained<'a> {
    /// `max(z, 0)`.
    Relu,
    /// Thresholds θ `[n]` (not their logarithms). A raw-θ training may leave some below zero.
    JumpRelu {
        /// θ.
        threshold: &'a [f32],
    },
    /// A gate, and a magnitude path that shares its directions; becomes a JumpReLU (arXiv 2404.16014 §3.2).
    Gated {
        /// Log of the magnitude path's scale `[n]`.
        r_mag: &'a [f32],
        /// The magnitude path's bias `[n]`.
        b_mag: &'a [f32],
    },
    /// The k largest of a row.
    TopK {
        /// k.
        k: usize,
    },
    /// The k·N largest of a batch; becomes a JumpReLU with one threshold for all.
    BatchTopK {
        /// The value above which latents were active, on average over batches.
        threshold: f32,
    },
}

/// Training parameters, borrowed, in units of the normalised data.
#[derive(Debug, Clone, Copy)]
pub struct Training<'a> {
    /// Encoder rows `[n, d_in]`.
    pub w_enc: &'a [f32],
    /// Encoder bias `[n]`.
    pub b_enc: &'a [f32],
    /// Decoder directions `[n, d_out]`.
    pub w_dec: &'a [f32],
    /// Decoder bias `[d_out]`.
    pub b_dec: &'a [f32],
    /// The skip connection `[d_out, d_in]`, which reads `x` without the pre-bias.
    pub w_skip: Option<&'a [f32]>,
    /// The latent function.
    pub latents: Trained<'a>,
    /// Whether the encoder read `x − b_dec`; only where input and output have one width and one scale.
    pub pre_bias: bool,
}

/// The scalars C that raw vectors were divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Of what the encoder reads.
    pub input: f64,
    /// Of what the decoder writes; the same, unless a transcoder was trained.
    pub output: f64,
}

/// The released form of `training` for raw activations, folded in f64.
///
/// A negative θ (possible when θ itself is trained) becomes zero: released latents are never negative.
///
/// # Errors
/// If lengths disagree, a value is not finite, or a scale is not a positive finite number.
pub fn fold(training: &Training<'_>, scales: Scales) -> Result<Sae, ShapeError> {
    for (name, scale) in [("input scale", scales.input), ("output scale", scales.output)] {
        if !(scale.is_finite() && scale > 0.0) {
            let (value, expected) = (scale.to_string(), "a positive finite number");
            return Err(ShapeError::Value { name, index: 0, value, expected });
        }
    }
    let (n, d_out, scale) = (training.b_enc.len(), training.b_dec.len(), scales.input);
    let d_in = training.w_enc.len() / n.max(1);
    check_len("w_enc", &[n, d_in], training.w_enc.len())?;
    if training.pre_bias {
        check_len("b_dec with a pre-bias", &[d_in], d_out)?;
    }
    let (mut w_enc, mut biases) = (training.w_enc.to_vec(), vec![0.0; n]);
    // What the encoder's product is shifted by: z = w·x + shift for the path that gives the latent its value.
    for (i, bias) in biases.iter_mut().enumerate() {
        let row = &training.w_enc[i * d_in..(i + 1) * d_in];
        let shift = if training.pre_bias { crate::reference::dot(row, training.b_dec) } else { 0.0 };
        *bias = match training.latents {
            Trained::Gated { r_mag, b_mag } => {
                check_len("r_mag", &[n], r_mag.len())?;
                check_len("b_mag", &[n], b_mag.len())?;
                f64::from(b_mag[i]) - f64::from(r_mag[i]).exp() * shift
            }
            _ => f64::from(training.b_enc[i]) - shift,
        };
    }
    if let Trained::Gated { r_mag, .. } = training.latents {
        for (row, &r) in w_enc.chunks_exact_mut(d_in).zip(r_mag) {
            row.iter_mut().for_each(|w| *w = to_f32(f64::from(*w) * f64::from(r).exp()));
        }
    }
    let ratio = scales.output / scales.input;
    let rescaled = |weights: &[f32]| weights.iter().map(|&w| to_f32(ratio * f64::from(w))).collect();
    Sae::new(SaeParts {
        d_in,
        d_out,
        w_enc,
        b_enc: biases.into_iter().map(|b| to_f32(scale * b)).collect(),
        w_dec: rescaled(training.w_dec),
        b_dec: training.b_dec.iter().map(|&b| to_f32(scales.output * f64::from(b))).collect(),
        activation: activation(training, scale),
        w_skip: training.w_skip.map(rescaled),
        rows: RowScaling::None,
    })
}

fn activation(training: &Training<'_>, scale: f64) -> Activation {
    let raw = |theta: f64| to_f32(scale * theta.max(0.0));
    match training.latents {
        Trained::Relu => Activation::Relu,
        Trained::TopK { k } => Activation::TopK { k },
        Trained::JumpRelu { threshold } => {
            Activation::JumpRelu { threshold: threshold.iter().map(|&t| raw(f64::from(t))).collect() }
        }
        Trained::BatchTopK { threshold } => {
            Activation::JumpRelu { threshold: vec![raw(f64::from(threshold)); training.b_enc.len()] }
        }
        Trained::Gated { r_mag, b_mag } => {
            // π_gate > 0 where the magnitude path exceeds θ = b_mag − exp(r_mag) b_gate.
            let gates = training.b_enc.iter().zip(r_mag).zip(b_mag);
            let theta = gates.map(|((&b, &r), &m)| f64::from(m) - f64::from(r).exp() * f64::from(b));
            Activation::JumpRelu { threshold: theta.map(raw).collect() }
        }
    }
}

fn to_f32(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "weights are stored as f32")]
    let value = value as f32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::{Latents, Objective, Parametrisation, Sparsity, TrainSae};
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

    /// Released weights on raw vectors are the trained ones on normalised vectors, times the scalars, whatever the variant.
    #[test]
    fn raw_latents_and_reconstructions_are_the_normalised_ones_times_c() {
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let threshold: Vec<f32> = noise(5, N).iter().map(|v| 0.2 + 0.1 * v).collect();
        let (r_mag, b_mag) = (noise(7, N), noise(8, N));
        let jump = |theta: Vec<f64>| Latents::JumpRelu {
            threshold: theta,
            parametrisation: Parametrisation::Raw,
            bandwidth: 0.1,
        };
        let gated = Latents::Gated { r_mag: wide(&r_mag), b_mag: wide(&b_mag) };
        let variants = [
            (Trained::Relu, Latents::Relu),
            (Trained::JumpRelu { threshold: &threshold }, jump(wide(&threshold))),
            (Trained::Gated { r_mag: &r_mag, b_mag: &b_mag }, gated),
            (Trained::TopK { k: 3 }, Latents::TopK { k: 3 }),
            (Trained::BatchTopK { threshold: 0.25 }, jump(vec![0.25; N])),
        ];
        for (latents, reference_latents) in variants {
            for (d_out, pre_bias, output, skip) in [
                (D, true, 37.3, false),
                (D, true, 37.3, true),
                (D, false, 37.3, false),
                (D + 2, false, 0.6, true),
            ] {
                let w_skip = noise(9, d_out * D);
                let w_skip = skip.then_some(&w_skip[..]);
                let scales = Scales { input: 37.3, output };
                let (w_enc, b_enc) = (&noise(1, N * D)[..], &noise(2, N)[..]);
                let (w_dec, b_dec) = (&noise(3, N * d_out)[..], &noise(4, d_out)[..]);
                let reference = TrainSae {
                    d_in: D,
                    d_out,
                    w_enc: wide(w_enc),
                    b_enc: wide(b_enc),
                    w_dec: wide(w_dec),
                    b_dec: wide(b_dec),
                    latents: reference_latents.clone(),
                    pre_bias,
                    w_skip: w_skip.map(wide),
                };
                let sae = fold(&Training { w_enc, b_enc, w_dec, b_dec, w_skip, latents, pre_bias }, scales)
                    .unwrap();
                agrees(&sae, &reference, scales);
            }
        }
    }

    fn agrees(sae: &Sae, reference: &TrainSae, scales: Scales) {
        let x = noise(6, 40 * D);
        let raw: Vec<f32> = x.iter().map(|&v| to_f32(scales.input * f64::from(v))).collect();
        // Against nothing, so that the residual is the reconstruction.
        let y = vec![0.0; 40 * reference.d_out];
        let (x, y) = (Rows::new(&x, D).unwrap(), Rows::new(&y, reference.d_out).unwrap());
        let pass = reference.forward(x, y, &Objective::plain(Sparsity::None)).unwrap();
        let codes = reference::encode(sae, Rows::new(&raw, D).unwrap()).unwrap();
        let decoded = reference::decode(sae, Rows::new(&raw, D).unwrap(), &codes).unwrap();
        let mut n_active = 0;
        for (k, (&got, &want)) in codes.to_dense().iter().zip(&pass.f).enumerate() {
            assert_eq!(got != 0.0, want != 0.0, "active set differs at {k}");
            let got = f64::from(got) / scales.input;
            assert!((got - want).abs() < 1e-5, "latent {k}: {got} against {want}");
            n_active += usize::from(want != 0.0);
        }
        assert!((40..300).contains(&n_active), "a test of active latents needs some: {n_active}");
        for (&got, &want) in decoded.iter().zip(&pass.residual) {
            let got = f64::from(got) / scales.output;
            assert!((got - want).abs() < 1e-4, "{got} against {want}");
        }
    }

    #[test]
    fn the_pre_bias_matters_and_bad_scales_are_refused() {
        let training = Training {
            w_enc: &[1.0, 2.0],
            b_enc: &[0.5],
            w_dec: &[1.0, 0.0],
            b_dec: &[3.0, -1.0],
            w_skip: None,
            latents: Trained::JumpRelu { threshold: &[-0.25] },
            pre_bias: true,
        };
        let twice = Scales { input: 2.0, output: 2.0 };
        let sae = fold(&training, twice).unwrap();
        assert_eq!((sae.b_enc(), sae.b_dec()), (&[-1.0f32][..], &[6.0f32, -2.0][..]));
        assert_eq!(sae.activation().threshold(0), Some(0.0));
        let plain = fold(&Training { pre_bias: false, ..training }, twice).unwrap();
        assert_eq!(plain.b_enc(), [1.0]);
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(fold(&training, Scales { input: scale, ..twice }).is_err());
            assert!(fold(&training, Scales { output: scale, ..twice }).is_err());
        }
        let skip = fold(
            &Training { w_skip: Some(&[1.0, 2.0, 3.0, 4.0]), ..training },
            Scales { output: 6.0, ..twice },
        );
        assert_eq!(skip.unwrap().w_skip(), Some(&[3.0f32, 6.0, 9.0, 12.0][..]));
        assert!(fold(&Training { w_skip: Some(&[1.0; 3]), ..training }, twice).is_err());
        let narrow = Training { b_dec: &[3.0], w_dec: &[1.0], ..training };
        assert!(fold(&narrow, twice).is_err());
    }
}
