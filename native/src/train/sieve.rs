//! The encoder product in bf16, as a sieve: what it cannot rule out is computed once more in f32.
//!
//! With x = x̃ + δx and w = w̃ + δw, the tildes rounded to bf16, Cauchy and Schwarz give
//! `|x·w − x̃·w̃| ≤ ‖δx‖‖w‖ + ‖x̃‖‖δw‖`; all four lengths are measured. What sums of f32 add to that is bounded by
//! γ_m ‖x‖‖w‖ with γ_m = m u / (1 − m u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.4). A
//! pre-activation whose bf16 value plus this bound stays below its cut is below it in f32 too. All others are summed again
//! in the order of the f32 kernel, so that what is kept has the bits it has without the sieve.

use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;

use super::encode::{Batch, CHUNK, Candidate, Keep, Selection, TILE_LATENTS, Tile, keep_exact, task};
use super::params::Params;
use super::simd::vectorised;
use crate::cpu::packed::{PackedMatrix, f32_block};
use crate::cpu::simd::{Format, Kernel, LANES, WIDTH};
use crate::cpu::stage::round_bf16;

/// Where more than one in so many pre-activations would be computed again, the f32 product is quicker.
const MANY: usize = 12;
/// Terms of a sum above which its rounding errors say nothing.
const LONGEST: usize = 1 << 18;
/// Twice the unit roundoff of f32: products of pairs may be rounded before they are added.
const ROUNDING: f64 = f32::EPSILON as f64;
/// What numbers too small for f32 can add to a square or a product.
const TINY: f64 = f32::MIN_POSITIVE as f64;
/// Covers the rounding of the lengths themselves.
const LONGER: f64 = 1.0005;

/// Lengths of rows, of what bf16 keeps of them, and of what it loses; none too small.
#[derive(Debug, Default)]
struct Lengths {
    whole: Vec<f32>,
    kept: Vec<f32>,
    lost: Vec<f32>,
}

/// A batch, and how far bf16 products with it can be off.
#[derive(Debug)]
pub(super) struct Sieve {
    kernel: Kernel,
    /// That of the values that are computed again.
    exact: Kernel,
    packed: PackedMatrix,
    /// Per row: ‖δx‖ + γ‖x‖, times ‖w‖ of the latent.
    slack: Vec<f32>,
    /// Per row: ‖x̃‖, times ‖δw‖.
    kept: Vec<f32>,
    latents: Lengths,
}

/// Working memory of a task.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) z: Vec<f32>,
    staged: Vec<u32>,
    /// Latent and row of what is to be computed again.
    again: Vec<(u32, u32)>,
    /// What a latent's products must reach, row by row.
    limits: Vec<f32>,
}

/// Whether this processor has what a sieve needs.
#[must_use]
pub fn has_bf16() -> bool {
    Kernel::find(Format::Bf16).is_some() && Kernel::find(Format::F32).is_some()
}

impl Sieve {
    /// For rows `input [N, d_in]`; none without the instructions, or where it could rule out nothing.
    pub(super) fn new(params: &Params, input: &[f32]) -> Result<Option<Self>> {
        let d = params.d_in;
        let (Some(kernel), Some(exact)) = (Kernel::find(Format::Bf16), Kernel::find(Format::F32)) else {
            return Ok(None);
        };
        if d > LONGEST {
            return Ok(None);
        }
        let rows = Lengths::measure(input, d);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "d is below 2^18, and f32 is enough"
        )]
        // 2d roundings of the bf16 sum, d of half the size and one for each block of the f32 sum, and a few after it.
        let gamma = {
            let sum = (3 * d + 64) as f64 * ROUNDING;
            (sum / (1.0 - sum)) as f32
        };
        let slack = rows.lost.iter().zip(&rows.whole).map(|(lost, whole)| lost + gamma * whole).collect();
        Ok(Some(Self {
            kernel,
            exact,
            packed: PackedMatrix::new(kernel, input, input.len() / d, d)?,
            slack,
            kept: rows.kept,
            latents: Lengths::measure(&params.tensors.w_enc, d),
        }))
    }

    /// `z̃` of some latents over rows of the batch, without the bias.
    fn product(&self, weights: &[f32], d: usize, rows: &Range<usize>, scratch: &mut Scratch) {
        let groups = Format::Bf16.groups(d);
        let n_latents = weights.len() / d;
        scratch.staged.resize(n_latents * groups, 0);
        for (row, staged) in weights.chunks_exact(d).zip(scratch.staged.chunks_exact_mut(groups)) {
            self.kernel.round(row, staged);
        }
        scratch.z.resize(n_latents * rows.len(), 0.0);
        let panels = rows.start / WIDTH..rows.end.div_ceil(WIDTH);
        self.packed.some_panels_of(&scratch.staged, panels, &mut scratch.z);
    }
}

impl Lengths {
    fn measure(rows: &[f32], d: usize) -> Self {
        let one = |row: &[f32]| vectorised(|| lengths(row));
        let all: Vec<[f32; 3]> = rows.par_chunks_exact(d).with_min_len(16).map(one).collect();
        let column = |i: usize| all.iter().map(|lengths| lengths[i]).collect();
        Self { whole: column(0), kept: column(1), lost: column(2) }
    }
}

/// ‖v‖, ‖ṽ‖ and ‖v − ṽ‖, none too small; infinite where a square overflows, NaN where `v` has one.
#[inline(always)]
fn lengths(v: &[f32]) -> [f32; 3] {
    const RUN: usize = 32;
    let mut sums = [[0.0f32; RUN]; 3];
    let mut add = |lane: usize, v: f32| {
        let rounded = f32::from_bits(round_bf16(v) << 16);
        // The instruction takes numbers below the normal ones for zero.
        let rounded = if rounded.abs() < f32::MIN_POSITIVE { 0.0 } else { rounded };
        let lost = v - rounded;
        sums[0][lane] += v * v;
        sums[1][lane] += rounded * rounded;
        sums[2][lane] += lost * lost;
    };
    let (runs, rest) = v.as_chunks::<RUN>();
    for run in runs {
        run.iter().enumerate().for_each(|(lane, &v)| add(lane, v));
    }
    rest.iter().enumerate().for_each(|(lane, &v)| add(lane, v));
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "f32 is enough")]
    sums.map(|sums| {
        let sum: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
        ((sum + v.len() as f64 * TINY).sqrt() * LONGER) as f32
    })
}

/// What can still be among the largest of a row.
#[derive(Debug, Clone)]
struct Near {
    k: usize,
    /// So many have a value of at least this; one that is surely smaller is not among the largest.
    bound: f32,
    /// How many are kept before they are thinned out.
    most: usize,
    /// Latents, the least they can be, the most.
    kept: Vec<(u32, f32, f32)>,
}

impl Near {
    fn new(k: usize) -> Self {
        Self { k, bound: 0.0, most: 2 * k, kept: Vec::new() }
    }

    #[inline(always)]
    fn push(&mut self, latent: u32, z: f32, error: f32) {
        let (least, most) = (z - error, z + error);
        if reaches(most, self.bound) {
            self.kept.push((latent, if least.is_nan() { f32::NEG_INFINITY } else { least }, most));
            if self.kept.len() >= self.most {
                self.shrink();
            }
        }
    }

    fn shrink(&mut self) {
        if self.kept.len() > self.k && self.k > 0 {
            let mut least: Vec<f32> = self.kept.iter().map(|kept| kept.1).collect();
            let (_, last, _) = least.select_nth_unstable_by(self.k - 1, |a, b| b.total_cmp(a));
            self.bound = self.bound.max(*last);
            let bound = self.bound;
            self.kept.retain(|kept| reaches(kept.2, bound));
            self.most = 2 * self.kept.len().max(self.k);
        }
    }
}

/// Whether `most` is not below `limit`; so a NaN, of which nothing is known.
#[inline(always)]
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must not be ruled out")]
fn reaches(most: f32, limit: f32) -> bool {
    !(most < limit)
}

/// A latent's bf16 values over the rows of a tile, and how far off they can be.
#[derive(Clone, Copy)]
struct Line<'a> {
    latent: u32,
    z: &'a [f32],
    slack: &'a [f32],
    kept: &'a [f32],
    /// ‖w‖ and ‖δw‖.
    whole: f32,
    lost: f32,
}

impl Line<'_> {
    #[inline(always)]
    fn error(&self, row: usize) -> f32 {
        self.slack[row] * self.whole + self.kept[row] * self.lost
    }

    /// Calls `found` for every row whose value plus `shift` may reach the limit at its place.
    #[inline(always)]
    fn scan<'l>(
        self,
        shift: f32,
        limit: impl Fn(usize) -> &'l [f32],
        mut found: impl FnMut(usize, f32, f32),
    ) {
        for start in (0..self.z.len()).step_by(CHUNK) {
            let end = (start + CHUNK).min(self.z.len());
            let (z, slack, kept) = (&self.z[start..end], &self.slack[start..end], &self.kept[start..end]);
            let limits = limit(start);
            let mut hit = 0u32;
            for (((&z, &slack), &kept), &limit) in z.iter().zip(slack).zip(kept).zip(limits) {
                let most = (z + shift) + (slack * self.whole + kept * self.lost);
                hit |= u32::from(reaches(most, limit));
            }
            if hit == 0 {
                continue;
            }
            for row in start..end {
                let (z, error) = (self.z[row] + shift, self.error(row));
                if reaches(z + error, limits[row - start]) {
                    found(row, z, error);
                }
            }
        }
    }
}

/// What the rows of a tile may have among their largest.
struct NearRows {
    rows: Vec<Near>,
    bounds: Vec<f32>,
}

impl NearRows {
    fn new(k: usize, n_rows: usize) -> Self {
        Self { rows: vec![Near::new(k); n_rows], bounds: vec![0.0; n_rows] }
    }

    #[inline(always)]
    fn take(&mut self, line: Line<'_>, bias: f32) {
        // What rounding the sum of value and bias can add is far below what the error has to spare, but for the bias itself.
        let spare = bias.abs() * (4.0 * f32::EPSILON) + 1e-30;
        for start in (0..line.z.len()).step_by(CHUNK) {
            let end = (start + CHUNK).min(line.z.len());
            let part = Line {
                z: &line.z[start..end],
                slack: &line.slack[start..end],
                kept: &line.kept[start..end],
                ..line
            };
            let (rows, bounds) = (&mut self.rows[start..end], &mut self.bounds[start..end]);
            let before: [f32; CHUNK] =
                std::array::from_fn(|i| bounds.get(i).map_or(0.0, |bound| bound - spare));
            part.scan(
                bias,
                |_| &before,
                |row, z, error| {
                    rows[row].push(part.latent, z, error + spare);
                    bounds[row] = rows[row].bound;
                },
            );
        }
    }

    /// Latent and row of all that is left, latents ascending.
    fn left(&mut self, again: &mut Vec<(u32, u32)>) {
        again.clear();
        for (row, near) in (0u32..).zip(&mut self.rows) {
            near.shrink();
            again.extend(near.kept.iter().map(|kept| (kept.0, row)));
        }
        again.sort_unstable();
    }
}

/// [`task`] through the sieve.
pub(super) fn sift(
    params: &Params,
    batch: &Batch<'_>,
    sieve: &Sieve,
    rows: Range<usize>,
    latents: Range<usize>,
    selection: Selection<'_>,
    scratch: &mut Scratch,
) -> Result<Tile> {
    let (d, n_rows) = (params.d_in, rows.len());
    let mut tile = Tile::new(selection, n_rows);
    let mut main = match selection.keep {
        Keep::Largest(k) if k > 0 => Some(NearRows::new(k, n_rows)),
        _ => None,
    };
    let mut dead = selection.dead.filter(|(_, k)| *k > 0).map(|(mask, k)| (mask, NearRows::new(k, n_rows)));
    for first in latents.clone().step_by(TILE_LATENTS) {
        let block = first..(first + TILE_LATENTS).min(latents.end);
        let weights = &params.tensors.w_enc[block.start * d..block.end * d];
        sieve.product(weights, d, &rows, scratch);
        let Scratch { z, again, limits, .. } = scratch;
        again.clear();
        vectorised(|| {
            for (latent, z) in block.clone().zip(z.chunks_exact(n_rows)) {
                let bias = params.tensors.b_enc[latent];
                #[expect(clippy::cast_possible_truncation, reason = "widths are below 2^32")]
                let line = Line {
                    latent: latent as u32,
                    z,
                    slack: &sieve.slack[rows.clone()],
                    kept: &sieve.kept[rows.clone()],
                    whole: sieve.latents.whole[latent],
                    lost: sieve.latents.lost[latent],
                };
                if let Keep::Above(cuts) = selection.keep {
                    cuts.along(latent, &rows, |cut| limit(cut, bias), limits);
                    #[expect(clippy::cast_possible_truncation, reason = "a tile has few rows")]
                    line.scan(
                        0.0,
                        |start| &limits[start..],
                        |row, _, _| again.push((line.latent, row as u32)),
                    );
                }
                if let Some(main) = &mut main {
                    main.take(line, bias);
                }
                if let Some((mask, dead)) = &mut dead
                    && mask[latent]
                {
                    dead.take(line, bias);
                }
            }
        });
        if again.len() > n_rows * block.len() / MANY {
            batch.product(weights, rows.clone(), z)?;
            keep_exact(params, block, rows.start, z, selection, &mut tile);
            tile.again += n_rows * TILE_LATENTS;
        } else if let Keep::Above(cuts) = selection.keep {
            tile.again += again.len();
            sieve.settle(params, batch, &rows, again, |row, candidate| {
                if candidate.z > cuts.at(candidate.latent as usize, rows.start + row) {
                    tile.main[row].kept.push(candidate);
                }
            });
        }
    }
    let mut largest = [main, dead.map(|(_, dead)| dead)];
    for (part, near) in largest.iter_mut().enumerate() {
        let Some(near) = near else { continue };
        near.left(&mut scratch.again);
        if scratch.again.len() > n_rows * latents.len() / MANY {
            let again = n_rows * latents.len();
            return Ok(Tile { again, ..task(params, batch, rows, latents, selection, &mut scratch.z)? });
        }
        tile.again += scratch.again.len();
        let into = if part == 0 { &mut tile.main } else { &mut tile.dead };
        sieve.settle(params, batch, &rows, &scratch.again, |row, candidate| into[row].push(candidate));
    }
    Ok(tile)
}

/// What a product must reach so that with `bias` it may be above `cut`.
fn limit(cut: f32, bias: f32) -> f32 {
    let (cut, bias) = (f64::from(cut), f64::from(bias));
    #[expect(clippy::cast_possible_truncation, reason = "rounding is allowed for")]
    let limit = (cut - bias - (cut.abs() + bias.abs()) * 4.0 * ROUNDING - 1e-30) as f32;
    limit
}

impl Sieve {
    /// Computes the pre-activations in `again`, latents ascending, as the f32 product would.
    fn settle(
        &self,
        params: &Params,
        batch: &Batch<'_>,
        rows: &Range<usize>,
        again: &[(u32, u32)],
        mut found: impl FnMut(usize, Candidate),
    ) {
        let (d, t) = (params.d_in, &params.tensors);
        let block = f32_block(d);
        let mut z = [0.0f32; LANES];
        for group in again.chunks(LANES) {
            // A group that is not full repeats its last value.
            let at = |i: usize| group[i.min(group.len() - 1)];
            let left: [&[f32]; LANES] = std::array::from_fn(|i| row(&t.w_enc, at(i).0 as usize, d));
            let right: [&[f32]; LANES] =
                std::array::from_fn(|i| row(batch.rows, rows.start + at(i).1 as usize, d));
            self.exact.dots(&left, &right, block, &mut z);
            for (&(latent, row), z) in group.iter().zip(z) {
                found(row as usize, Candidate { latent, z: z + t.b_enc[latent as usize] });
            }
        }
    }
}

fn row(rows: &[f32], i: usize, d: usize) -> &[f32] {
    &rows[i * d..(i + 1) * d]
}

#[cfg(test)]
mod tests;
