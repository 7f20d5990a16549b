//! The fast CPU backend: blocked f32 products on all cores, thresholds fused behind each block.
//!
//! Work is cut into tiles of rows × latents. A tile multiplies a block of encoder rows that fits the second-level cache
//! with its inputs, screens the products at once and forgets them, so nothing dense `[n_rows, n]` ever exists. What
//! passes the screen is summed again in f64 ([`shared::certify::Screen`]): active set and values are the reference's.

pub(crate) mod attention;
pub mod gemm;
pub(crate) mod packed;
pub(crate) mod simd;
pub(crate) mod stage;
pub(crate) mod widened;

use std::ops::Range;

use rayon::prelude::*;
use shared::certify::{self, Candidates, Screen};
use shared::cpu::decode_row;
use shared::{Codes, CodesBuilder, Dims, Forward, RowScaling, Rows, Sae, ShapeError};

use gemm::{Matrix, product};

/// Rows of a tile: enough to reuse an encoder block, few enough that the products stay in cache.
const TILE_ROWS: usize = 256;
/// Latents of one product.
const BLOCK: usize = 256;

/// A dictionary held for encoding and decoding on all cores of the current rayon pool.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    sae: Sae,
    screen: Screen,
}

/// What one tile found, row by row of the tile.
enum Found {
    /// Active latents, ascending.
    Active(Vec<Vec<(u32, f32)>>),
    /// Latents still to be ranked.
    Candidates(Vec<Candidates>),
}

impl CpuBackend {
    /// Takes `sae` and precomputes its margins.
    #[must_use]
    pub fn new(sae: Sae) -> Self {
        Self { screen: Screen::new(&sae), sae }
    }

    /// The dictionary held.
    #[must_use]
    pub fn sae(&self) -> &Sae {
        &self.sae
    }

    /// Activation vectors `[n_rows, d_in]` to latent activations; exactly the reference's active set.
    ///
    /// # Errors
    /// If rows are not `d_in` wide.
    pub fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        let Dims { d_in, n_latents, .. } = self.sae.dims();
        x.expect_width("x", d_in)?;
        let mut builder = CodesBuilder::new(n_latents);
        let rows = self.sae.rows();
        let mut scaled = Vec::new();
        // Sixteen tiles of rows at a time bound what is collected before it becomes codes.
        for start in (0..x.n_rows()).step_by(16 * TILE_ROWS) {
            let mut batch = x.slice(start, (start + 16 * TILE_ROWS).min(x.n_rows()));
            if rows != RowScaling::None {
                scaled.resize(batch.data().len(), 0.0);
                let each = scaled.par_chunks_exact_mut(d_in).zip(batch.data().par_chunks_exact(d_in));
                each.for_each(|(out, x)| rows.apply(x, out));
                batch = Rows::new(&scaled, d_in)?;
            }
            self.encode_batch(batch, &mut builder)?;
        }
        Ok(builder.finish())
    }

    fn encode_batch(&self, x: Rows<'_>, builder: &mut CodesBuilder) -> Result<(), ShapeError> {
        let norms: Vec<f32> = x.iter().map(certify::norm).collect();
        let n_tiles = x.n_rows().div_ceil(TILE_ROWS);
        // Few rows leave cores idle, so the latents are then shared out as well.
        let shares = rayon::current_num_threads().div_ceil(n_tiles.max(1));
        let n = self.sae.dims().n_latents;
        let share = n.div_ceil(shares).next_multiple_of(BLOCK);
        let tiles: Vec<(Range<usize>, Range<usize>)> = (0..x.n_rows())
            .step_by(TILE_ROWS)
            .flat_map(|row| {
                let rows = row..(row + TILE_ROWS).min(x.n_rows());
                (0..n).step_by(share).map(move |first| (rows.clone(), first..(first + share).min(n)))
            })
            .collect();
        let found = tiles
            .par_iter()
            .map(|(rows, latents)| {
                self.encode_tile(x.slice(rows.start, rows.end), &norms[rows.clone()], latents.clone())
            })
            .collect::<Result<Vec<_>, _>>()?;
        for (tile, found) in tiles.chunk_by(|a, b| a.0 == b.0).zip(grouped(found, n.div_ceil(share))) {
            let rows = tile[0].0.clone();
            self.assemble(x.slice(rows.start, rows.end), &norms[rows], found, builder)?;
        }
        Ok(())
    }

    /// Screens `latents` of a few rows, block by block.
    fn encode_tile(&self, x: Rows<'_>, norms: &[f32], latents: Range<usize>) -> Result<Found, ShapeError> {
        let (sae, screen) = (&self.sae, &self.screen);
        let d_in = sae.dims().d_in;
        let inputs = Matrix::new(x.data(), x.n_rows(), d_in)?;
        let mut products = vec![0.0; x.n_rows() * BLOCK.min(latents.len())];
        let mut active: Vec<Vec<(u32, f32)>> = Vec::new();
        let mut candidates: Vec<Candidates> = Vec::new();
        if screen.k().is_some() {
            candidates.resize_with(x.n_rows(), Candidates::default);
        } else {
            active.resize_with(x.n_rows(), Vec::new);
        }
        for first in latents.clone().step_by(BLOCK) {
            let width = BLOCK.min(latents.end - first);
            let encoder = Matrix::new(&sae.w_enc()[first * d_in..(first + width) * d_in], width, d_in)?;
            let products = &mut products[..x.n_rows() * width];
            product(products, inputs, encoder.transposed(), 1.0, false, 1)?;
            for (i, products) in products.chunks_exact(width).enumerate() {
                if !screen.trusts(norms[i]) {
                    continue;
                }
                if let Some(candidates) = candidates.get_mut(i) {
                    screen.collect(sae, norms[i], first, products, candidates);
                } else {
                    screen.decide(sae, x.row(i), norms[i], first, products, |latent, value| {
                        active[i].push((latent, value));
                    });
                }
            }
        }
        Ok(if screen.k().is_some() { Found::Candidates(candidates) } else { Found::Active(active) })
    }

    /// Joins what the shares of the latents found for one tile of rows.
    fn assemble(
        &self,
        x: Rows<'_>,
        norms: &[f32],
        found: Vec<Found>,
        builder: &mut CodesBuilder,
    ) -> Result<(), ShapeError> {
        let mut active: Vec<Vec<(u32, f32)>> = vec![Vec::new(); x.n_rows()];
        let mut candidates: Vec<Candidates> = vec![Candidates::default(); x.n_rows()];
        for found in found {
            match found {
                Found::Active(rows) => {
                    active.iter_mut().zip(rows).for_each(|(all, mut row)| all.append(&mut row));
                }
                Found::Candidates(rows) => {
                    candidates.iter_mut().zip(rows).for_each(|(all, row)| all.append(row));
                }
            }
        }
        let finish = |((i, mut active), candidates): ((usize, Vec<(u32, f32)>), Candidates)| {
            let push = |latent, value| active.push((latent, value));
            if !self.screen.trusts(norms[i]) {
                self.screen.row_in_f64(&self.sae, x.row(i), push);
            } else if self.screen.k().is_some() {
                self.screen.rank(&self.sae, x.row(i), candidates, push);
            }
            active
        };
        let rows: Vec<_> = active.into_par_iter().enumerate().zip(candidates).map(finish).collect();
        for row in rows {
            for (latent, value) in row {
                builder.push(latent, value);
            }
            builder.end_row()?;
        }
        Ok(())
    }

    /// Latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`, summed in f64; only the
    /// product with a skip connection is summed in f32.
    ///
    /// # Errors
    /// If the codes index another dictionary width, or `x` has another width or other rows than the codes.
    pub fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        self.sae.check_decode(x, codes)?;
        let Dims { d_in, d_out, .. } = self.sae.dims();
        let mut out = vec![0.0; codes.n_rows() * d_out];
        if let Some(w_skip) = self.sae.w_skip().filter(|_| codes.n_rows() > 0) {
            let (inputs, skip) =
                (Matrix::new(x.data(), x.n_rows(), d_in)?, Matrix::new(w_skip, d_out, d_in)?.transposed());
            product(&mut out, inputs, skip, 1.0, false, rayon::current_num_threads())?;
        }
        out.par_chunks_exact_mut(d_out).enumerate().for_each_init(
            || vec![0.0; d_out],
            |sum, (i, out)| {
                decode_row(&self.sae, x.row(i), codes.row(i), sum, out);
            },
        );
        Ok(out)
    }
}

/// `items` in runs of `length`.
fn grouped<T>(items: Vec<T>, length: usize) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter();
    std::iter::from_fn(move || {
        let run: Vec<T> = items.by_ref().take(length).collect();
        (!run.is_empty()).then_some(run)
    })
}

impl Forward for CpuBackend {
    type Error = ShapeError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        Self::encode(self, x)
    }

    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        Self::decode(self, x, codes)
    }
}
