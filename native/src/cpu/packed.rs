//! Products of activations with a weight matrix that was rearranged once: `x Wᵀ` in f32, bf16 or 8-bit integers.
//!
//! Weights are cut along their inputs into blocks that fit the caches, and along their outputs into panels of
//! [`WIDTH`] columns, so that a tile reads both operands in order. Work is shared out by rows (by columns when there are
//! few), and the order of every sum depends on the weights' shape alone: the same bits on any number of threads.

use std::ops::Range;

use rayon::prelude::*;
use shared::ShapeError;

use super::simd::{Format, Kernel, LANES, Q8_LEFT, Q8_RIGHT, ROWS, WIDTH};

/// The most rows a thread takes through all panels at a time: they stay in the second-level cache.
const MOST_ROWS: usize = 128;
/// The most units (values, pairs) of one block along the inputs.
const BLOCK_UNITS: usize = 768;
/// The same for blocks of 8-bit integers.
const BLOCK_Q8: usize = 64;

/// A weight matrix `[n_out, n_in]` packed for the tiles of [`super::simd`].
#[derive(Debug, Clone)]
pub(crate) struct PackedMatrix {
    kernel: Kernel,
    n_out: usize,
    n_in: usize,
    data: Vec<u32>,
}

impl PackedMatrix {
    /// Packs `weight [n_out, n_in]`.
    ///
    /// # Errors
    /// If `weight` does not fill the shape.
    pub(crate) fn new(kernel: Kernel, weight: &[f32], n_out: usize, n_in: usize) -> Result<Self, ShapeError> {
        super::gemm::Matrix::new(weight, n_out, n_in)?;
        let mut packed = Self { kernel, n_out, n_in, data: Vec::new() };
        packed.data.resize(packed.units() * packed.right() * packed.padded(), 0);
        let mut data = std::mem::take(&mut packed.data);
        for units in packed.blocks() {
            let groups = units.len() * packed.right();
            let start = units.start * packed.right() * packed.padded();
            let block = &mut data[start..start + groups * packed.padded()];
            block.par_chunks_mut(groups * WIDTH).enumerate().for_each_init(Vec::new, |staged, (p, panel)| {
                packed.fill_panel(weight, units.clone(), p, panel, staged);
            });
        }
        packed.data = data;
        Ok(packed)
    }

    /// The number of rows of the weight matrix.
    #[must_use]
    pub(crate) fn n_out(&self) -> usize {
        self.n_out
    }

    /// The number of its columns.
    #[must_use]
    pub(crate) fn n_in(&self) -> usize {
        self.n_in
    }

    fn fill_panel(
        &self,
        weight: &[f32],
        units: Range<usize>,
        p: usize,
        panel: &mut [u32],
        staged: &mut Vec<u32>,
    ) {
        let (format, width) = (self.kernel.format(), self.panel_width(p));
        let columns = p * WIDTH..(p * WIDTH + width).min(self.n_out);
        let (first, n) = self.values(&units);
        let rows = &weight[columns.start * self.n_in..columns.end * self.n_in];
        format.stage(rows, self.n_in, first, n, staged);
        for (column, groups) in staged.chunks_exact(format.groups(n)).enumerate() {
            if format != Format::Q8 {
                for (i, &group) in groups.iter().enumerate() {
                    panel[i * width + column] = group;
                }
                continue;
            }
            for (i, block) in groups.as_chunks::<Q8_LEFT>().0.iter().enumerate() {
                let to = &mut panel[i * Q8_RIGHT * width..(i + 1) * Q8_RIGHT * width];
                let [bytes @ .., scale] = block;
                let sum: i32 = bytes.iter().flat_map(|b| b.to_le_bytes()).map(|b| i32::from(b) - 128).sum();
                let signed = bytes.iter().map(|bytes| bytes ^ 0x8080_8080);
                let groups = signed.chain([*scale, (-128 * sum).cast_unsigned()]);
                groups.enumerate().for_each(|(g, group)| to[g * width + column] = group);
            }
        }
    }

    /// Groups of a unit in the packed weights.
    fn right(&self) -> usize {
        if self.kernel.format() == Format::Q8 { Q8_RIGHT } else { 1 }
    }

    fn units(&self) -> usize {
        self.n_in.div_ceil(self.kernel.format().unit())
    }

    /// Columns, with the zeros that fill the last vector.
    fn padded(&self) -> usize {
        self.n_out.next_multiple_of(LANES)
    }

    fn n_panels(&self) -> usize {
        self.n_out.div_ceil(WIDTH)
    }

    fn panel_width(&self, p: usize) -> usize {
        WIDTH.min(self.padded() - p * WIDTH)
    }

    /// Blocks along the inputs, in units, nearly equal.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let units = self.units();
        let most = if self.kernel.format() == Format::Q8 { BLOCK_Q8 } else { BLOCK_UNITS };
        let size = block_size(units, most);
        (0..units).step_by(size).map(move |start| start..(start + size).min(units))
    }

    /// The first value of a block of units, and how many there are.
    fn values(&self, units: &Range<usize>) -> (usize, usize) {
        let unit = self.kernel.format().unit();
        let first = units.start * unit;
        (first, (units.end * unit).min(self.n_in) - first)
    }

    fn panel(&self, units: &Range<usize>, p: usize) -> &[u32] {
        let groups = units.len() * self.right();
        let start = units.start * self.right() * self.padded() + groups * WIDTH * p;
        &self.data[start..start + groups * self.panel_width(p)]
    }

    /// Row `i` of the weights as they are held, into `row`; as many values as both have.
    pub(crate) fn row(&self, i: usize, row: &mut [f32]) {
        let format = self.kernel.format();
        let (p, column) = (i / WIDTH, i % WIDTH);
        let width = self.panel_width(p);
        for units in self.blocks() {
            let (first, n) = self.values(&units);
            let groups = self.panel(&units, p).chunks_exact(width).map(|group| group[column]);
            let groups: Vec<u32> = if format == Format::Q8 {
                let kept = groups.enumerate().filter(|(g, _)| g % Q8_RIGHT < Q8_LEFT);
                let unsigned = |g: usize| if g % Q8_RIGHT < Q8_LEFT - 1 { 0x8080_8080 } else { 0 };
                kept.map(|(g, group)| group ^ unsigned(g)).collect()
            } else {
                groups.collect()
            };
            if let Some(out) = row.get_mut(first..first + n) {
                format.unstage(&groups, out);
            }
        }
    }

    /// `out = x Wᵀ` (or `+=` when `add`) for `x [m, n_in]` and `out [m, n_out]`, on the threads of the current pool.
    ///
    /// # Errors
    /// If the lengths do not fit each other.
    pub(crate) fn product(&self, x: &[f32], out: &mut [f32], add: bool) -> Result<(), ShapeError> {
        let m = x.len() / self.n_in.max(1);
        super::gemm::Matrix::new(x, m, self.n_in)?;
        super::gemm::Matrix::new(out, m, self.n_out)?;
        if x.is_empty() || out.is_empty() {
            return Ok(());
        }
        let threads = rayon::current_num_threads();
        if m < 2 * ROWS * threads && threads > 1 {
            self.by_columns(x, out, add, threads);
            return Ok(());
        }
        let rows = m.div_ceil(4 * threads).next_multiple_of(ROWS).min(MOST_ROWS);
        let pieces = out.par_chunks_mut(rows * self.n_out).zip(x.par_chunks(rows * self.n_in));
        pieces.for_each_init(Vec::new, |staged, (out, x)| self.piece(x, out, add, staged));
        Ok(())
    }

    /// [`PackedMatrix::product`] on the calling thread; lengths are the caller's care. `staged` is working memory.
    pub(crate) fn piece(&self, x: &[f32], out: &mut [f32], add: bool, staged: &mut Vec<u32>) {
        self.panels(x, 0..self.n_panels(), out, self.n_out, add, staged);
    }

    /// `out = x Wᵀ` for some panels alone, whose columns are those of `out`, on the calling thread; lengths are the
    /// caller's care.
    pub(crate) fn some_panels(&self, x: &[f32], panels: Range<usize>, out: &mut [f32]) {
        let columns = (panels.end * WIDTH).min(self.n_out) - panels.start * WIDTH;
        self.panels(x, panels, out, columns, false, &mut Vec::new());
    }

    /// [`PackedMatrix::some_panels`] of rows that are staged already.
    pub(crate) fn some_panels_of(&self, staged: &[u32], panels: Range<usize>, out: &mut [f32]) {
        let columns = (panels.end * WIDTH).min(self.n_out) - panels.start * WIDTH;
        let (left, stride) = (self.kernel.format().left(), self.kernel.format().groups(self.n_in));
        for units in self.blocks() {
            let (first, len, n_rows) = (units.start * left, units.len() * left, staged.len() / stride);
            let rows = Left { groups: staged, first, len, stride, n_rows };
            self.times(&rows, &units, panels.clone(), out, columns, units.start > 0);
        }
    }

    /// For few rows: every thread takes some panels into a buffer of its own.
    fn by_columns(&self, x: &[f32], out: &mut [f32], add: bool, threads: usize) {
        let share = self.n_panels().div_ceil(4 * threads).max(1);
        let starts: Vec<usize> = (0..self.n_panels()).step_by(share).collect();
        let done: Vec<(Range<usize>, Vec<f32>)> = starts
            .into_par_iter()
            .map(|start| {
                let panels = start..(start + share).min(self.n_panels());
                let columns = start * WIDTH..(panels.end * WIDTH).min(self.n_out);
                let mut part = Vec::with_capacity(out.len() / self.n_out * columns.len());
                out.chunks_exact(self.n_out).for_each(|row| part.extend_from_slice(&row[columns.clone()]));
                self.panels(x, panels, &mut part, columns.len(), add, &mut Vec::new());
                (columns, part)
            })
            .collect();
        for (columns, part) in done {
            let rows = out.chunks_exact_mut(self.n_out).zip(part.chunks_exact(columns.len()));
            rows.for_each(|(row, part)| row[columns.clone()].copy_from_slice(part));
        }
    }

    /// All of `x` times some panels, into rows of `out` that begin with the first panel and are `stride` apart.
    fn panels(
        &self,
        x: &[f32],
        panels: Range<usize>,
        out: &mut [f32],
        stride: usize,
        add: bool,
        staged: &mut Vec<u32>,
    ) {
        let format = self.kernel.format();
        let m = x.len() / self.n_in;
        for units in self.blocks() {
            let add = add || units.start > 0;
            let (first, n) = self.values(&units);
            let left = if format == Format::F32 {
                Left { groups: bytemuck::cast_slice(x), first, len: n, stride: self.n_in, n_rows: m }
            } else {
                format.stage(x, self.n_in, first, n, staged);
                let groups = format.groups(n);
                Left { groups: staged, first: 0, len: groups, stride: groups, n_rows: m }
            };
            self.times(&left, &units, panels.clone(), out, stride, add);
        }
    }

    /// One block of `left` times some panels.
    fn times(
        &self,
        left: &Left<'_>,
        units: &Range<usize>,
        panels: Range<usize>,
        out: &mut [f32],
        stride: usize,
        add: bool,
    ) {
        for p in panels.clone() {
            let (panel, width) = (self.panel(units, p), self.panel_width(p));
            let from = (p - panels.start) * WIDTH;
            let valid = width.min(self.n_out - p * WIDTH);
            left.times(self.kernel, panel, width, &mut out[from..], stride, valid, add);
        }
    }
}

/// The length of blocks that `n` units are cut into, of at most `most`.
fn block_size(n: usize, most: usize) -> usize {
    n.div_ceil(n.div_ceil(most).max(1)).max(1)
}

/// How many values an f32 product over `n` takes into each of its partial sums.
pub(crate) fn f32_block(n: usize) -> usize {
    block_size(n, BLOCK_UNITS)
}

/// Rows of groups: row `i` is `groups[i · stride + first..][..len]`.
pub(crate) struct Left<'a> {
    /// The groups of all rows.
    pub(crate) groups: &'a [u32],
    /// Where the part of a row that takes part begins.
    pub(crate) first: usize,
    /// How long it is.
    pub(crate) len: usize,
    /// From row to row.
    pub(crate) stride: usize,
    /// How many rows.
    pub(crate) n_rows: usize,
}

impl Left<'_> {
    /// Times one panel of `width` columns, of which `valid` exist in `out`.
    pub(crate) fn times(
        &self,
        kernel: Kernel,
        panel: &[u32],
        width: usize,
        out: &mut [f32],
        stride: usize,
        valid: usize,
        add: bool,
    ) {
        for strip in (0..self.n_rows).step_by(ROWS) {
            let live = ROWS.min(self.n_rows - strip);
            // A strip that is not full repeats its last row; what comes of it is thrown away.
            let rows = std::array::from_fn(|r| {
                let start = (strip + r.min(live - 1)) * self.stride + self.first;
                &self.groups[start..start + self.len]
            });
            let out = &mut out[strip * stride..];
            if live == ROWS && valid == width {
                kernel.tile(&rows, panel, width, out, stride, add);
                continue;
            }
            let mut tile = [0f32; ROWS * WIDTH];
            let places = |r: usize| (r * stride..r * stride + valid, r * width..r * width + valid);
            if add {
                for (from, to) in (0..live).map(places) {
                    tile[to].copy_from_slice(&out[from]);
                }
            }
            kernel.tile(&rows, panel, width, &mut tile, width, add);
            for (to, from) in (0..live).map(places) {
                out[to].copy_from_slice(&tile[from]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
