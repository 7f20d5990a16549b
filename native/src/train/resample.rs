//! Dead latents begun again where reconstruction is worst (Bricken et al. 2023, "Towards Monosemanticity", appendix).
//!
//! Each takes the direction of a row drawn with probability proportional to its squared loss, an encoder row of a fifth of the usual
//! length, and no bias. Adam's moments become those of an average living latent: with zeros, as published, the first step would
//! be up to `1 / √(1 − β₂)` times the learning rate, which is why others warm the learning rate up again.

use rand::SeedableRng;
use rand::seq::index::sample_weighted;
use rand_chacha::ChaCha8Rng;

use super::forward::Forward;
use super::params::{Latents, Tensors};
use super::step::Trainer;

/// Length of a new encoder row, of the mean over living latents.
const ENCODER_SHARE: f32 = 0.2;
/// A new threshold, of the pre-activation on the row that the latent was made from.
const THRESHOLD_SHARE: f32 = 0.5;

/// What the encoder read of the rows of a batch `[N, d_in]`, and the residuals `x̂ − y [N, d_out]` of the whole dictionary.
#[derive(Debug, Clone, PartialEq)]
pub struct Rest {
    /// The inputs.
    pub inputs: Vec<f32>,
    /// The residuals.
    pub residuals: Vec<f32>,
}

impl Rest {
    /// Of a forward pass.
    #[must_use]
    pub fn of(forward: &Forward) -> Self {
        let residuals = (0..forward.n_rows).flat_map(|row| forward.residual(row)).copied().collect();
        Self { inputs: forward.input.clone(), residuals }
    }
}

impl Trainer {
    /// Begins the latents `dead [n]` again from rows of the batch of `rest`, as many as it has rows with an error; returns which.
    ///
    /// The choice follows from `seed` and the step.
    pub fn resample(&mut self, rest: &Rest, dead: &[bool], seed: u64) -> Vec<u32> {
        let dead_latents: Vec<usize> = (0..dead.len()).filter(|&latent| dead[latent]).collect();
        if dead_latents.is_empty() || dead_latents.len() == dead.len() {
            return Vec::new();
        }
        // The square of a row's loss, which is the square of its error.
        let (d_in, d_out) = (self.params.d_in, self.params.d_out);
        let n_rows = rest.inputs.len() / d_in.max(1);
        let weight = |row: usize| {
            let error: f64 =
                rest.residuals[row * d_out..(row + 1) * d_out].iter().map(|r| f64::from(*r).powi(2)).sum();
            error * error
        };
        let weights: Vec<f64> = (0..n_rows).map(weight).collect();
        let drawable = weights.iter().filter(|weight| **weight > 0.0).count();
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ self.step.rotate_left(32));
        let amount = dead_latents.len().min(drawable);
        let Ok(rows) = sample_weighted(&mut rng, weights.len(), |row| weights[row], amount) else {
            return Vec::new();
        };
        let usual = ENCODER_SHARE * mean_length(&self.params.tensors.w_enc, self.params.d_in, dead);
        self.calm_moments(dead);
        let chosen: Vec<usize> = dead_latents.into_iter().take(amount).collect();
        for (&latent, row) in chosen.iter().zip(rows) {
            self.begin(latent, rest, row, usual);
        }
        #[expect(clippy::cast_possible_truncation, reason = "widths are below 2^32")]
        chosen.into_iter().map(|latent| latent as u32).collect()
    }

    /// One latent from one row.
    fn begin(&mut self, latent: usize, rest: &Rest, row: usize, length: f32) {
        let (d_in, d_out) = (self.params.d_in, self.params.d_out);
        let input = &rest.inputs[row * d_in..(row + 1) * d_in];
        // What is missing from the row, where it is something else than what was read.
        let missing: Vec<f32> = rest.residuals[row * d_out..(row + 1) * d_out].iter().map(|r| -r).collect();
        let transcodes = d_in != d_out || !self.params.pre_bias;
        let t = &mut self.params.tensors;
        let direction = &mut t.w_dec[latent * d_out..(latent + 1) * d_out];
        direction.copy_from_slice(if transcodes { &missing } else { input });
        scale_to(direction, 1.0);
        let encoder = &mut t.w_enc[latent * d_in..(latent + 1) * d_in];
        encoder.copy_from_slice(input);
        scale_to(encoder, length);
        t.b_enc[latent] = 0.0;
        let own = match self.params.latents {
            Latents::JumpRelu { parametrisation, .. } => {
                let z: f32 = encoder.iter().zip(input).map(|(w, x)| w * x).sum();
                let theta = (THRESHOLD_SHARE * z).max(f32::MIN_POSITIVE);
                #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
                let parameter = parametrisation.parameter(f64::from(theta)) as f32;
                parameter
            }
            _ => 0.0,
        };
        let n_layers = t.own[0].len() / t.b_enc.len();
        t.own[0][latent * n_layers..(latent + 1) * n_layers].fill(own);
        t.own[1][latent] = 0.0;
    }

    /// Gives dead latents the moments of an average living one.
    fn calm_moments(&mut self, dead: &[bool]) {
        let moments = &mut self.moments;
        for (latent, _) in dead.iter().enumerate().filter(|(_, dead)| **dead) {
            (moments.weights_step[latent], moments.own_step[latent]) = (self.step, self.step);
        }
        average(&mut moments.second, dead);
        if let Some(first) = &mut moments.first {
            for (name, values) in first.named_mut() {
                if let Some(width) = per_latent(name, values.len(), dead.len()) {
                    let rows = values.chunks_exact_mut(width).zip(dead).filter(|(_, dead)| **dead);
                    rows.for_each(|(row, _)| row.fill(0.0));
                }
            }
        }
    }
}

/// Values a latent has in the tensor `name`; none where it has no row of its own.
fn per_latent(name: &str, len: usize, n_latents: usize) -> Option<usize> {
    (name != "b_dec" && name != "w_skip" && len >= n_latents).then(|| len / n_latents)
}

/// Replaces the rows of dead latents by the mean over living ones.
fn average(tensors: &mut Tensors, dead: &[bool]) {
    let n_living = dead.iter().filter(|dead| !**dead).count().max(1);
    for (name, values) in tensors.named_mut() {
        let Some(width) = per_latent(name, values.len(), dead.len()) else { continue };
        let mut mean = vec![0.0f64; width];
        for (row, _) in values.chunks_exact(width).zip(dead).filter(|(_, dead)| !**dead) {
            mean.iter_mut().zip(row).for_each(|(mean, v)| *mean += f64::from(*v));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "moments are f32")]
        let mean: Vec<f32> = mean.iter().map(|sum| (sum / n_living as f64) as f32).collect();
        for (row, _) in values.chunks_exact_mut(width).zip(dead).filter(|(_, dead)| **dead) {
            row.copy_from_slice(&mean);
        }
    }
}

/// The mean length of the rows of living latents.
fn mean_length(rows: &[f32], width: usize, dead: &[bool]) -> f32 {
    let living = || rows.chunks_exact(width).zip(dead).filter(|(_, dead)| !**dead);
    let total: f32 = living().map(|(row, _)| row.iter().map(|v| v * v).sum::<f32>().sqrt()).sum();
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let n = living().count().max(1) as f32;
    total / n
}

fn scale_to(row: &mut [f32], length: f32) {
    let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|v| *v *= length / norm);
    }
}
