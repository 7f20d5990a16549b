//! The dense part of a step: the encoder product, tile by tile, and what of it is kept.
//!
//! A tile's pre-activations stay in the second-level cache and are thinned out at once: to those above a cut of their latent,
//! or to the largest of their row. The dense `[N, n]` matrix never exists. It is the batch that is packed for the product,
//! once a step, and not the weights, which are larger and change: a tile has latents as its rows, and a latent's cut and bias
//! meet vectors of rows of the batch. Tiles have fixed sizes, so that results do not depend on the number of threads.

use std::time::Instant;

use anyhow::Result;
use rayon::prelude::*;

use shared::config::train::EncoderPrecision;

use super::params::Params;
use super::sieve::{Scratch, Sieve, sift};
use super::simd::{any_above, any_exceeds, vectorised};
use crate::cpu::gemm::{Matrix, product};
use crate::cpu::packed::PackedMatrix;
use crate::cpu::simd::{Format, Kernel, WIDTH};

/// Packed panels of a tile.
const TILE_PANELS: usize = 4;
/// Rows of the batch in a tile: at width 576 the packed rows take 432 KiB of the second-level cache.
const TILE_ROWS: usize = TILE_PANELS * WIDTH;
/// Latents of a tile: at width 576 another 144 KiB.
pub(super) const TILE_LATENTS: usize = 64;
/// Latents of a task that looks for values above a cut: short enough that many threads find work in one batch.
const TASK_LATENTS: usize = 1024;
/// Latents of a task that looks for the largest values of a row: the longer, the fewer are kept on the way.
const TASK_LATENTS_LARGEST: usize = 4096;
/// Values compared at a time before they are looked at one by one.
pub(super) const CHUNK: usize = 32;

/// A pre-activation that was kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) latent: u32,
    pub(crate) z: f32,
}

/// Above which value a pre-activation is kept: a cut for each latent, or for each latent and layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cuts<'a> {
    /// `[n]`, or `[n, L]`.
    values: &'a [f32],
    n_layers: usize,
    /// The layer of each row of the batch, where there are several.
    layers: &'a [u16],
}

impl<'a> Cuts<'a> {
    /// The same for all rows, `[n]`.
    pub(crate) fn of_latents(values: &'a [f32]) -> Self {
        Self { values, n_layers: 1, layers: &[] }
    }

    /// `values [n, n_layers]`, rows being of `layers`.
    pub(crate) fn of_layers(values: &'a [f32], n_layers: usize, layers: &'a [u16]) -> Self {
        Self { values, n_layers, layers }
    }

    /// Those of a latent, layer by layer.
    #[inline(always)]
    fn of(&self, latent: usize) -> &'a [f32] {
        &self.values[latent * self.n_layers..(latent + 1) * self.n_layers]
    }

    /// That of a latent at a row of the batch.
    #[inline(always)]
    pub(super) fn at(&self, latent: usize, row: usize) -> f32 {
        let layer = self.layers.get(row).map_or(0, |&layer| usize::from(layer));
        self.of(latent)[if self.n_layers == 1 { 0 } else { layer }]
    }

    /// What `limit` makes of a latent's cuts, at each of `rows`.
    #[inline(always)]
    pub(super) fn along(
        &self,
        latent: usize,
        rows: &std::ops::Range<usize>,
        limit: impl Fn(f32) -> f32,
        out: &mut Vec<f32>,
    ) {
        out.clear();
        if let [one] = self.of(latent) {
            out.resize(rows.len(), limit(*one));
        } else {
            out.extend(rows.clone().map(|row| limit(self.at(latent, row))));
        }
    }
}

/// Which pre-activations are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Keep<'a> {
    /// Those above their cut.
    Above(Cuts<'a>),
    /// The so many largest positive ones of each row.
    Largest(usize),
}

/// What to keep, and of which latents the largest are kept besides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Selection<'a> {
    pub(crate) keep: Keep<'a>,
    /// Dead latents `[n]`, and how many of them a row keeps.
    pub(crate) dead: Option<(&'a [bool], usize)>,
}

/// What a batch's pre-activations leave.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Encoded {
    /// What was selected.
    pub(crate) kept: Kept,
    /// The largest dead latents.
    pub(crate) dead: Kept,
    pub(crate) effort: Effort,
}

/// What an encoder product took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Effort {
    /// Pre-activations computed once more in f32 after bf16.
    pub again: usize,
    /// How long it took, with what is kept of it.
    pub seconds: f64,
}

/// What was kept of each row, latents ascending.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Kept {
    offsets: Vec<usize>,
    candidates: Vec<Candidate>,
}

impl Kept {
    fn collect(rows: impl Iterator<Item = Vec<Candidate>>) -> Self {
        let mut kept = Self { offsets: vec![0], candidates: Vec::new() };
        for row in rows {
            kept.candidates.extend(row);
            kept.offsets.push(kept.candidates.len());
        }
        kept
    }

    pub(crate) fn row(&self, row: usize) -> &[Candidate] {
        &self.candidates[self.offsets[row]..self.offsets[row + 1]]
    }

    /// The number of candidates before those of `row`.
    pub(crate) fn start(&self, row: usize) -> usize {
        self.offsets[row]
    }

    pub(crate) fn n_rows(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    pub(crate) fn all(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Keeps only what `wanted(number, candidate)` lets through.
    pub(crate) fn retain(&mut self, wanted: impl Fn(usize, &Candidate) -> bool) {
        let rows = self.offsets.windows(2).map(|ends| {
            let numbered = (ends[0]..ends[1]).zip(&self.candidates[ends[0]..ends[1]]);
            numbered.filter(|(at, c)| wanted(*at, c)).map(|(_, c)| *c).collect::<Vec<_>>()
        });
        *self = Self::collect(rows.collect::<Vec<_>>().into_iter());
    }
}

/// The largest values seen so far, latents having come in ascending order; ties go to the lower latent.
#[derive(Debug, Clone)]
pub(super) struct Largest {
    k: usize,
    /// Below or at this, a value is not among them any more.
    bound: f32,
    pub(super) kept: Vec<Candidate>,
}

impl Largest {
    fn new(k: usize) -> Self {
        Self { k, bound: if k == 0 { f32::INFINITY } else { 0.0 }, kept: Vec::new() }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, candidate: Candidate) {
        if candidate.z > self.bound {
            self.kept.push(candidate);
            if self.kept.len() >= 2 * self.k {
                self.shrink();
            }
        }
    }

    fn shrink(&mut self) {
        if self.kept.len() > self.k {
            let order = |a: &Candidate, b: &Candidate| b.z.total_cmp(&a.z).then(a.latent.cmp(&b.latent));
            let (_, last, _) = self.kept.select_nth_unstable_by(self.k - 1, order);
            self.bound = last.z;
            self.kept.truncate(self.k);
        }
    }

    fn finish(mut self) -> Vec<Candidate> {
        self.shrink();
        self.kept.sort_unstable_by_key(|c| c.latent);
        self.kept
    }
}

/// The rows of a tile while its latents go by.
pub(super) struct Tile {
    pub(super) main: Vec<Largest>,
    pub(super) dead: Vec<Largest>,
    pub(super) again: usize,
}

impl Tile {
    pub(super) fn new(selection: Selection<'_>, n_rows: usize) -> Self {
        let k = if let Keep::Largest(k) = selection.keep { k } else { usize::MAX / 2 };
        let k_dead = selection.dead.map_or(0, |(_, k)| k);
        Self { main: vec![Largest::new(k); n_rows], dead: vec![Largest::new(k_dead); n_rows], again: 0 }
    }
}

/// The batch as the encoder product reads it.
pub(super) struct Batch<'a> {
    pub(super) rows: &'a [f32],
    d: usize,
    /// Packed, where this processor has a kernel.
    packed: Option<PackedMatrix>,
}

impl Batch<'_> {
    /// `z = weights · rowsᵀ` without the bias: a line for each latent, over the rows of the batch in `rows`.
    pub(super) fn product(
        &self,
        weights: &[f32],
        rows: std::ops::Range<usize>,
        z: &mut Vec<f32>,
    ) -> Result<()> {
        let (n_latents, n_rows) = (weights.len() / self.d, rows.len());
        z.resize(n_latents * n_rows, 0.0);
        if let Some(packed) = &self.packed {
            packed.some_panels(weights, rows.start / WIDTH..rows.end.div_ceil(WIDTH), z);
            return Ok(());
        }
        let weights = Matrix::new(weights, n_latents, self.d)?;
        let rows = Matrix::new(&self.rows[rows.start * self.d..rows.end * self.d], n_rows, self.d)?;
        Ok(product(z, weights, rows.transposed(), 1.0, false, 1)?)
    }
}

/// What is kept of `z = w_i · x' + b_i` for rows `input [N, d_in]`: the same bits whatever the precision.
pub(crate) fn encode(
    params: &Params,
    input: &[f32],
    selection: Selection<'_>,
    precision: EncoderPrecision,
) -> Result<Encoded> {
    let started = Instant::now();
    let sieve = match precision {
        EncoderPrecision::F32 => None,
        EncoderPrecision::Bf16 => Sieve::new(params, input)?,
    };
    let mut encoded = encode_through(params, input, selection, sieve.as_ref())?;
    encoded.effort.seconds = started.elapsed().as_secs_f64();
    Ok(encoded)
}

/// [`encode`], by a sieve or without.
pub(super) fn encode_through(
    params: &Params,
    input: &[f32],
    selection: Selection<'_>,
    sieve: Option<&Sieve>,
) -> Result<Encoded> {
    let (n, d) = (params.n_latents(), params.d_in);
    let n_rows = input.len() / d;
    let packed =
        Kernel::find(Format::F32).map(|kernel| PackedMatrix::new(kernel, input, n_rows, d)).transpose()?;
    let batch = Batch { rows: input, d, packed };
    let length = match selection.keep {
        Keep::Above(_) => TASK_LATENTS,
        Keep::Largest(_) => TASK_LATENTS_LARGEST,
    };
    // As many bytes of the batch in bf16 are twice the rows, and weights are rounded half as often.
    let tile_rows = if sieve.is_some() { 2 * TILE_ROWS } else { TILE_ROWS };
    let tasks: Vec<(usize, usize)> = (0..n_rows)
        .step_by(tile_rows)
        .flat_map(|row| (0..n).step_by(length).map(move |latent| (row, latent)))
        .collect();
    let done: Vec<Tile> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (row, latent)| {
            let rows = row..(row + tile_rows).min(n_rows);
            let latents = latent..(latent + length).min(n);
            match sieve {
                Some(sieve) => sift(params, &batch, sieve, rows, latents, selection, scratch),
                None => task(params, &batch, rows, latents, selection, &mut scratch.z),
            }
        })
        .collect::<Result<_>>()?;
    let effort = Effort { again: done.iter().map(|tile| tile.again).sum(), seconds: 0.0 };
    let per_tile = n.div_ceil(length).max(1);
    let merged: Vec<Vec<(Vec<Candidate>, Vec<Candidate>)>> =
        done.into_par_iter().chunks(per_tile).map(|parts| merge(parts, selection)).collect();
    let (main, dead): (Vec<_>, Vec<_>) = merged.into_iter().flatten().unzip();
    Ok(Encoded { kept: Kept::collect(main.into_iter()), dead: Kept::collect(dead.into_iter()), effort })
}

/// The rows of a tile against some latents, in f32.
pub(super) fn task(
    params: &Params,
    batch: &Batch<'_>,
    rows: std::ops::Range<usize>,
    latents: std::ops::Range<usize>,
    selection: Selection<'_>,
    z: &mut Vec<f32>,
) -> Result<Tile> {
    let d = params.d_in;
    let mut tile = Tile::new(selection, rows.len());
    let mut bounds: Vec<f32> = tile.main.iter().map(|row| row.bound).collect();
    for first in latents.clone().step_by(TILE_LATENTS) {
        let block = first..(first + TILE_LATENTS).min(latents.end);
        batch.product(&params.tensors.w_enc[first * d..block.end * d], rows.clone(), z)?;
        vectorised(|| {
            for (latent, z) in block.zip(z.chunks_exact_mut(rows.len())) {
                let bias = params.tensors.b_enc[latent];
                z.iter_mut().for_each(|z| *z += bias);
                thin_out(z, (latent, rows.start), selection, &mut tile, &mut bounds);
            }
        });
    }
    Ok(tile)
}

/// What of the exact `z` of some latents is above their cuts; without dead ones.
pub(super) fn keep_exact(
    params: &Params,
    latents: std::ops::Range<usize>,
    first_row: usize,
    z: &mut [f32],
    selection: Selection<'_>,
    tile: &mut Tile,
) {
    let (n_rows, selection) = (tile.main.len(), Selection { dead: None, ..selection });
    vectorised(|| {
        for (latent, z) in latents.zip(z.chunks_exact_mut(n_rows)) {
            let bias = params.tensors.b_enc[latent];
            z.iter_mut().for_each(|z| *z += bias);
            thin_out(z, (latent, first_row), selection, tile, &mut vec![0.0; n_rows]);
        }
    });
}

/// One latent's pre-activations over the rows of a tile, which begins at `first_row`; `bounds` are those of the rows' largest.
#[inline(always)]
fn thin_out(
    z: &[f32],
    (latent, first_row): (usize, usize),
    selection: Selection<'_>,
    tile: &mut Tile,
    bounds: &mut [f32],
) {
    #[expect(clippy::cast_possible_truncation, reason = "widths are below 2^32")]
    let candidate = |z: f32| Candidate { latent: latent as u32, z };
    let chunks = z.chunks(CHUNK).zip(tile.main.chunks_mut(CHUNK)).zip(bounds.chunks_mut(CHUNK));
    let lowest = match selection.keep {
        Keep::Above(cuts) => cuts.of(latent).iter().copied().fold(f32::INFINITY, f32::min),
        Keep::Largest(_) => 0.0,
    };
    for (number, ((values, rows), bounds)) in chunks.enumerate() {
        match selection.keep {
            Keep::Above(cuts) => {
                if any_above(values, lowest) {
                    for (row, (tile, &z)) in (first_row + number * CHUNK..).zip(rows.iter_mut().zip(values)) {
                        if z > cuts.at(latent, row) {
                            tile.kept.push(candidate(z));
                        }
                    }
                }
            }
            Keep::Largest(_) => {
                if any_exceeds(values, bounds) {
                    for ((row, &z), bound) in rows.iter_mut().zip(values).zip(bounds) {
                        row.push(candidate(z));
                        *bound = row.bound;
                    }
                }
            }
        }
    }
    if selection.dead.is_some_and(|(mask, _)| mask[latent]) {
        tile.dead.iter_mut().zip(z).for_each(|(row, &z)| row.push(candidate(z)));
    }
}

/// Puts the parts of a tile, latents ascending, together.
fn merge(parts: Vec<Tile>, selection: Selection<'_>) -> Vec<(Vec<Candidate>, Vec<Candidate>)> {
    let mut parts = parts.into_iter();
    let Some(mut whole) = parts.next() else { return Vec::new() };
    for part in parts {
        let pairs = whole.main.iter_mut().chain(&mut whole.dead).zip(part.main.into_iter().chain(part.dead));
        for (into, from) in pairs {
            let mut kept = from.kept;
            // Candidates were pushed by ascending latent only until the first thinning.
            kept.sort_unstable_by_key(|c| c.latent);
            into.kept.extend(kept);
        }
    }
    let main = whole.main.into_iter().map(|row| match selection.keep {
        Keep::Above(_) => row.kept,
        Keep::Largest(_) => row.finish(),
    });
    main.zip(whole.dead.into_iter().map(Largest::finish)).collect()
}
