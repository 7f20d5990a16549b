//! One JumpReLU training step on the CPU, sparse wherever sparse wins.
//!
//! Only the encoder product is dense ([`super::encode`]). Everything after it touches active latents and
//! those inside the straight-through window: decoding gathers a row's active directions; the gradients of
//! a latent's direction, encoder row, bias and threshold are sums over its own entries, found and applied
//! latent by latent together with gradient projection, Adam and renormalisation. No dense `[N, n]` matrix
//! and no dense gradient is ever built.
//!
//! The maths is that of [`shared::loss`], which judges it. Every sum has a fixed order (rows ascending
//! within a latent, latents ascending within a row, blocks in order), so the result has the same bits for
//! any number of threads.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use shared::Rows;
use shared::loss::{Losses, Sparsity};

use super::adam::Adam;
use super::encode::{Block, block_size, encode};
use super::params::{Moments, Params};
use super::simd::{add_scaled, dot, vectorised};

/// What a step needs to know besides the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Learning rate of weights and biases.
    pub lr: f64,
    /// Learning rate of the threshold parameter.
    pub threshold_lr: f64,
    /// Width ε of the straight-through window.
    pub bandwidth: f64,
    /// The sparsity term.
    pub sparsity: Sparsity,
}

/// A forward pass over a batch, waiting to be used or dropped.
#[derive(Debug)]
pub struct Forward {
    n_rows: usize,
    /// What the encoder read, `[N, d_in]`.
    input: Vec<f32>,
    thetas: Vec<f32>,
    blocks: Vec<Block>,
    /// `x̂ − x`, `[N, d_in]`.
    residual: Vec<f32>,
    losses: Losses,
    n_active: usize,
}

impl Forward {
    /// The losses of the batch.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.losses
    }

    /// Active (row, latent) pairs.
    #[must_use]
    pub fn n_active(&self) -> usize {
        self.n_active
    }

    /// `x̂ − x`, `[N, d_in]`.
    #[must_use]
    pub fn residual(&self) -> &[f32] {
        &self.residual
    }

    /// The latents that fired in this batch, ascending.
    pub fn fired(&self) -> impl Iterator<Item = u32> {
        let size = block_size(self.n_rows);
        let latents =
            self.blocks.iter().enumerate().flat_map(move |(k, block)| {
                (0..block.n_latents()).map(move |i| (k * size + i, block.latent(i)))
            });
        latents
            .filter(|&(i, entries)| entries.iter().any(|e| e.z > self.thetas[i]))
            .filter_map(|(i, _)| u32::try_from(i).ok())
    }
}

/// Parameters, moments and the number of steps taken: all a step changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Trainer {
    /// The parameters.
    pub params: Params,
    /// Second moments.
    pub moments: Moments,
    /// Steps taken.
    pub step: u64,
}

impl Trainer {
    /// Starts at step 0.
    #[must_use]
    pub fn new(params: Params) -> Self {
        let moments = Moments::new(params.n_latents(), params.d_in);
        Self { params, moments, step: 0 }
    }

    /// Forward pass over normalised rows `x [N, d_in]`; changes nothing.
    ///
    /// # Errors
    /// If rows are not `d_in` wide or there are none.
    pub fn forward(&self, x: Rows<'_>, settings: &Settings) -> Result<Forward> {
        let params = &self.params;
        x.expect_width("x", params.d_in)?;
        ensure!(x.n_rows() > 0, "a training step needs at least one row");
        let mut input = x.data().to_vec();
        if params.pre_bias {
            input.par_chunks_mut(params.d_in).for_each(|row| add_scaled(row, -1.0, &params.b_dec));
        }
        let thetas = params.thetas();
        let blocks = encode(params, &thetas, half(settings.bandwidth), &input)?;
        let (residual, squared_errors, n_active) = decode(params, &thetas, &blocks, x);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (n, active) = (x.n_rows() as f64, n_active as f64);
        let l0 = active / n;
        let mse = squared_errors.iter().sum::<f64>() / n;
        let losses = Losses { mse, sparsity: settings.sparsity.value(l0), l0 };
        Ok(Forward { n_rows: x.n_rows(), input, thetas, blocks, residual, losses, n_active })
    }

    /// Backward pass and update: the step is taken.
    pub fn update(&mut self, forward: &Forward, settings: &Settings) {
        self.step += 1;
        let d = self.params.d_in;
        let mut g_b_dec = vec![0.0f32; d];
        let scale = row_scale(forward.n_rows);
        vectorised(|| forward.residual.chunks_exact(d).for_each(|r| add_scaled(&mut g_b_dec, scale, r)));
        // Through the pre-bias, b_dec also feels every encoder row that was used.
        for through_encoder in self.update_latents(forward, settings) {
            if self.params.pre_bias {
                add_scaled(&mut g_b_dec, -1.0, &through_encoder);
            }
        }
        let adam = Adam::new(settings.lr, self.step, self.step - 1);
        adam.update(&mut self.params.b_dec, &mut self.moments.b_dec, &g_b_dec);
    }

    /// Updates every latent with entries; returns per block `Σ_i (Σ_n G_Z) w_i` over its latents.
    fn update_latents(&mut self, forward: &Forward, settings: &Settings) -> Vec<Vec<f32>> {
        let (d, size) = (self.params.d_in, block_size(forward.n_rows));
        let context = Context::new(self, forward, settings);
        let (p, m) = (&mut self.params, &mut self.moments);
        let weights = p.w_enc.par_chunks_mut(size * d).zip(p.w_dec.par_chunks_mut(size * d));
        let weight_moments = m.w_enc.par_chunks_mut(size * d).zip(m.w_dec.par_chunks_mut(size * d));
        let scalars = p.b_enc.par_chunks_mut(size).zip(p.threshold.par_chunks_mut(size));
        let scalar_moments = m.b_enc.par_chunks_mut(size).zip(m.threshold.par_chunks_mut(size));
        let steps = m.weights_step.par_chunks_mut(size).zip(m.threshold_step.par_chunks_mut(size));
        let entries = forward.blocks.par_iter().zip(forward.thetas.par_chunks(size));
        (weights, weight_moments, scalars, scalar_moments, steps, entries)
            .into_par_iter()
            .map(|(weights, weight_moments, scalars, scalar_moments, steps, (block, thetas))| {
                let mut scratch = Scratch::new(d);
                vectorised(|| {
                    for (i, &theta) in thetas.iter().enumerate() {
                        let row = i * d..(i + 1) * d;
                        let mut latent = Latent {
                            encoder: &mut weights.0[row.clone()],
                            direction: &mut weights.1[row.clone()],
                            encoder_moments: &mut weight_moments.0[row.clone()],
                            direction_moments: &mut weight_moments.1[row],
                            bias: (&mut scalars.0[i], &mut scalar_moments.0[i]),
                            threshold: (&mut scalars.1[i], &mut scalar_moments.1[i]),
                            steps: (&mut steps.0[i], &mut steps.1[i]),
                            theta,
                        };
                        context.update(&mut latent, block.latent(i), &mut scratch);
                    }
                });
                scratch.through_encoder
            })
            .collect()
    }
}

/// What updating a latent reads.
struct Context<'a> {
    forward: &'a Forward,
    d: usize,
    step: u64,
    lr: f64,
    threshold_lr: f64,
    bandwidth: f32,
    /// λ/N, of the effective λ.
    lambda_per_row: f32,
    log_threshold: bool,
}

/// The parameters and moments of one latent.
struct Latent<'a> {
    encoder: &'a mut [f32],
    direction: &'a mut [f32],
    encoder_moments: &'a mut [f32],
    direction_moments: &'a mut [f32],
    /// Value and moment.
    bias: (&'a mut f32, &'a mut f32),
    /// Parameter and moment.
    threshold: (&'a mut f32, &'a mut f32),
    /// Steps that last changed weights and threshold.
    steps: (&'a mut u64, &'a mut u64),
    theta: f32,
}

/// Gradients of one latent at a time, and the block's share of the gradient of `b_dec`.
struct Scratch {
    g_encoder: Vec<f32>,
    g_direction: Vec<f32>,
    through_encoder: Vec<f32>,
}

impl Scratch {
    fn new(d: usize) -> Self {
        Self { g_encoder: vec![0.0; d], g_direction: vec![0.0; d], through_encoder: vec![0.0; d] }
    }
}

impl<'a> Context<'a> {
    #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
    fn new(trainer: &Trainer, forward: &'a Forward, settings: &Settings) -> Self {
        let lambda = settings.sparsity.effective_lambda(forward.losses.l0);
        Self {
            forward,
            d: trainer.params.d_in,
            step: trainer.step,
            lr: settings.lr,
            threshold_lr: settings.threshold_lr,
            bandwidth: settings.bandwidth as f32,
            lambda_per_row: (lambda * 0.5) as f32 * row_scale(forward.n_rows),
            log_threshold: trainer.params.parametrisation == shared::loss::Parametrisation::Log,
        }
    }

    #[inline(always)]
    fn update(&self, latent: &mut Latent<'_>, entries: &[super::encode::Entry], scratch: &mut Scratch) {
        if entries.is_empty() {
            return;
        }
        scratch.g_encoder.fill(0.0);
        scratch.g_direction.fill(0.0);
        let (scale, theta, half_window) =
            (row_scale(self.forward.n_rows), latent.theta, self.bandwidth / 2.0);
        let (mut g_bias, mut g_theta) = (0.0f32, 0.0f32);
        let (mut active, mut in_window) = (false, false);
        for entry in entries {
            let row = entry.row as usize * self.d..(entry.row as usize + 1) * self.d;
            let residual = &self.forward.residual[row.clone()];
            let g_f = scale * dot(residual, latent.direction);
            if entry.z > theta {
                active = true;
                add_scaled(&mut scratch.g_direction, entry.z * scale, residual);
                add_scaled(&mut scratch.g_encoder, g_f, &self.forward.input[row]);
                g_bias += g_f;
            }
            if (entry.z - theta).abs() < half_window {
                in_window = true;
                g_theta -= (theta * g_f + self.lambda_per_row) / self.bandwidth;
            }
        }
        if in_window {
            let g = if self.log_threshold { theta * g_theta } else { g_theta };
            let adam = Adam::new(self.threshold_lr, self.step, *latent.steps.1);
            adam.update_one(latent.threshold.0, latent.threshold.1, g);
            *latent.steps.1 = self.step;
        }
        if active {
            add_scaled(&mut scratch.through_encoder, g_bias, latent.encoder);
            let along = dot(&scratch.g_direction, latent.direction);
            add_scaled(&mut scratch.g_direction, -along, latent.direction);
            let adam = Adam::new(self.lr, self.step, *latent.steps.0);
            adam.update(latent.direction, latent.direction_moments, &scratch.g_direction);
            adam.update(latent.encoder, latent.encoder_moments, &scratch.g_encoder);
            adam.update_one(latent.bias.0, latent.bias.1, g_bias);
            normalise(latent.direction);
            *latent.steps.0 = self.step;
        }
    }
}

/// Residuals `x̂ − x [N, d_in]`, squared error of each row, and the number of active entries.
fn decode(params: &Params, thetas: &[f32], blocks: &[Block], x: Rows<'_>) -> (Vec<f32>, Vec<f64>, usize) {
    let (d, size) = (params.d_in, block_size(x.n_rows()));
    let mut offsets = vec![0usize; x.n_rows() + 1];
    let active = || {
        blocks.iter().enumerate().flat_map(move |(k, block)| {
            (0..block.n_latents()).flat_map(move |i| {
                let latent = k * size + i;
                let keep = move |e: &&super::encode::Entry| e.z > thetas[latent];
                block.latent(i).iter().filter(keep).map(move |e| (e.row as usize, latent, e.z))
            })
        })
    };
    active().for_each(|(row, ..)| offsets[row + 1] += 1);
    for row in 0..x.n_rows() {
        offsets[row + 1] += offsets[row];
    }
    let n_active = offsets[x.n_rows()];
    let (mut next, mut codes) = (offsets.clone(), vec![(0usize, 0.0f32); n_active]);
    for (row, latent, z) in active() {
        codes[next[row]] = (latent, z);
        next[row] += 1;
    }
    let mut residual = vec![0.0f32; x.data().len()];
    let squared_errors = residual
        .par_chunks_mut(d)
        .enumerate()
        .map(|(n, residual)| {
            vectorised(|| {
                residual.copy_from_slice(&params.b_dec);
                for &(latent, f) in &codes[offsets[n]..offsets[n + 1]] {
                    add_scaled(residual, f, &params.w_dec[latent * d..(latent + 1) * d]);
                }
                add_scaled(residual, -1.0, x.row(n));
                f64::from(dot(residual, residual))
            })
        })
        .collect();
    (residual, squared_errors, n_active)
}

#[inline(always)]
fn normalise(direction: &mut [f32]) {
    let norm = dot(direction, direction).sqrt();
    if norm > 0.0 {
        direction.iter_mut().for_each(|v| *v /= norm);
    }
}

/// 2/N, the factor of the residual in the gradient of the mean squared error.
fn row_scale(n_rows: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "batches have fewer than 2^24 rows")]
    let n = n_rows as f32;
    2.0 / n
}

fn half(bandwidth: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
    let bandwidth = bandwidth as f32;
    bandwidth / 2.0
}
