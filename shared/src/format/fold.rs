//! From what files hold to the one in-memory form: pre-encoder biases, gates and decoder norms folded in f64.

use super::error::FormatError;
use crate::reference::dot;
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// Subtracts `W_enc b_dec` from the encoder bias, so that `W_enc (x − b_dec) + b_enc` reads raw `x`.
/// Needs `d_in = d_out`; the caller has checked it.
pub(super) fn pre_encoder_bias(parts: &mut SaeParts) {
    for (bias, row) in parts.b_enc.iter_mut().zip(parts.w_enc.chunks_exact(parts.d_in)) {
        *bias = to_f32(f64::from(*bias) - dot(row, &parts.b_dec));
    }
}

/// The opposite of [`pre_encoder_bias`], for formats that subtract `b_dec` from what they read: the encoder bias to write.
/// Needs `d_in = d_out`; the caller has checked it.
pub(super) fn bias_behind_b_dec(sae: &Sae) -> Vec<f32> {
    let rows = sae.w_enc().chunks_exact(sae.dims().d_in);
    sae.b_enc().iter().zip(rows).map(|(&bias, row)| to_f32(f64::from(bias) + dot(row, sae.b_dec()))).collect()
}

/// A gated autoencoder as a JumpReLU one: with `r = exp(r_mag)` the gate `w·x + b_gate > 0` opens exactly
/// when the magnitude `r w·x + b_mag` exceeds `b_mag − r b_gate`, and the ReLU on the magnitude floors that at 0.
/// Scales `w_enc`, replaces `b_enc` (given as `b_mag`) and sets the thresholds.
pub(super) fn gate(parts: &mut SaeParts, b_gate: &[f32], r_mag: &[f32]) {
    let mut threshold = Vec::with_capacity(b_gate.len());
    let rows = parts.w_enc.chunks_exact_mut(parts.d_in);
    for (((row, &b_mag), &b_gate), &r_mag) in rows.zip(&parts.b_enc).zip(b_gate).zip(r_mag) {
        let r = f64::from(r_mag).exp();
        for w in row {
            *w = to_f32(f64::from(*w) * r);
        }
        threshold.push(to_f32(f64::from(b_mag) - r * f64::from(b_gate)).max(0.0));
    }
    parts.activation = Activation::JumpRelu { threshold };
}

/// Moves decoder norms into the encoder: `w_enc`, `b_enc` times `‖d_i‖`, `d_i` to unit norm. Latents come out scaled,
/// reconstructions stay. Latents with a zero direction become silent.
pub(super) fn decoder_norm(parts: &mut SaeParts) {
    let encoder = parts.w_enc.chunks_exact_mut(parts.d_in).zip(&mut parts.b_enc);
    for ((row, bias), direction) in encoder.zip(parts.w_dec.chunks_exact_mut(parts.d_out)) {
        let norm = dot(direction, direction).sqrt();
        for w in row.iter_mut().chain([bias]) {
            *w = to_f32(f64::from(*w) * norm);
        }
        if norm > 0.0 {
            for d in direction {
                *d = to_f32(f64::from(*d) / norm);
            }
        }
    }
}

/// Negative thresholds act as zero wherever a ReLU stands before or after the jump, as in every format read here.
pub(super) fn threshold(mut raw: Vec<f32>) -> Activation {
    for t in &mut raw {
        // Written so that a NaN stays, to be refused later.
        if *t < 0.0 {
            *t = 0.0;
        }
    }
    Activation::JumpRelu { threshold: raw }
}

/// For writers of formats with a threshold for each latent: those of a ReLU are zero.
pub(super) fn thresholds(part: &str, sae: &Sae) -> Result<Vec<f32>, FormatError> {
    match sae.activation() {
        Activation::JumpRelu { threshold } => Ok(threshold.clone()),
        Activation::Relu => Ok(vec![0.0; sae.dims().n_latents]),
        Activation::TopK { k } => Err(FormatError::field(
            part,
            "threshold",
            "a threshold per latent",
            format!("top-k with k = {k}"),
        )),
    }
}

/// For writers of formats without skip connections.
pub(super) fn refuse_skip(part: &str, sae: &Sae) -> Result<(), FormatError> {
    match sae.w_skip() {
        None => Ok(()),
        Some(_) => Err(FormatError::field(part, "skip connection", "none, as the format has none", "one")),
    }
}

/// For writers of formats that scale vectors in no way but the `known` ones.
pub(super) fn refuse_rows_but(part: &str, sae: &Sae, known: &[RowScaling]) -> Result<(), FormatError> {
    let describe = |rows: &RowScaling| match rows {
        RowScaling::None => "as they are".to_owned(),
        RowScaling::Standardise { eps } => format!("each standardised on its own with ε = {eps}"),
        RowScaling::Norm => "each scaled to a norm of √d".to_owned(),
    };
    if known.contains(&sae.rows()) {
        return Ok(());
    }
    let wanted = known.iter().map(describe).collect::<Vec<_>>().join(", or ");
    Err(FormatError::field(part, "vectors", format!("read {wanted}"), describe(&sae.rows())))
}

/// For writers of formats that read every vector as it is.
pub(super) fn refuse_scaled_rows(part: &str, sae: &Sae) -> Result<(), FormatError> {
    refuse_rows_but(part, sae, &[RowScaling::None])
}

#[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
pub(super) fn to_f32(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::rows::Rows;

    fn parts() -> SaeParts {
        SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.5, -0.5, 1.0, 0.25, 0.75],
            b_enc: vec![0.5, -0.25, 0.125],
            w_dec: vec![3.0, 4.0, 0.0, 2.0, 0.6, 0.8],
            b_dec: vec![0.25, -0.5],
            activation: Activation::Relu,
            w_skip: None,
            rows: RowScaling::None,
        }
    }

    #[test]
    fn pre_encoder_bias_by_hand() {
        let mut p = parts();
        pre_encoder_bias(&mut p);
        // b − w·b_dec: 0.5 − (0.25 − 0.25), −0.25 − (−0.125 − 0.5), 0.125 − (0.0625 − 0.375).
        assert_eq!(p.b_enc, [0.5, 0.375, 0.4375]);
    }

    #[test]
    fn a_folded_gate_fires_where_the_gate_fires() {
        let (b_gate, r_mag) = ([-0.5f32, 0.75, 0.25], [0.3f32, -0.2, 0.0]);
        let mut p = parts();
        gate(&mut p, &b_gate, &r_mag);
        let folded = Sae::new(p).unwrap();
        for (x0, x1) in [(0.3f32, 0.1f32), (1.0, -0.9), (-0.4, 0.9), (0.0, 0.0), (-2.0, 0.5)] {
            let codes = reference::encode(&folded, Rows::new(&[x0, x1], 2).unwrap()).unwrap().to_dense();
            for (i, &found) in codes.iter().enumerate() {
                let (w, b_mag) = (&parts().w_enc[2 * i..2 * i + 2], parts().b_enc[i]);
                let wx = w[0] * x0 + w[1] * x1;
                let magnitude = (wx * r_mag[i].exp() + b_mag).max(0.0);
                let wanted = if wx + b_gate[i] > 0.0 { magnitude } else { 0.0 };
                assert!((found - wanted).abs() < 1e-6, "latent {i} at ({x0}, {x1}): {found} for {wanted}");
            }
        }
    }

    #[test]
    fn decoder_norms_leave_reconstructions_alone() {
        let mut p = parts();
        decoder_norm(&mut p);
        assert_eq!(&p.w_dec[..4], [0.6, 0.8, 0.0, 1.0]);
        assert_eq!((p.w_enc[0], p.b_enc[0], p.b_enc[1]), (5.0, 2.5, -0.5));
    }
}
