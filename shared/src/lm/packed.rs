//! The blocks of [`CandleOps`] that run on matrices packed by injected [`super::Products`].

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};

use super::candle::{CandleOps, rows_per_piece, with_values};
use super::kernels::{self, vectorised};
use super::ops::Heads;
use super::products::{Packed, QueryKeyValue};
use super::{LmError, MlpSpec};

/// Values between the two products of an MLP held at once: few enough for the caches, enough rows for all cores.
const MLP_VALUES: usize = 1 << 21;
/// The fewest rows that go through an MLP together.
const MLP_ROWS: usize = 128;
/// Buffers kept for the next use.
const MOST_BUFFERS: usize = 8;

/// A weight matrix: candle's, or whatever the injected [`super::Products`] made of it.
#[derive(Debug)]
pub enum Matrix {
    /// A tensor `[out, in]`.
    Dense(Tensor),
    /// Packed.
    Packed(Box<dyn Packed>),
}

/// Vectors that were used before, to be used again.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<f32>>>);

impl Buffers {
    /// `n` values that mean nothing.
    pub(super) fn take(&self, n: usize) -> Vec<f32> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, else the largest.
        let rank = |buffer: &Vec<f32>| (buffer.capacity() < n, buffer.capacity().abs_diff(n));
        let best = (0..free.len()).min_by_key(|&i| rank(&free[i]));
        let mut buffer = best.map(|i| free.swap_remove(i)).unwrap_or_default();
        drop(free);
        buffer.resize(n, 0.0);
        buffer
    }

    /// For the next to take.
    pub(super) fn give(&self, buffer: Vec<f32>) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < MOST_BUFFERS {
            free.push(buffer);
        }
    }
}

/// A packed matrix and its bias, if it has one.
type PackedLinear<'a> = (&'a dyn Packed, Option<&'a Tensor>);

impl CandleOps {
    /// `out = x Wᵀ + bias` on slices.
    fn product(&self, x: &[f32], (weight, bias): PackedLinear<'_>, out: &mut [f32]) -> Result<(), LmError> {
        let Some(bias) = bias else { return weight.product(x, out, false) };
        with_values(bias, |bias| {
            out.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias));
            weight.product(x, out, true)
        })
    }

    pub(super) fn linear_packed(
        &self,
        x: &Tensor,
        weight: &dyn Packed,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, LmError> {
        with_values(x, |x| {
            let n_rows = x.len() / weight.n_in().max(1);
            let mut out = vec![0f32; n_rows * weight.n_out()];
            self.product(x, (weight, bias), &mut out)?;
            Ok(Tensor::from_vec(out, (n_rows, weight.n_out()), &Device::Cpu)?)
        })
    }

    pub(super) fn embed_packed(
        &self,
        table: &dyn Packed,
        ids: &[u32],
        scale: f32,
    ) -> Result<Tensor, LmError> {
        let width = table.n_in();
        self.build(ids.len(), width, |first, piece| {
            for (out, &id) in piece.chunks_exact_mut(width).zip(&ids[first..]) {
                table.row(id as usize, out);
                out.iter_mut().for_each(|x| *x *= scale);
            }
        })
    }

    /// An MLP, some rows at a time: what lies between the products is used while it is in cache and never held whole.
    pub(super) fn mlp_packed(
        &self,
        x: &Tensor,
        up: PackedLinear<'_>,
        down: PackedLinear<'_>,
        mlp: &MlpSpec,
    ) -> Result<Tensor, LmError> {
        let (n_in, n_up, d_ff, n_out) = (up.0.n_in(), up.0.n_out(), down.0.n_in(), down.0.n_out());
        let (n_rows, _) = x.dims2()?;
        let step = (MLP_VALUES / n_up.max(1)).max(MLP_ROWS);
        let mut out = vec![0f32; n_rows * n_out];
        with_values(x, |x| {
            for (x, out) in x.chunks(step * n_in).zip(out.chunks_mut(step * n_out)) {
                let n = x.len() / n_in;
                let mut wide = self.buffers.take(n * n_up);
                self.product(x, up, &mut wide)?;
                if mlp.gated {
                    let mut inner = self.buffers.take(n * d_ff);
                    let rows = rows_per_piece(d_ff);
                    self.parallel.for_each_piece(&mut inner, rows * d_ff, &|i, piece| {
                        let from = &wide[i * rows * n_up..][..2 * piece.len()];
                        vectorised(|| kernels::gated(from, piece, d_ff, mlp.activation));
                    });
                    self.product(&inner, down, out)?;
                    self.buffers.give(inner);
                } else {
                    self.parallel.for_each_piece(&mut wide, 16_384, &|_, piece| {
                        vectorised(|| kernels::activate(piece, mlp.activation));
                    });
                    self.product(&wide, down, out)?;
                }
                self.buffers.give(wide);
            }
            Ok(())
        })?;
        Ok(Tensor::from_vec(out, (n_rows, n_out), &Device::Cpu)?)
    }

    /// Attention by the injected products, if they do it.
    pub(super) fn attend(
        &self,
        heads: &Heads,
        seq: usize,
        [queries, keys, values]: [&[f32]; 3],
    ) -> Result<Option<Tensor>, LmError> {
        let width = heads.n_heads * heads.head_dim;
        let mut out = vec![0f32; queries.len()];
        let done = self.products.attend(heads, seq, QueryKeyValue { queries, keys, values }, &mut out)?;
        Ok(if done {
            Some(Tensor::from_vec(out, (queries.len() / width, width), &Device::Cpu)?)
        } else {
            None
        })
    }
}
