//! The dense half of a step: the encoder product, block by block of latents, and what of it is kept.
//!
//! A block's pre-activations stay in the second-level cache and are compacted at once into the entries that
//! matter: active ones, and those inside the straight-through window. The dense `[N, n]` matrix never exists.

use anyhow::Result;
use rayon::prelude::*;

use super::params::Params;
use super::simd::{any_above, vectorised};
use crate::cpu::gemm::{Matrix, product};

/// Values of a block's pre-activations kept in cache at a time (256 KiB of f32).
const BLOCK_VALUES: usize = 1 << 16;

/// A (row, latent) pair above the lower end of the latent's window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Entry {
    /// Row of the batch.
    pub(crate) row: u32,
    /// Pre-activation.
    pub(crate) z: f32,
}

/// The kept entries of a block of consecutive latents.
#[derive(Debug, Default)]
pub(crate) struct Block {
    offsets: Vec<usize>,
    entries: Vec<Entry>,
}

impl Block {
    /// Entries of the `i`-th latent of the block, rows ascending.
    pub(crate) fn latent(&self, i: usize) -> &[Entry] {
        &self.entries[self.offsets[i]..self.offsets[i + 1]]
    }

    /// Number of latents in the block.
    pub(crate) fn n_latents(&self) -> usize {
        self.offsets.len() - 1
    }
}

/// Latents a block holds for batches of `n_rows`; depends on nothing else, so neither do the sums.
pub(crate) fn block_size(n_rows: usize) -> usize {
    (BLOCK_VALUES / n_rows.max(1)).clamp(8, 256)
}

/// Entries of all latents with `z > θ − half_window`, `z = w_i · x' + b_i`, for rows `input [N, d_in]`.
pub(crate) fn encode(params: &Params, thetas: &[f32], half_window: f32, input: &[f32]) -> Result<Vec<Block>> {
    let d = params.d_in;
    let n_rows = input.len() / d;
    let size = block_size(n_rows);
    params
        .w_enc
        .par_chunks(size * d)
        .zip(params.b_enc.par_chunks(size))
        .zip(thetas.par_chunks(size))
        .map_init(Vec::new, |z, ((w_enc, b_enc), thetas)| {
            z.resize(b_enc.len() * n_rows, 0.0f32);
            let rows = Matrix::new(input, n_rows, d)?;
            product(z, Matrix::new(w_enc, b_enc.len(), d)?, rows.transposed(), 1.0, false, 1)?;
            Ok(vectorised(|| compact(z, n_rows, b_enc, thetas, half_window)))
        })
        .collect()
}

#[inline(always)]
fn compact(z: &[f32], n_rows: usize, b_enc: &[f32], thetas: &[f32], half_window: f32) -> Block {
    const CHUNK: usize = 32;
    let mut block = Block { offsets: vec![0], entries: Vec::new() };
    for ((z, &bias), &theta) in z.chunks_exact(n_rows).zip(b_enc).zip(thetas) {
        // A screen on the product alone, a little generous; the exact test is made with the bias added.
        let lowest = theta - half_window;
        let screen = lowest - bias - 1e-6 * (lowest.abs() + bias.abs());
        for (chunk_index, chunk) in z.chunks(CHUNK).enumerate() {
            if !any_above(chunk, screen) {
                continue;
            }
            for (k, &product) in chunk.iter().enumerate() {
                let z = product + bias;
                if z > lowest {
                    #[expect(clippy::cast_possible_truncation, reason = "batches have fewer than 2^32 rows")]
                    block.entries.push(Entry { row: (chunk_index * CHUNK + k) as u32, z });
                }
            }
        }
        block.offsets.push(block.entries.len());
    }
    block
}
