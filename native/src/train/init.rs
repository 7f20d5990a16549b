//! Where training starts (Gemma Scope, arXiv 2408.05147 §3.2, and what short runs need instead).

use anyhow::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use shared::config::train::{DecoderBiasInit, LatentFunction, ThresholdInit, Thresholds, TrainConfig};

use super::normalise::Scaling;
use super::order::Pairs;
use super::params::{Latents, Params, Tensors};
use crate::cpu::gemm::{Matrix, product};

/// Rows that quantile thresholds are taken from.
const SAMPLE_ROWS: usize = 4096;
/// The fewest of them that are of one of several layers.
const SAMPLE_ROWS_OF_A_LAYER: usize = 256;
/// The lowest threshold a quantile may give: log θ needs a positive one.
const LOWEST_THRESHOLD: f32 = 1e-4;
/// The least that thresholds of a layer are multiplied by at the start.
const SMALLEST_FACTOR: f32 = 1e-3;
/// Latents whose sample pre-activations are computed at a time.
const BLOCK: usize = 32;

/// Rows that quantile thresholds are taken from, of so many inputs.
#[must_use]
pub fn sample_rows(n_inputs: usize) -> usize {
    SAMPLE_ROWS.max(SAMPLE_ROWS_OF_A_LAYER * n_inputs)
}

/// Parameters before the first step; `sample` holds normalised pairs for what is taken from data.
///
/// Decoder directions are He-uniform rows scaled to norm 1, the encoder is a copy of them, biases are zero
/// (or the decoder bias the data's mean, and the encoder bias minus the quantile where there is no threshold to set).
/// A transcoder's encoder rows are such rows; its directions are where its inputs move the targets, `normalise(Cov(y, x) w_i)`,
/// its encoder bias takes the mean of the inputs away, and a skip connection starts as nothing.
///
/// # Errors
/// If the sample does not consist of whole rows.
pub fn params(config: &TrainConfig, scaling: &Scaling, sample: &Pairs) -> Result<Params> {
    let (n, [d_in, d_out]) = (config.width, scaling.widths());
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let bound = (6.0 / d_in as f32).sqrt();
    let mut w_enc: Vec<f32> = (0..n * d_in).map(|_| rng.random_range(-bound..bound)).collect();
    w_enc.chunks_exact_mut(d_in).for_each(normalise);
    let mut tensors =
        Tensors::zeros(n, d_in, d_out, config.skip).with_thresholds(n_layers(config, scaling.inputs.len()));
    match config.decoder_bias_init {
        DecoderBiasInit::Mean => tensors.b_dec = narrow(&scaling.output_mean()),
        DecoderBiasInit::GeometricMedian => {
            tensors.b_dec = narrow(&geometric_median(sample.targets(), d_out));
        }
        DecoderBiasInit::Zero => {}
    }
    tensors.w_dec = w_enc.clone();
    if scaling.target.is_some() {
        tensors.w_dec = effects(&w_enc, scaling, sample)?;
        let mean = narrow(&scaling.input_mean());
        let offset = |row: &[f32]| -row.iter().zip(&mean).map(|(w, m)| w * m).sum::<f32>();
        tensors.b_enc = w_enc.chunks_exact(d_in).map(offset).collect();
    }
    tensors.w_enc = w_enc;
    let latents = latents(config);
    let (pre_bias, encoder_bias) = (config.subtracts_bias(), config.encoder_bias);
    let mut params = Params { d_in, d_out, tensors, latents, pre_bias, encoder_bias };
    if !config.activation.chooses() {
        start_sparse(&mut params, config, sample)?;
    }
    Ok(params)
}

/// Layers with thresholds of their own, of a run over `n_inputs` layers.
#[must_use]
pub fn n_layers(config: &TrainConfig, n_inputs: usize) -> usize {
    if config.thresholds == Thresholds::PerLayer { n_inputs.max(1) } else { 1 }
}

/// The point with the least sum of distances to `rows [N, width]`, by Weiszfeld's iteration in f64 from their mean (Weiszfeld 1937;
/// rows at the point itself are passed over, as by Vardi and Zhang, PNAS 97(4), 2000, where they do not hold it there).
fn geometric_median(rows: &[f32], width: usize) -> Vec<f64> {
    const ITERATIONS: usize = 100;
    let weighted = |weight: &(dyn Fn(&[f32]) -> f64 + Sync)| {
        let parts = rows.par_chunks(width * 256).map(|rows| {
            let (mut sum, mut total) = (vec![0.0f64; width], 0.0);
            for row in rows.chunks_exact(width) {
                let weight = weight(row);
                sum.iter_mut().zip(row).for_each(|(sum, &v)| *sum += weight * f64::from(v));
                total += weight;
            }
            (sum, total)
        });
        let parts: Vec<(Vec<f64>, f64)> = parts.collect();
        let (mut sum, mut total) = (vec![0.0f64; width], 0.0);
        for (part, weight) in parts {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            total += weight;
        }
        (total > 0.0).then(|| sum.into_iter().map(|sum| sum / total).collect::<Vec<f64>>())
    };
    let Some(mut point) = weighted(&|_| 1.0) else { return vec![0.0; width] };
    for _ in 0..ITERATIONS {
        let near = |row: &[f32]| {
            let squares: f64 = row.iter().zip(&point).map(|(&v, p)| (f64::from(v) - p).powi(2)).sum();
            if squares > 0.0 { 1.0 / squares.sqrt() } else { 0.0 }
        };
        let Some(next) = weighted(&near) else { break };
        let moved: f64 = next.iter().zip(&point).map(|(a, b)| (a - b).powi(2)).sum();
        let length: f64 = next.iter().map(|v| v * v).sum();
        point = next;
        if moved <= 1e-14 * length {
            break;
        }
    }
    point
}

fn normalise(row: &mut [f32]) {
    let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|v| *v /= norm);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

/// For each encoder row `w [d_in]`, the direction in which targets lie when the input lies along it:
/// `normalise(Cov(y, x) w) [d_out]`.
fn effects(w_enc: &[f32], scaling: &Scaling, sample: &Pairs) -> Result<Vec<f32>> {
    let [d_in, d_out] = scaling.widths();
    let (n, n_rows) = (w_enc.len() / d_in, sample.x.len() / d_in);
    let centred = |rows: &[f32], mean: &[f64]| -> Vec<f32> {
        let mean = narrow(mean);
        rows.chunks_exact(mean.len()).flat_map(|row| row.iter().zip(&mean).map(|(v, m)| v - m)).collect()
    };
    let (x, y) =
        (centred(&sample.x, &scaling.input_mean()), centred(sample.targets(), &scaling.output_mean()));
    let threads = rayon::current_num_threads();
    let mut covariance = vec![0.0f32; d_in * d_out];
    let (x, y) = (Matrix::new(&x, n_rows, d_in)?, Matrix::new(&y, n_rows, d_out)?);
    product(&mut covariance, x.transposed(), y, 1.0, false, threads)?;
    let mut w_dec = vec![0.0f32; n * d_out];
    let covariance = Matrix::new(&covariance, d_in, d_out)?;
    product(&mut w_dec, Matrix::new(w_enc, n, d_in)?, covariance, 1.0, false, threads)?;
    w_dec.chunks_exact_mut(d_out).for_each(normalise);
    Ok(w_dec)
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
fn start_sparse(params: &mut Params, config: &TrainConfig, sample: &Pairs) -> Result<()> {
    let n = config.width;
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
    let share = config.initial_l0() / n as f64;
    #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
    let parameter = |theta: f64| config.parametrisation.parameter(theta) as f32;
    match (config.activation, config.threshold_init) {
        (LatentFunction::JumpRelu, ThresholdInit::Value(theta)) => {
            params.tensors.own[0].fill(parameter(theta));
        }
        (LatentFunction::JumpRelu, ThresholdInit::FromData(_)) => {
            let n_layers = params.n_layers();
            let all = quantiles(params, &sample.x, share)?;
            let all: Vec<f32> = all.into_iter().map(|theta| theta.max(LOWEST_THRESHOLD)).collect();
            for layer in 0..n_layers {
                let factor = if n_layers == 1 {
                    1.0
                } else {
                    common_factor(params, &rows_of(sample, params.d_in, layer), &all, config.initial_l0())?
                };
                for (latent, theta) in all.iter().enumerate() {
                    params.tensors.own[0][latent * n_layers + layer] = parameter(f64::from(theta * factor));
                }
            }
        }
        _ => {
            let quantiles = quantiles(params, &sample.x, share)?;
            params.tensors.b_enc.iter_mut().zip(quantiles).for_each(|(bias, q)| *bias -= q);
        }
    }
    Ok(())
}

/// The rows of one of several layers.
fn rows_of(sample: &Pairs, d: usize, layer: usize) -> Vec<f32> {
    let rows = sample.x.chunks_exact(d).zip(&sample.inputs);
    let own = rows.filter(|(_, input)| usize::from(**input) == layer);
    own.flat_map(|(row, _)| row.iter().copied()).collect()
}

/// What all of `thetas [n]` are to be multiplied by, so that the rows of a layer have a mean L0 of `l0`. A quantile of each latent's
/// own at each layer would let every latent fire equally often at every layer, when it is for some that it is made: on 30 layers of
/// SmolLM2-135M, width 2048, L0 32, 500 steps of 1024, that ended at an FVU of 0.325, and this at 0.308.
fn common_factor(params: &Params, rows: &[f32], thetas: &[f32], l0: f64) -> Result<f32> {
    let n_rows = rows.len() / params.d_in;
    let ratios = blocks(params, rows, |first, z, bias| {
        let own = thetas.iter().skip(first).zip(bias);
        let latents = z.chunks_exact(n_rows.max(1)).zip(own);
        latents.flat_map(|(z, (theta, bias))| z.iter().map(move |z| (z + bias) / theta)).collect()
    })?;
    let mut ratios = ratios.concat();
    let above = rank(n_rows, l0).min(ratios.len().saturating_sub(1));
    if ratios.is_empty() {
        return Ok(1.0);
    }
    let (_, factor, _) = ratios.select_nth_unstable_by(above, |a, b| b.total_cmp(a));
    Ok(factor.max(SMALLEST_FACTOR))
}

/// `share` times `n_rows`, rounded.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rank"
)]
fn rank(n_rows: usize, share: f64) -> usize {
    (n_rows as f64 * share).round() as usize
}

/// Per latent, the value that a share `share` of its pre-activations on `sample` lies above.
fn quantiles(params: &Params, sample: &[f32], share: f64) -> Result<Vec<f32>> {
    let n_rows = sample.len() / params.d_in;
    let above = rank(n_rows, share).min(n_rows.saturating_sub(1));
    let quantiles = blocks(params, sample, |_, z, bias| {
        let quantile = |(z, bias): (&mut [f32], &f32)| {
            let (_, value, _) = z.select_nth_unstable_by(above, |a, b| b.total_cmp(a));
            *value + bias
        };
        z.chunks_exact_mut(n_rows).zip(bias).map(quantile).collect()
    })?;
    Ok(quantiles.concat())
}

/// What `of` makes of the products of some latents with all rows of `sample`: it is given the first latent, a line of products for
/// each, and their biases.
fn blocks(
    params: &Params,
    sample: &[f32],
    of: impl Fn(usize, &mut [f32], &[f32]) -> Vec<f32> + Sync,
) -> Result<Vec<Vec<f32>>> {
    let d = params.d_in;
    let t = &params.tensors;
    let n_rows = sample.len() / d;
    let mut input = sample.to_vec();
    if params.pre_bias {
        for row in input.chunks_exact_mut(d) {
            row.iter_mut().zip(&t.b_dec).for_each(|(v, b)| *v -= b);
        }
    }
    let weights = t.w_enc.par_chunks(BLOCK * d).zip(t.b_enc.par_chunks(BLOCK)).enumerate();
    weights
        .map(|(block, (w_enc, b_enc))| {
            let n = w_enc.len() / d;
            let mut z = vec![0.0f32; n * n_rows];
            let rows = Matrix::new(&input, n_rows, d)?;
            product(&mut z, Matrix::new(w_enc, n, d)?, rows.transposed(), 1.0, false, 1)?;
            Ok(of(block * BLOCK, &mut z, b_enc))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of four points of a convex quadrangle it is where the diagonals cross, however long they are.
    #[test]
    fn the_geometric_median_is_not_drawn_by_what_is_far() {
        let corners = [-1.0f32, 0.0, 100.0, 0.0, 0.0, -2.0, 0.0, 50.0];
        let median = geometric_median(&corners.repeat(200), 2);
        assert!(median.iter().all(|v| v.abs() < 1e-3), "{median:?}");
        // It may be a point of the data, where its distance says nothing.
        let begun = geometric_median(&[4.0, 4.0, 3.0, 4.0, 5.0, 4.0, 4.0, 3.0, 4.0, 5.0], 2);
        assert_eq!(begun, [4.0, 4.0]);
        assert_eq!(geometric_median(&[], 2), [0.0, 0.0]);
    }
}
