//! The forward half of a step: what is active, what it decodes to, the loss; all in f32, sparse after the encoder product.
//!
//! Every part of the objective that decodes something leaves a *channel*: the residual its gradient comes from, for every row.
//! Nested prefixes need no more than one channel each: latent `i` belongs to every prefix that reaches it, so its gradient
//! comes from the weighted sum of those residuals, and latents of one stretch share that sum.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use shared::Rows;
use shared::config::train::EncoderPrecision;
use shared::loss::{AuxForm, Examples, Levels, Losses, Objective};

use super::encode::{Candidate, Cuts, Effort, Encoded, Keep, Kept, Selection, encode};
use super::losses::losses;
use super::params::{Latents, Params};
use super::simd::{add_scaled, dot, vectorised};
use crate::cpu::gemm::{Matrix, product};

/// A share of the last smallest value chosen above which a batch looks for its largest values first.
const SEARCH_FROM: f32 = 0.5;

/// A forward pass over a batch, waiting to be used or dropped.
#[derive(Debug)]
pub struct Forward {
    pub(super) n_rows: usize,
    /// What the encoder read, `[N, d_in]`.
    pub(super) input: Vec<f32>,
    /// What the skip connection read, `[N, d_in]`; empty without one.
    pub(super) x: Vec<f32>,
    /// `[n, n_layers]`.
    pub(super) thetas: Vec<f32>,
    /// Layers with thresholds of their own; 1 where all share them.
    pub(super) n_layers: usize,
    /// The layer of each row, where they have.
    pub(super) layers: Vec<u16>,
    /// Rows of each layer `[n_layers]`.
    pub(super) layer_rows: Vec<f32>,
    /// Mean L0.
    pub(super) levels: Levels,
    /// Active latents, those in a straight-through window, those that multi-TopK adds.
    pub(super) kept: Kept,
    /// With multi-TopK, which of `kept` are among the k of the latent function.
    pub(super) chosen: Vec<bool>,
    /// The largest dead latents of each row.
    pub(super) dead: Kept,
    pub(super) channels: Channels,
    /// Variance of what the dictionary leaves, which AuxK is measured by.
    pub(super) left_variance: f64,
    /// The smallest value that BatchTopK chose.
    pub(super) smallest: Option<f32>,
    effort: Effort,
    losses: Losses,
    n_active: usize,
}

/// The residuals of all decoding terms, row by row.
#[derive(Debug)]
pub(super) struct Channels {
    width: usize,
    count: usize,
    values: Vec<f32>,
    /// Where each stretch of latents ends.
    stretches: Vec<usize>,
    pub(super) multi: Option<usize>,
    pub(super) gate: Option<usize>,
    pub(super) aux: Option<usize>,
    /// The residual of the whole dictionary.
    whole: usize,
    /// Whether what latents learn from is something else.
    apart: bool,
}

impl Channels {
    fn new(params: &Params, objective: &Objective, n_rows: usize) -> Self {
        let mut stretches: Vec<usize> = objective.prefixes.iter().map(|p| p.n_latents).collect();
        if stretches.is_empty() {
            stretches.push(params.n_latents());
        }
        let mut count = stretches.len();
        let mut next = |wanted: bool| {
            wanted.then(|| {
                count += 1;
                count - 1
            })
        };
        let multi = next(objective.multi.is_some());
        let gate = next(params.latents == Latents::Gated);
        let aux = next(objective.aux_k.is_some());
        let pushed = objective.aux_k.as_ref().is_some_and(|aux| aux.form == AuxForm::Mlsae);
        let apart = !objective.prefixes.is_empty() || !objective.examples.weights.is_empty() || pushed;
        let whole = next(apart).unwrap_or(0);
        let width = params.d_out;
        let values = vec![0.0; n_rows * count * width];
        Self { width, count, values, stretches, multi, gate, aux, whole, apart }
    }

    /// Adds `pushed` to what every latent learns from row `row`.
    pub(super) fn add_to_all(&mut self, row: usize, pushed: &[f32]) {
        let start = row * self.count * self.width;
        let learned = &mut self.values[start..start + self.stretches.len() * self.width];
        learned.chunks_exact_mut(self.width).for_each(|channel| add_scaled(channel, 1.0, pushed));
    }

    /// The residual of row `row` in channel `channel`.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, channel: usize) -> &[f32] {
        let start = (row * self.count + channel) * self.width;
        &self.values[start..start + self.width]
    }

    /// The channel that latent `latent` learns from.
    pub(super) fn of_latent(&self, latent: usize) -> usize {
        self.stretches.partition_point(|&end| end <= latent).min(self.stretches.len() - 1)
    }
}

/// Squared residuals of a row, summed over the batch in order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Errors {
    pub(super) whole: f64,
    pub(super) prefixes: f64,
    pub(super) multi: f64,
    pub(super) gate: f64,
    pub(super) aux: f64,
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

    /// What the encoder product took.
    #[must_use]
    pub fn effort(&self) -> Effort {
        self.effort
    }

    /// `x̂ − y` of row `row`.
    #[must_use]
    pub fn residual(&self, row: usize) -> &[f32] {
        self.channels.row(row, self.channels.whole)
    }

    /// The active latents of row `row` with their values, ascending.
    pub fn active<'a>(&'a self, params: &'a Params, row: usize) -> impl Iterator<Item = (u32, f32)> + 'a {
        let (start, candidates) = (self.kept.start(row), self.kept.row(row));
        candidates.iter().enumerate().filter_map(move |(i, candidate)| {
            let value = self.value(params, row, start + i, candidate);
            (value > 0.0).then_some((candidate.latent, value))
        })
    }

    /// The latents that fired in this batch, ascending.
    #[must_use]
    pub fn fired(&self, params: &Params) -> Vec<u32> {
        let mut fired = vec![false; params.n_latents()];
        for row in 0..self.n_rows {
            self.active(params, row).for_each(|(latent, _)| fired[latent as usize] = true);
        }
        (0u32..).zip(fired).filter_map(|(latent, fired)| fired.then_some(latent)).collect()
    }

    /// `mean_n Σ_i v_i^p` over what a norm penalty counts.
    #[must_use]
    pub fn mean_power(&self, params: &Params, p: f64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = self.n_rows as f64;
        let all = self.candidates();
        let values = all.map(|(row, at, candidate)| f64::from(self.penalised(params, row, at, candidate)));
        values.filter(|v| *v > 0.0).map(|v| v.powf(p)).sum::<f64>() / n
    }

    /// The activation of candidate number `at`, which is of `row`.
    #[inline(always)]
    pub(super) fn value(&self, params: &Params, row: usize, at: usize, candidate: &Candidate) -> f32 {
        if self.chosen.get(at) == Some(&false) {
            return 0.0;
        }
        value(params, self.theta(candidate.latent as usize, row), candidate)
    }

    /// What a norm penalty counts of candidate number `at`, which is of `row`.
    pub(super) fn penalised(&self, params: &Params, row: usize, at: usize, candidate: &Candidate) -> f32 {
        if params.latents == Latents::Gated { candidate.z } else { self.value(params, row, at, candidate) }
    }

    /// Everything that was kept: row, number, candidate.
    pub(super) fn candidates(&self) -> impl Iterator<Item = (usize, usize, &Candidate)> {
        let rows = 0..self.kept.n_rows();
        rows.flat_map(|row| {
            let numbered = (self.kept.start(row)..).zip(self.kept.row(row));
            numbered.map(move |(at, candidate)| (row, at, candidate))
        })
    }

    /// Which of a latent's thresholds are those of `row`.
    #[inline(always)]
    pub(super) fn layer(&self, row: usize) -> usize {
        self.layers.get(row).map_or(0, |&layer| usize::from(layer))
    }

    /// θ of `latent` at `row`.
    #[inline(always)]
    pub(super) fn theta(&self, latent: usize, row: usize) -> f32 {
        self.thetas[latent * self.n_layers + self.layer(row)]
    }
}

/// The activation of a pre-activation that was kept.
#[inline(always)]
fn value(params: &Params, theta: f32, &Candidate { latent, z }: &Candidate) -> f32 {
    match params.latents {
        Latents::Relu | Latents::TopK { .. } | Latents::BatchTopK { .. } => z,
        Latents::JumpRelu { .. } if z > theta => z,
        Latents::JumpRelu { .. } => 0.0,
        Latents::Gated => magnitude(params, latent as usize, z).1.max(0.0),
    }
}

/// `exp(r_mag) (z − b_enc)` and `π_mag`.
#[inline(always)]
pub(super) fn magnitude(params: &Params, latent: usize, z: f32) -> (f32, f32) {
    let t = &params.tensors;
    let scaled = t.own[0][latent].exp() * (z - t.b_enc[latent]);
    (scaled, scaled + t.own[1][latent])
}

/// Forward pass over normalised rows `x [N, d_in]` with targets `y [N, d_out]`; changes nothing.
///
/// # Errors
/// If rows do not have the right widths or there are none.
pub(super) fn forward(
    params: &Params,
    x: Rows<'_>,
    y: Rows<'_>,
    objective: &Objective,
    precision: EncoderPrecision,
) -> Result<Forward> {
    x.expect_width("x", params.d_in)?;
    y.expect_width("y", params.d_out)?;
    let n_rows = x.n_rows();
    ensure!(
        n_rows > 0 && y.n_rows() == n_rows,
        "a training step needs as many targets as rows, and at least one"
    );
    let n_layers = params.n_layers();
    objective.examples.check(n_rows, n_layers)?;
    let layers = if n_layers > 1 { objective.examples.layers.clone() } else { Vec::new() };
    ensure!(n_layers == 1 || layers.len() == n_rows, "thresholds of {n_layers} layers, and rows of none");
    let mut input = x.data().to_vec();
    if params.pre_bias {
        let b_dec = &params.tensors.b_dec;
        input.par_chunks_mut(params.d_in).for_each(|row| add_scaled(row, -1.0, b_dec));
    }
    let thetas = params.thetas();
    let selected = select(params, (&thetas, &layers), &input, objective, precision)?;
    let skip = if params.tensors.w_skip.is_empty() { Vec::new() } else { x.data().to_vec() };
    let mut forward = Forward {
        n_rows,
        input,
        x: skip,
        thetas,
        n_layers,
        layer_rows: layer_rows(&layers, n_layers, n_rows),
        layers,
        levels: objective.levels(std::iter::empty()),
        kept: selected.kept,
        chosen: selected.chosen,
        dead: selected.dead,
        channels: Channels::new(params, objective, n_rows),
        left_variance: 0.0,
        smallest: selected.smallest,
        effort: selected.effort,
        losses: Losses { mse: 0.0, reconstruction: 0.0, sparsity: 0.0, auxiliary: 0.0, l0: 0.0 },
        n_active: 0,
    };
    let errors = decode(params, &mut forward, y, objective)?;
    let active: Vec<usize> = (0..n_rows).map(|row| forward.active(params, row).count()).collect();
    forward.n_active = active.iter().sum();
    forward.levels = objective.levels(active.into_iter());
    forward.losses = losses(params, &mut forward, errors, objective);
    Ok(forward)
}

/// How many rows each layer has.
#[expect(clippy::cast_precision_loss, reason = "batches have fewer than 2^24 rows")]
fn layer_rows(layers: &[u16], n_layers: usize, n_rows: usize) -> Vec<f32> {
    if n_layers == 1 {
        return vec![n_rows as f32];
    }
    let count = |layer: usize| layers.iter().filter(|&&other| usize::from(other) == layer).count();
    (0..n_layers).map(|layer| count(layer) as f32).collect()
}

/// What the latent function and the objective look at.
struct Selected {
    kept: Kept,
    chosen: Vec<bool>,
    dead: Kept,
    smallest: Option<f32>,
    effort: Effort,
}

fn select(
    params: &Params,
    (thetas, layers): (&[f32], &[u16]),
    input: &[f32],
    objective: &Objective,
    precision: EncoderPrecision,
) -> Result<Selected> {
    let n_rows = input.len() / params.d_in;
    let dead = objective.aux_k.as_ref().map(|aux| (&aux.dead[..], aux.k));
    let run = |keep: Keep<'_>| encode(params, input, Selection { keep, dead }, precision);
    let above = |cut: f32| run(Keep::Above(Cuts::of_latents(&vec![cut; params.n_latents()])));
    let plain =
        |Encoded { kept, dead, effort }| Selected { kept, chosen: Vec::new(), dead, smallest: None, effort };
    match params.latents {
        Latents::Relu | Latents::Gated => above(0.0).map(plain),
        Latents::JumpRelu { bandwidth, .. } => {
            let cuts: Vec<f32> = thetas.iter().map(|theta| theta - bandwidth / 2.0).collect();
            run(Keep::Above(Cuts::of_layers(&cuts, params.n_layers(), layers))).map(plain)
        }
        Latents::TopK { k } => {
            let widest = objective.multi.map_or(k, |multi| multi.k.max(k));
            let mut selected = plain(run(Keep::Largest(widest))?);
            if widest > k {
                selected.chosen = largest_of_rows(&selected.kept, k);
            }
            Ok(selected)
        }
        Latents::BatchTopK { k, threshold } => {
            let wanted = k * n_rows;
            let cut = SEARCH_FROM * threshold;
            let mut found = above(cut)?;
            if found.kept.all().len() < wanted && cut > 0.0 {
                found = above(0.0)?;
            }
            let mut selected = plain(found);
            selected.smallest = keep_largest(&mut selected.kept, wanted);
            Ok(selected)
        }
    }
}

/// Marks the `k` largest of every row.
fn largest_of_rows(kept: &Kept, k: usize) -> Vec<bool> {
    let mut chosen = vec![false; kept.all().len()];
    for row in 0..kept.n_rows() {
        let (start, candidates) = (kept.start(row), kept.row(row));
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by(|&a, &b| candidates[b].z.total_cmp(&candidates[a].z).then(a.cmp(&b)));
        order.iter().take(k).for_each(|&i| chosen[start + i] = true);
    }
    chosen
}

/// Keeps the `wanted` largest of all rows, ties going to earlier ones; returns the smallest kept.
fn keep_largest(kept: &mut Kept, wanted: usize) -> Option<f32> {
    let mut order: Vec<(f32, usize)> = kept.all().iter().map(|c| c.z).zip(0..).collect();
    if wanted == 0 || order.len() <= wanted {
        return kept.all().iter().map(|c| c.z).min_by(f32::total_cmp);
    }
    let compare = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let (_, &mut (smallest, last), _) = order.select_nth_unstable_by(wanted - 1, compare);
    kept.retain(|at, c| c.z > smallest || (c.z == smallest && at <= last));
    Some(smallest)
}

/// Fills the channels; returns the squared errors of the batch.
fn decode(params: &Params, forward: &mut Forward, y: Rows<'_>, objective: &Objective) -> Result<Errors> {
    let (d, t) = (params.d_out, &params.tensors);
    let mut base: Vec<f32> = vec![0.0; y.data().len()];
    if !t.w_skip.is_empty() {
        let rows = Matrix::new(&forward.x, forward.n_rows, params.d_in)?;
        let skip = Matrix::new(&t.w_skip, d, params.d_in)?.transposed();
        product(&mut base, rows, skip, 1.0, false, rayon::current_num_threads())?;
    }
    let mut channels = std::mem::take(&mut forward.channels.values);
    let stride = forward.channels.count * d;
    let errors: Vec<Errors> = channels
        .par_chunks_mut(stride)
        .zip(base.par_chunks_mut(d))
        .enumerate()
        .map(|(row, (channels, base))| {
            vectorised(|| {
                add_scaled(base, 1.0, &t.b_dec);
                add_scaled(base, -1.0, y.row(row));
                decode_row(params, forward, objective, row, (base, channels))
            })
        })
        .collect();
    forward.channels.values = channels;
    Ok(errors.into_iter().fold(Errors::default(), |sum, row| Errors {
        whole: sum.whole + row.whole,
        prefixes: sum.prefixes + row.prefixes,
        multi: sum.multi + row.multi,
        gate: sum.gate + row.gate,
        aux: sum.aux + row.aux,
    }))
}

#[inline(always)]
fn decode_row(
    params: &Params,
    forward: &Forward,
    objective: &Objective,
    row: usize,
    (base, channels): (&[f32], &mut [f32]),
) -> Errors {
    let (d, layout) = (params.d_out, &forward.channels);
    let direction = |latent: u32| &params.tensors.w_dec[latent as usize * d..(latent as usize + 1) * d];
    let (start, candidates) = (forward.kept.start(row), forward.kept.row(row));
    let square = |v: &[f32]| f64::from(dot(v, v));
    let mut errors = Errors::default();
    let row_weight = objective.examples.weight(row);
    let mut running = base.to_vec();
    let mut candidates_left = candidates.iter().enumerate().peekable();
    for (stretch, &end) in layout.stretches.iter().enumerate() {
        while let Some((i, candidate)) = candidates_left.next_if(|(_, c)| (c.latent as usize) < end) {
            let value = forward.value(params, row, start + i, candidate);
            if value > 0.0 {
                add_scaled(&mut running, value, direction(candidate.latent));
            }
        }
        channels[stretch * d..(stretch + 1) * d].copy_from_slice(&running);
        let weight = objective.prefixes.get(stretch).map_or(1.0, |prefix| prefix.weight);
        errors.prefixes += row_weight * weight * square(&running);
    }
    errors.whole = square(&running);
    if layout.apart {
        channels[layout.whole * d..(layout.whole + 1) * d].copy_from_slice(&running);
    }
    if !objective.prefixes.is_empty() {
        sum_from_the_end(channels, objective, d);
    }
    weigh(&mut channels[..layout.stretches.len() * d], &objective.examples, row);
    if let Some(multi) = layout.multi {
        let channel = &mut channels[multi * d..(multi + 1) * d];
        channel.copy_from_slice(base);
        candidates.iter().for_each(|c| add_scaled(channel, c.z, direction(c.latent)));
        errors.multi = row_weight * square(channel);
        weigh(channel, &objective.examples, row);
    }
    if let Some(gate) = layout.gate {
        let channel = &mut channels[gate * d..(gate + 1) * d];
        channel.copy_from_slice(base);
        candidates.iter().for_each(|c| add_scaled(channel, c.z, direction(c.latent)));
        errors.gate = row_weight * square(channel);
        weigh(channel, &objective.examples, row);
    }
    if let Some(aux) = layout.aux {
        let channel = &mut channels[aux * d..(aux + 1) * d];
        channel.copy_from_slice(&running);
        if objective.aux_k.as_ref().is_some_and(|aux| aux.form == AuxForm::Mlsae) {
            #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
            let deviation = objective.examples.deviation(row) as f32;
            channel.iter_mut().zip(&params.tensors.b_dec).for_each(|(c, b)| *c = *c * deviation + b);
        }
        forward.dead.row(row).iter().for_each(|c| add_scaled(channel, c.z, direction(c.latent)));
        errors.aux = square(channel);
    }
    errors
}

/// Multiplies what is learned from `row` by its weight.
#[inline(always)]
fn weigh(channels: &mut [f32], examples: &Examples, row: usize) {
    if !examples.weights.is_empty() {
        #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
        let weight = examples.weight(row) as f32;
        channels.iter_mut().for_each(|v| *v *= weight);
    }
}

/// From the residual of each prefix to what the latents of each stretch learn from: the weighted sum of the residuals of all
/// prefixes that hold them.
#[inline(always)]
fn sum_from_the_end(channels: &mut [f32], objective: &Objective, d: usize) {
    let mut sum = vec![0.0f32; d];
    for (stretch, prefix) in objective.prefixes.iter().enumerate().rev() {
        let channel = &mut channels[stretch * d..(stretch + 1) * d];
        #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
        add_scaled(&mut sum, prefix.weight as f32, channel);
        channel.copy_from_slice(&sum);
    }
}
