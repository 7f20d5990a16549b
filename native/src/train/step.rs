//! One training step on the CPU, sparse wherever sparse wins.
//!
//! Only the encoder product is dense ([`super::encode`]). Everything after it touches active latents and those inside a
//! straight-through window: decoding gathers a row's active directions ([`super::forward`]); the gradients of a latent's
//! direction, encoder row, bias and own parameters are sums over its own entries, found and applied latent by latent
//! together with gradient projection, Adam and renormalisation. No dense `[N, n]` matrix and no dense gradient is ever built.
//!
//! The maths is that of [`shared::loss`], which judges it. Every sum has a fixed order (rows ascending within a latent,
//! latents ascending within a row, tiles in order), so the result has the same bits for any number of threads.

use anyhow::Result;
use rayon::prelude::*;
use shared::Rows;
use shared::config::train::EncoderPrecision;
use shared::loss::{AuxForm, Objective};

use super::adam::{Adam, Betas};
use super::encode::Candidate;
use super::forward::{Forward, forward};
use super::latent::{Batch, Entry, Latent, Part, Scratch};
use super::losses::input_sum;
use super::params::{Latents, Moments, Params};
use super::simd::{add_scaled, vectorised};
use crate::cpu::gemm::{Matrix, product};

/// Where more than one pre-activation in so many was computed again after bf16, f32 alone is quicker.
const DENSE: usize = 25;
/// Steps it is then left at.
const PAUSE: u32 = 50;
/// Latents of a piece of work.
const PIECE: usize = 64;
/// Weight of the newest batch in the running threshold of BatchTopK.
const NEWEST: f32 = 0.01;

/// What a step needs to know besides the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings<'a> {
    /// Learning rate of weights and biases.
    pub lr: f64,
    /// Learning rate of the parameters of the latent function.
    pub own_lr: f64,
    /// The optimiser's constants.
    pub betas: Betas,
    /// The objective.
    pub objective: &'a Objective,
}

/// Parameters, moments and the number of steps taken: all a step changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Trainer {
    /// The parameters.
    pub params: Params,
    /// Adam's moments.
    pub moments: Moments,
    /// Steps taken.
    pub step: u64,
    precision: EncoderPrecision,
    /// Steps for which bf16 is not tried again: too little could be ruled out.
    pause: u32,
}

impl Trainer {
    /// Starts at step 0; `momentum` says whether β₁ is above 0.
    #[must_use]
    pub fn new(params: Params, momentum: bool) -> Self {
        let moments = Moments::new(&params, momentum);
        Self { params, moments, step: 0, precision: EncoderPrecision::F32, pause: 0 }
    }

    /// Goes on after `step` steps.
    #[must_use]
    pub fn resume(params: Params, moments: Moments, step: u64) -> Self {
        Self { params, moments, step, precision: EncoderPrecision::F32, pause: 0 }
    }

    /// How the encoder product is found from now on; changes no bit of the result.
    pub fn set_precision(&mut self, precision: EncoderPrecision) {
        (self.precision, self.pause) = (precision, 0);
    }

    /// Forward pass over normalised rows `x [N, d_in]` with targets `y [N, d_out]`; changes nothing.
    ///
    /// # Errors
    /// If rows do not have the right widths or there are none.
    pub fn forward(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> Result<Forward> {
        let precision = if self.pause > 0 { EncoderPrecision::F32 } else { self.precision };
        forward(&self.params, x, y, objective, precision)
    }

    /// Backward pass and update: the step is taken.
    ///
    /// # Errors
    /// If the forward pass was of other parameters, of other shapes.
    pub fn update(&mut self, forward: &Forward, settings: &Settings<'_>) -> Result<()> {
        self.step += 1;
        let dense = forward.effort().again > forward.n_rows * self.params.n_latents() / DENSE;
        self.pause = if dense { PAUSE } else { self.pause.saturating_sub(1) };
        let batch = Batch::new(&self.params, forward, settings, self.step);
        let mut g_b_dec = vec![0.0f32; self.params.d_out];
        vectorised(|| {
            for row in 0..forward.n_rows {
                add_scaled(&mut g_b_dec, batch.scale, forward.channels.row(row, 0));
                if let Some((channel, scale)) = batch.multi {
                    add_scaled(&mut g_b_dec, scale, forward.channels.row(row, channel));
                }
                // Only the published AuxK of multi-layer SAEs decodes with the bias.
                if let Some((channel, scale)) = batch.aux.filter(|_| batch.aux_has_bias) {
                    add_scaled(&mut g_b_dec, scale, forward.channels.row(row, channel));
                }
            }
        });
        let g_skip = self.skip_gradient(forward, &batch)?;
        // Through the pre-bias, b_dec also feels every encoder row that was used.
        for through_encoder in self.update_latents(forward, &batch) {
            if self.params.pre_bias {
                add_scaled(&mut g_b_dec, -1.0, &through_encoder);
            }
        }
        let adam = Adam::new(settings.betas, settings.lr, self.step, self.step - 1);
        let (t, second, mut first) =
            (&mut self.params.tensors, &mut self.moments.second, self.moments.first.as_mut());
        let b_first = first.as_mut().map_or(&mut [][..], |f| &mut f.b_dec[..]);
        adam.update(&mut t.b_dec, b_first, &mut second.b_dec, &g_b_dec);
        let skip_first = first.as_mut().map_or(&mut [][..], |f| &mut f.w_skip[..]);
        adam.update(&mut t.w_skip, skip_first, &mut second.w_skip, &g_skip);
        if let (Latents::BatchTopK { threshold, .. }, Some(smallest)) =
            (&mut self.params.latents, forward.smallest)
        {
            let before = if *threshold > 0.0 { *threshold } else { smallest };
            *threshold = before + NEWEST * (smallest - before);
        }
        Ok(())
    }

    /// The gradient of the skip connection `[d_out, d_in]`: residuals against inputs. Empty without one.
    fn skip_gradient(&self, forward: &Forward, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let Params { d_in, d_out, .. } = self.params;
        let mut gradient = vec![0.0f32; self.params.tensors.w_skip.len()];
        if gradient.is_empty() {
            return Ok(gradient);
        }
        let mut residuals = Vec::with_capacity(forward.n_rows * d_out);
        for row in 0..forward.n_rows {
            let mut sum: Vec<f32> = forward.channels.row(row, 0).iter().map(|r| batch.scale * r).collect();
            if let Some((channel, scale)) = batch.multi {
                add_scaled(&mut sum, scale, forward.channels.row(row, channel));
            }
            residuals.extend(sum);
        }
        let residuals = Matrix::new(&residuals, forward.n_rows, d_out)?.transposed();
        let inputs = Matrix::new(&forward.x, forward.n_rows, d_in)?;
        product(&mut gradient, residuals, inputs, 1.0, false, rayon::current_num_threads())?;
        Ok(gradient)
    }

    /// Updates every latent with entries, and with momentum every latent; returns per piece `Σ_i (Σ_n G_product) w_i`.
    fn update_latents(&mut self, forward: &Forward, batch: &Batch<'_>) -> Vec<Vec<f32>> {
        let (n, n_layers) = (self.params.n_latents(), self.params.n_layers());
        let (d_in, d_out) = (self.params.d_in, self.params.d_out);
        let entries = ByLatent::new(forward, n);
        let params = self.params.tensors.pieces(PIECE);
        let second = self.moments.second.pieces(PIECE);
        let first: Vec<Option<_>> = match &mut self.moments.first {
            Some(first) => first.pieces(PIECE).map(Some).collect(),
            None => (0..n.div_ceil(PIECE)).map(|_| None).collect(),
        };
        let steps = self.moments.weights_step.chunks_mut(PIECE).zip(self.moments.own_step.chunks_mut(PIECE));
        let pieces: Vec<_> = params.zip(second).zip(first).zip(steps).enumerate().collect();
        pieces
            .into_par_iter()
            .map(|(piece, (((mut params, mut second), mut first), (weights_step, own_step)))| {
                let mut scratch = Scratch::new(d_in, d_out, n_layers);
                vectorised(|| {
                    for i in 0..params.b_enc.len() {
                        let number = piece * PIECE + i;
                        let mut latent = Latent {
                            number,
                            params: params.latent(i, d_in, d_out),
                            first: first.as_mut().map(|first| first.latent(i, d_in, d_out)),
                            second: second.latent(i, d_in, d_out),
                            weights_step: &mut weights_step[i],
                            own_step: &mut own_step[i],
                        };
                        batch.update(&mut latent, entries.of(number), &mut scratch);
                    }
                });
                scratch.through_encoder
            })
            .collect()
    }
}

/// What was kept, latent by latent instead of row by row; rows ascending, AuxK's entries after the others.
struct ByLatent {
    offsets: Vec<usize>,
    entries: Vec<Entry>,
}

impl ByLatent {
    fn new(forward: &Forward, n_latents: usize) -> Self {
        let lists = [&forward.kept, &forward.dead];
        let mut offsets = vec![0usize; n_latents + 1];
        lists.iter().flat_map(|list| list.all()).for_each(|c| offsets[c.latent as usize + 1] += 1);
        for latent in 0..n_latents {
            offsets[latent + 1] += offsets[latent];
        }
        let mut next = offsets.clone();
        let mut entries = vec![Entry::default(); offsets[n_latents]];
        let mut put = |row: usize, &Candidate { latent, z }: &Candidate, part: Part| {
            #[expect(clippy::cast_possible_truncation, reason = "batches have fewer than 2^32 rows")]
            let row = row as u32;
            entries[next[latent as usize]] = Entry { row, z, part };
            next[latent as usize] += 1;
        };
        for row in 0..forward.kept.n_rows() {
            let start = forward.kept.start(row);
            for (i, candidate) in forward.kept.row(row).iter().enumerate() {
                let main = forward.chosen.get(start + i) != Some(&false);
                put(row, candidate, if main { Part::Main } else { Part::Multi });
            }
        }
        for row in 0..forward.dead.n_rows() {
            forward.dead.row(row).iter().for_each(|candidate| put(row, candidate, Part::Aux));
        }
        Self { offsets, entries }
    }

    fn of(&self, latent: usize) -> &[Entry] {
        &self.entries[self.offsets[latent]..self.offsets[latent + 1]]
    }
}

impl<'a> Batch<'a> {
    /// What all latents share in a step.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "the step is computed in f32"
    )]
    fn new(params: &Params, forward: &'a Forward, settings: &Settings<'a>, step: u64) -> Self {
        let (objective, n) = (settings.objective, forward.n_rows as f64);
        let scale = 2.0 / n / objective.normaliser;
        let channels = &forward.channels;
        let aux_weight = objective.aux_k.as_ref().map_or(0.0, |aux| aux.weight);
        let aux_scale =
            if forward.left_variance > 0.0 { 2.0 * aux_weight / n / forward.left_variance } else { 0.0 };
        let multi_weight = objective.multi.map_or(0.0, |multi| multi.weight);
        let bandwidth = match params.latents {
            Latents::JumpRelu { bandwidth, .. } => bandwidth,
            _ => 0.0,
        };
        Self {
            forward,
            d_in: params.d_in,
            latents: params.latents,
            trains_bias: params.encoder_bias,
            aux_has_bias: objective.aux_k.as_ref().is_some_and(|aux| aux.form == AuxForm::Mlsae),
            objective,
            step,
            lr: settings.lr,
            own_lr: settings.own_lr,
            betas: settings.betas,
            bandwidth,
            n_rows: n as f32,
            scale: scale as f32,
            multi: channels.multi.map(|channel| (channel, (scale * multi_weight) as f32)),
            gate: channels.gate.map(|channel| (channel, scale as f32)),
            aux: channels.aux.map(|channel| (channel, aux_scale as f32)),
            lambda_per_row: (0..forward.n_layers)
                .map(|layer| (forward.levels.lambda(&objective.sparsity, layer) / n) as f32)
                .collect(),
            input_sum: match objective.dead_pull {
                Some(_) => input_sum(forward, params.d_in),
                None => Vec::new(),
            },
        }
    }
}
