//! Where training starts (Gemma Scope, arXiv 2408.05147 §3.2, and what short runs need instead).

use anyhow::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use shared::config::train::{DecoderBiasInit, LatentFunction, ThresholdInit, TrainConfig};

use super::normalise::Normalisation;
use super::params::{Latents, Params, Tensors};
use crate::cpu::gemm::{Matrix, product};

/// Rows that quantile thresholds are taken from.
pub const SAMPLE_ROWS: usize = 4096;
/// The lowest threshold a quantile may give: log θ needs a positive one.
const LOWEST_THRESHOLD: f32 = 1e-4;
/// Latents whose sample pre-activations are computed at a time.
const BLOCK: usize = 32;

/// Parameters before the first step; `sample` holds normalised rows for the quantiles.
///
/// Decoder directions are He-uniform rows scaled to norm 1, the encoder is a copy of them, biases are zero
/// (or the decoder bias the data's mean, and the encoder bias minus the quantile where there is no threshold to set).
///
/// # Errors
/// If the sample does not consist of whole rows.
pub fn params(config: &TrainConfig, normalisation: &Normalisation, sample: &[f32]) -> Result<Params> {
    let (n, d) = (config.width, normalisation.mean.len());
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let bound = (6.0 / d as f32).sqrt();
    let mut w_dec: Vec<f32> = (0..n * d).map(|_| rng.random_range(-bound..bound)).collect();
    for direction in w_dec.chunks_exact_mut(d) {
        let norm = direction.iter().map(|v| v * v).sum::<f32>().sqrt();
        direction.iter_mut().for_each(|v| *v /= norm);
    }
    #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
    let b_dec = match config.decoder_bias_init {
        DecoderBiasInit::Zero => vec![0.0; d],
        DecoderBiasInit::Mean => {
            normalisation.mean.iter().map(|m| (m / normalisation.scale) as f32).collect()
        }
    };
    let mut tensors = Tensors::zeros(n, d, d, false);
    (tensors.w_enc, tensors.w_dec, tensors.b_dec) = (w_dec.clone(), w_dec, b_dec);
    let latents = latents(config);
    let mut params = Params { d_in: d, d_out: d, tensors, latents, pre_bias: config.pre_bias };
    if !config.activation.chooses() {
        start_sparse(&mut params, config, sample)?;
    }
    Ok(params)
}

/// The latent function of a run.
#[must_use]
pub fn latents(config: &TrainConfig) -> Latents {
    match config.activation {
        LatentFunction::Relu => Latents::Relu,
        #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
        LatentFunction::JumpRelu => {
            Latents::JumpRelu { parametrisation: config.parametrisation, bandwidth: config.bandwidth as f32 }
        }
        LatentFunction::Gated => Latents::Gated,
        LatentFunction::TopK => Latents::TopK { k: config.k },
        LatentFunction::BatchTopK => Latents::BatchTopK { k: config.k, threshold: 0.0 },
    }
}

/// Sets thresholds, or the biases of a latent function without, such that each latent fires as often as the initial L0 asks.
fn start_sparse(params: &mut Params, config: &TrainConfig, sample: &[f32]) -> Result<()> {
    let n = config.width;
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
    let share = config.initial_l0() / n as f64;
    #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
    let parameter = |theta: f64| config.parametrisation.parameter(theta) as f32;
    match (config.activation, config.threshold_init) {
        (LatentFunction::JumpRelu, ThresholdInit::Value(theta)) => {
            params.tensors.own[0] = vec![parameter(theta); n];
        }
        (LatentFunction::JumpRelu, ThresholdInit::FromData(_)) => {
            let thetas = quantiles(params, sample, share)?.into_iter();
            let positive = thetas.map(|t| parameter(f64::from(t.max(LOWEST_THRESHOLD))));
            params.tensors.own[0] = positive.collect();
        }
        _ => params.tensors.b_enc = quantiles(params, sample, share)?.into_iter().map(|q| -q).collect(),
    }
    Ok(())
}

/// Per latent, the value that a share `share` of its pre-activations on `sample` lies above.
fn quantiles(params: &Params, sample: &[f32], share: f64) -> Result<Vec<f32>> {
    let d = params.d_in;
    let t = &params.tensors;
    let n_rows = sample.len() / d;
    let mut input = sample.to_vec();
    if params.pre_bias {
        for row in input.chunks_exact_mut(d) {
            row.iter_mut().zip(&t.b_dec).for_each(|(v, b)| *v -= b);
        }
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank"
    )]
    let above = ((n_rows as f64 * share).round() as usize).min(n_rows.saturating_sub(1));
    let blocks: Result<Vec<Vec<f32>>> = t
        .w_enc
        .par_chunks(BLOCK * d)
        .map(|w_enc| {
            let n = w_enc.len() / d;
            let mut z = vec![0.0f32; n * n_rows];
            let rows = Matrix::new(&input, n_rows, d)?;
            product(&mut z, Matrix::new(w_enc, n, d)?, rows.transposed(), 1.0, false, 1)?;
            let quantile = |z: &mut [f32]| {
                let (_, value, _) = z.select_nth_unstable_by(above, |a, b| b.total_cmp(a));
                *value
            };
            Ok(z.chunks_exact_mut(n_rows).map(quantile).collect())
        })
        .collect();
    Ok(blocks?.concat())
}
