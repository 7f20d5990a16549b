//! The f64 meaning of a sparse autoencoder: obvious loops, double sums, no tricks.
//!
//! Every backend is judged against this module, so it must stay better than what it judges.

use crate::codes::{Codes, CodesBuilder};
use crate::error::ShapeError;
use crate::forward::{Dims, Forward};
use crate::row_scaling::Undo;
use crate::rows::Rows;
use crate::sae::{Activation, Sae};

/// Pre-activation of one latent, `z_i = w_i · x + b_i`, summed in f64. `x` is what the encoder reads: where the
/// dictionary scales rows, the scaled one.
#[must_use]
pub fn pre_activation(sae: &Sae, x: &[f32], latent: usize) -> f64 {
    dot(sae.encoder_row(latent), x) + f64::from(sae.b_enc()[latent])
}

/// Inner product in f64; products of f32 values are exact.
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The latents that are active given all pre-activations `z [n]` of a row, ascending.
#[must_use]
pub fn active_latents(activation: &Activation, z: &[f64]) -> Vec<u32> {
    match activation {
        Activation::JumpRelu { threshold } => ascending(z, |i, z| z > f64::from(threshold[i])),
        Activation::Relu => ascending(z, |_, z| z > 0.0),
        Activation::TopK { k } => {
            let mut order: Vec<u32> = (0u32..).take(z.len()).collect();
            // Descending by value; the stable sort leaves ties in latent order.
            order.sort_by(|&a, &b| z[b as usize].total_cmp(&z[a as usize]));
            order.truncate(*k);
            order.retain(|&i| z[i as usize] > 0.0);
            order.sort_unstable();
            order
        }
    }
}

fn ascending(z: &[f64], active: impl Fn(usize, f64) -> bool) -> Vec<u32> {
    (0u32..).zip(z).filter(|&(i, &z)| active(i as usize, z)).map(|(i, _)| i).collect()
}

/// Activation vectors `[n_rows, d_in]` to latent activations, in f64.
///
/// # Errors
/// If rows are not `d_in` wide.
pub fn encode(sae: &Sae, x: Rows<'_>) -> Result<Codes, ShapeError> {
    x.expect_width("x", sae.dims().d_in)?;
    let n = sae.dims().n_latents;
    let mut builder = CodesBuilder::new(n);
    let scaled = sae.rows().scaled(x);
    for row in Rows::new(&scaled, x.width())? {
        let z: Vec<f64> = (0..n).map(|i| pre_activation(sae, row, i)).collect();
        for latent in active_latents(sae.activation(), &z) {
            #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
            builder.push(latent, z[latent as usize] as f32);
        }
        builder.end_row()?;
    }
    Ok(builder.finish())
}

/// Latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`, summed in f64.
///
/// # Errors
/// If the codes index another dictionary width, or `x` has another width or other rows than the codes.
pub fn decode(sae: &Sae, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
    let Dims { d_in, d_out, .. } = sae.dims();
    sae.check_decode(x, codes)?;
    let mut out = Vec::with_capacity(codes.n_rows() * d_out);
    let mut sum = vec![0.0f64; d_out];
    for (row, (latents, values)) in x.iter().zip(codes.iter()) {
        for (s, &b) in sum.iter_mut().zip(sae.b_dec()) {
            *s = f64::from(b);
        }
        for (&latent, &value) in latents.iter().zip(values) {
            for (s, &w) in sum.iter_mut().zip(sae.decoder_direction(latent as usize)) {
                *s += f64::from(value) * f64::from(w);
            }
        }
        let Undo { scale, shift } = sae.rows().undo(row);
        for s in &mut sum {
            *s = scale * *s + shift;
        }
        if let Some(w_skip) = sae.w_skip() {
            for (s, weights) in sum.iter_mut().zip(w_skip.chunks_exact(d_in)) {
                *s += dot(weights, row);
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "activations are stored as f32")]
        out.extend(sum.iter().map(|&s| s as f32));
    }
    Ok(out)
}

/// The reference as a backend, so that the conformance suite can be run on itself.
#[derive(Debug, Clone)]
pub struct Reference {
    sae: Sae,
}

impl Reference {
    /// Wraps `sae`.
    #[must_use]
    pub fn new(sae: Sae) -> Self {
        Self { sae }
    }
}

impl Forward for Reference {
    type Error = ShapeError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        encode(&self.sae, x)
    }

    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        decode(&self.sae, x, codes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::sae::SaeParts;

    /// Two inputs, three latents, worked by hand: latent 1 sits exactly on its threshold.
    #[test]
    fn hand_worked_case() {
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, -1.0, 1.0],
            b_enc: vec![0.5, 0.0, 0.25],
            w_dec: vec![2.0, 0.0, 0.0, 3.0, 1.0, 1.0],
            b_dec: vec![0.125, -0.125],
            activation: Activation::JumpRelu { threshold: vec![1.0, 1.0, 0.125] },
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap();
        let x = Rows::new(&[1.0, 1.0], 2).unwrap();
        let codes = encode(&sae, x).unwrap();
        assert_eq!(codes.row(0), (&[0u32, 2][..], &[1.5f32, 0.25][..]));
        assert_eq!(decode(&sae, x, &codes).unwrap(), [3.375, 0.125]);
    }

    /// Norm 5 to √2: x' = (0.6, 0.8)·√2. With ReLU and the identity as encoder and decoder, undoing gives x back; the bias
    /// of the decoder is scaled with it, and the skip connection reads x itself.
    #[test]
    fn scaled_rows_and_a_skip_connection_by_hand() {
        let identity = vec![1.0, 0.0, 0.0, 1.0];
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: identity.clone(),
            b_enc: vec![0.0; 2],
            w_dec: identity,
            b_dec: vec![0.0, 2f32.sqrt()],
            activation: Activation::Relu,
            w_skip: Some(vec![0.0, 1.0, 10.0, 0.0]),
            rows: RowScaling::Norm,
        })
        .unwrap();
        let x = Rows::new(&[3.0, 4.0], 2).unwrap();
        let codes = encode(&sae, x).unwrap();
        let found = decode(&sae, x, &codes).unwrap();
        for ((&f, &y), (latent, wanted)) in
            codes.row(0).1.iter().zip(&found).zip([(0.6, 3.0 + 4.0), (0.8, 4.0 + 5.0 + 30.0)])
        {
            assert!((f - latent * 2f32.sqrt()).abs() < 1e-6 && (y - wanted).abs() < 1e-5, "{f} {y}");
        }
    }

    #[test]
    fn top_k_breaks_ties_towards_the_lower_latent_and_drops_negatives() {
        assert_eq!(active_latents(&Activation::TopK { k: 2 }, &[1.0, 3.0, 1.0, 0.5]), [0, 1]);
        assert_eq!(active_latents(&Activation::TopK { k: 3 }, &[-1.0, 2.0, -3.0]), [1]);
    }
}
