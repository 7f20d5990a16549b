//! The portable CPU backend: single-threaded, for the browser without WebGPU and for small batches.
//!
//! Plain loops over fixed-width lanes, which compilers turn into SIMD where the target has it. A block of encoder rows
//! stays in cache while all inputs pass by, four at a time; nothing dense `[n_rows, n]` is ever built.

use crate::certify::{self, Candidates, Screen};
use crate::codes::{Codes, CodesBuilder};
use crate::error::ShapeError;
use crate::forward::{Dims, Forward};
use crate::row_scaling::Undo;
use crate::rows::Rows;
use crate::sae::Sae;

/// Inputs that share one pass over an encoder row.
const TILE: usize = 4;
/// Width of the accumulators; a multiple of every SIMD width.
const LANES: usize = 8;
/// Encoder rows worked on together, sized so that they stay in a small cache: about 256 KiB.
const BLOCK_VALUES: usize = 64 * 1024;

/// A dictionary held for encoding and decoding on one thread.
#[derive(Debug, Clone)]
pub struct ScalarBackend {
    sae: Sae,
    screen: Screen,
}

impl ScalarBackend {
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
        let scaled = self.sae.rows().scaled(x);
        let x = Rows::new(&scaled, d_in)?;
        let block = (BLOCK_VALUES / d_in).clamp(LANES, 1024);
        let mut builder = CodesBuilder::new(n_latents);
        // A batch is taken a few rows at a time so that what is collected for them stays small.
        for start in (0..x.n_rows()).step_by(64) {
            let rows = x.slice(start, (start + 64).min(x.n_rows()));
            self.encode_rows(rows, block, &mut builder)?;
        }
        Ok(builder.finish())
    }

    /// Latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`.
    ///
    /// # Errors
    /// If the codes index another dictionary width, or `x` has another width or other rows than the codes.
    pub fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        self.sae.check_decode(x, codes)?;
        let Dims { d_out, .. } = self.sae.dims();
        let mut out = vec![0.0; codes.n_rows() * d_out];
        if let Some(w_skip) = self.sae.w_skip() {
            for start in (0..x.n_rows()).step_by(TILE) {
                let end = (start + TILE).min(x.n_rows());
                products(w_skip, x.slice(start, end), &mut out[start * d_out..end * d_out]);
            }
        }
        let mut sum = vec![0.0; d_out];
        for ((row, codes), out) in x.iter().zip(codes.iter()).zip(out.chunks_exact_mut(d_out)) {
            decode_row(&self.sae, row, codes, &mut sum, out);
        }
        Ok(out)
    }
}

impl ScalarBackend {
    fn encode_rows(&self, x: Rows<'_>, block: usize, out: &mut CodesBuilder) -> Result<(), ShapeError> {
        let n = self.sae.dims().n_latents;
        let norms: Vec<f32> = x.iter().map(certify::norm).collect();
        let mut active: Vec<Vec<(u32, f32)>> = vec![Vec::new(); x.n_rows()];
        let mut candidates = vec![Candidates::default(); x.n_rows()];
        let mut estimates = vec![0.0; TILE * block];
        for first in (0..n).step_by(block) {
            let width = block.min(n - first);
            for start in (0..x.n_rows()).step_by(TILE) {
                let tile = x.slice(start, (start + TILE).min(x.n_rows()));
                let d_in = self.sae.dims().d_in;
                let weights = &self.sae.w_enc()[first * d_in..(first + width) * d_in];
                products(weights, tile, &mut estimates[..tile.n_rows() * width]);
                for (i, products) in estimates.chunks_exact(width).take(tile.n_rows()).enumerate() {
                    let (row, x_norm) = (start + i, norms[start + i]);
                    if !self.screen.trusts(x_norm) {
                        continue;
                    }
                    if self.screen.k().is_some() {
                        self.screen.collect(&self.sae, x_norm, first, products, &mut candidates[row]);
                    } else {
                        let push = |latent, value| active[row].push((latent, value));
                        self.screen.decide(&self.sae, tile.row(i), x_norm, first, products, push);
                    }
                }
            }
        }
        for ((row, candidates), (mut active, x_norm)) in
            x.iter().zip(candidates).zip(active.into_iter().zip(norms))
        {
            let push = |latent, value| active.push((latent, value));
            if !self.screen.trusts(x_norm) {
                self.screen.row_in_f64(&self.sae, row, push);
            } else if self.screen.k().is_some() {
                self.screen.rank(&self.sae, row, candidates, push);
            }
            for (latent, value) in active {
                out.push(latent, value);
            }
            out.end_row()?;
        }
        Ok(())
    }
}

/// `w_i · x_r` in f32 for up to [`TILE`] rows and all weights `[n, width of x]`, into `[rows, n]`.
fn products(weights: &[f32], tile: Rows<'_>, out: &mut [f32]) {
    // Missing rows repeat the last one; their products are not used.
    let rows: [&[f32]; TILE] = std::array::from_fn(|i| tile.row(i.min(tile.n_rows() - 1)));
    let n = weights.len() / tile.width();
    for (i, weights) in weights.chunks_exact(tile.width()).enumerate() {
        let sums = dot_tile(weights, rows);
        for (r, sum) in sums.into_iter().take(tile.n_rows()).enumerate() {
            out[r * n + i] = sum;
        }
    }
}

/// Four f32 inner products that share the loads of `w`.
fn dot_tile(w: &[f32], rows: [&[f32]; TILE]) -> [f32; TILE] {
    let mut sums = [[0.0f32; LANES]; TILE];
    let (ws, w_rest) = w.as_chunks::<LANES>();
    let xs = rows.map(|row| row.as_chunks::<LANES>());
    for (k, w) in ws.iter().enumerate() {
        for (sum, (x, _)) in sums.iter_mut().zip(&xs) {
            let x = &x[k];
            for i in 0..LANES {
                sum[i] += w[i] * x[i];
            }
        }
    }
    std::array::from_fn(|i| {
        let rest: f32 = w_rest.iter().zip(xs[i].1).map(|(w, x)| w * x).sum();
        sums[i].iter().sum::<f32>() + rest
    })
}

/// One reconstruction of the vector `x` from its active latents and their values, summed in f64 and added to what `out`
/// holds: the product of `x` with the skip connection, or zeros. `sum` and `out` are `[d_out]`.
pub fn decode_row(
    sae: &Sae,
    x: &[f32],
    (latents, values): (&[u32], &[f32]),
    sum: &mut [f64],
    out: &mut [f32],
) {
    for (sum, &bias) in sum.iter_mut().zip(sae.b_dec()) {
        *sum = f64::from(bias);
    }
    for (&latent, &value) in latents.iter().zip(values) {
        let value = f64::from(value);
        for (sum, &d) in sum.iter_mut().zip(sae.decoder_direction(latent as usize)) {
            *sum += value * f64::from(d);
        }
    }
    let Undo { scale, shift } = sae.rows().undo(x);
    for (out, &sum) in out.iter_mut().zip(sum.iter()) {
        #[expect(clippy::cast_possible_truncation, reason = "activations are stored as f32")]
        let value = (scale * sum + shift + f64::from(*out)) as f32;
        *out = value;
    }
}

impl Forward for ScalarBackend {
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
