//! The blocks of [`Ops`] on candle tensors, f32 on the CPU: matrix products by candle, the rest by our kernels.

use std::sync::Arc;

use candle_core::{Device, Storage, Tensor};

use crate::Rows;

use super::kernels::{self, vectorised};
use super::ops::{Affine, Heads, Ops, Projection, QkNorm};
use super::packed::{Buffers, Matrix};
use super::products::{CandleProducts, Products};
use super::{LmError, MlpActivation, MlpSpec, NormKind, Parallel};

mod inplace;

use inplace::{Activate, AddInPlace, MaskedSoftmax, PlaceHeads, Softcap, contiguous};

/// The largest number of attention scores held at once; longer sequences are taken in more pieces of queries.
const MAX_SCORES: usize = 1 << 22;
/// Queries of one piece: small enough that causal masking wastes little, large enough for fast products.
const QUERY_TILE: usize = 128;

/// Candle on the CPU in f32; elementwise blocks run on the given [`Parallel`].
#[derive(Clone)]
pub struct CandleOps {
    pub(super) parallel: Arc<dyn Parallel>,
    pub(super) products: Arc<dyn Products>,
    /// Working memory, used again and again: fresh memory costs more than what is done with it.
    pub(super) buffers: Arc<Buffers>,
}

impl std::fmt::Debug for CandleOps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CandleOps").finish_non_exhaustive()
    }
}

/// Cosines and sines `[seq, half]`.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl CandleOps {
    /// Elementwise blocks run through `parallel`; matrix products use candle's own threads.
    #[must_use]
    pub fn new(parallel: Arc<dyn Parallel>) -> Self {
        Self::with_products(parallel, Arc::new(CandleProducts))
    }

    /// As [`CandleOps::new`], with matrix products and attention by `products` where it takes them.
    #[must_use]
    pub fn with_products(parallel: Arc<dyn Parallel>, products: Arc<dyn Products>) -> Self {
        Self { parallel, products, buffers: Arc::default() }
    }

    /// Fills `n_rows` rows of `width` from pieces of about 16k values: `fill(first_row, piece)`.
    pub(super) fn build(
        &self,
        n_rows: usize,
        width: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Tensor, LmError> {
        let mut out = vec![0f32; n_rows * width];
        let rows = rows_per_piece(width);
        self.parallel.for_each_piece(&mut out, rows * width, &|i, piece| {
            vectorised(|| fill(i * rows, piece));
        });
        Ok(Tensor::from_vec(out, (n_rows, width), &Device::Cpu)?)
    }

    /// Query, key or value heads as `[batch · kv, seq · group, head_dim]`, normalised when a gain is given, rotated when
    /// `rope` is. `first` is the first head in the concatenation and `group` the number of heads that share a key head.
    fn heads(
        &self,
        qkv: &[f32],
        heads: &Heads,
        seq: usize,
        (first, group): (usize, usize),
        gain: Option<(&[f32], f32)>,
        rope: Option<&RopeTable>,
    ) -> Vec<f32> {
        let (d, width, kv) = (heads.head_dim, heads.qkv_width(), heads.n_kv_heads);
        let batch = qkv.len() / width / seq;
        let mut out = self.buffers.take(batch * kv * seq * group * d);
        self.parallel.for_each_piece(&mut out, seq * group * d, &|i, piece| {
            let (sequence, head) = (i / kv, first + (i % kv) * group);
            vectorised(|| {
                let mut normed = vec![0f32; if gain.is_some() { d } else { 0 }];
                for (t, positions) in piece.chunks_exact_mut(group * d).enumerate() {
                    let from = (sequence * seq + t) * width + head * d;
                    for (g, out) in positions.chunks_exact_mut(d).enumerate() {
                        let mut from = &qkv[from + g * d..from + (g + 1) * d];
                        if let Some((gain, eps)) = gain {
                            kernels::normalise(from, &mut normed, d, NormKind::Rms, eps);
                            kernels::affine(&mut normed, gain, None);
                            from = &normed;
                        }
                        match rope {
                            Some(rope) => {
                                let angle = t * rope.half..(t + 1) * rope.half;
                                kernels::rotate(from, out, &rope.cos[angle.clone()], &rope.sin[angle]);
                            }
                            None => out.copy_from_slice(from),
                        }
                    }
                }
            });
        });
        out
    }
}

pub(super) fn rows_per_piece(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Shows the values of a contiguous CPU tensor.
pub(super) fn with_values<T>(
    x: &Tensor,
    see: impl FnOnce(&[f32]) -> Result<T, LmError>,
) -> Result<T, LmError> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(values) => see(contiguous(values, layout)?),
        _ => Err(LmError::Backend("tensor is not on the CPU".to_owned())),
    }
}

/// Shows gain and bias, or that there are none.
fn with_affine<T>(
    affine: Option<Affine<'_, Tensor>>,
    see: impl FnOnce(Option<(&[f32], Option<&[f32]>)>) -> Result<T, LmError>,
) -> Result<T, LmError> {
    match affine {
        None => see(None),
        Some(Affine { gain, bias: None }) => with_values(gain, |gain| see(Some((gain, None)))),
        Some(Affine { gain, bias: Some(bias) }) => {
            with_values(gain, |gain| with_values(bias, |bias| see(Some((gain, Some(bias))))))
        }
    }
}

impl Ops for CandleOps {
    type Rows = Tensor;
    type Matrix = Matrix;
    type Vector = Tensor;
    type Rope = RopeTable;

    fn matrix(&self, data: Vec<f32>, n_out: usize, n_in: usize) -> Result<Matrix, LmError> {
        Ok(match self.products.pack(&data, n_out, n_in)? {
            Some(packed) => Matrix::Packed(packed),
            None => Matrix::Dense(Tensor::from_vec(data, (n_out, n_in), &Device::Cpu)?),
        })
    }

    fn vector(&self, data: Vec<f32>) -> Result<Tensor, LmError> {
        let len = data.len();
        Ok(Tensor::from_vec(data, len, &Device::Cpu)?)
    }

    fn upload(&self, data: Vec<f32>, width: usize) -> Result<Tensor, LmError> {
        let n_rows = Rows::new(&data, width)?.n_rows();
        Ok(Tensor::from_vec(data, (n_rows, width), &Device::Cpu)?)
    }

    fn rope(&self, inverse_frequencies: &[f32], seq: usize) -> Result<RopeTable, LmError> {
        let angles =
            || (0..seq).flat_map(|position| inverse_frequencies.iter().map(move |f| position as f32 * f));
        Ok(RopeTable {
            half: inverse_frequencies.len(),
            cos: angles().map(f32::cos).collect(),
            sin: angles().map(f32::sin).collect(),
        })
    }

    fn embed(&self, table: &Matrix, ids: &[u32], scale: f32) -> Result<Tensor, LmError> {
        let table = match table {
            Matrix::Dense(table) => table,
            Matrix::Packed(table) => return self.embed_packed(&**table, ids, scale),
        };
        let (_, width) = table.dims2()?;
        with_values(table, |table| {
            self.build(ids.len(), width, |first, piece| {
                for (out, &id) in piece.chunks_exact_mut(width).zip(&ids[first..]) {
                    let row = &table[id as usize * width..(id as usize + 1) * width];
                    for (out, x) in out.iter_mut().zip(row) {
                        *out = x * scale;
                    }
                }
            })
        })
    }

    fn norm(
        &self,
        x: &Tensor,
        kind: NormKind,
        eps: f32,
        affine: Option<Affine<'_, Tensor>>,
    ) -> Result<Tensor, LmError> {
        let (n_rows, width) = x.dims2()?;
        with_values(x, |x| {
            with_affine(affine, |affine| {
                self.build(n_rows, width, |first, piece| {
                    let from = &x[first * width..first * width + piece.len()];
                    kernels::normalise(from, piece, width, kind, eps);
                    if let Some((gain, bias)) = affine {
                        kernels::affine(piece, gain, bias);
                    }
                })
            })
        })
    }

    fn affine(&self, x: Tensor, affine: Affine<'_, Tensor>) -> Result<Tensor, LmError> {
        let (n_rows, width) = x.dims2()?;
        with_values(&x, |x| {
            with_affine(Some(affine), |affine| {
                self.build(n_rows, width, |first, piece| {
                    piece.copy_from_slice(&x[first * width..first * width + piece.len()]);
                    if let Some((gain, bias)) = affine {
                        kernels::affine(piece, gain, bias);
                    }
                })
            })
        })
    }

    fn linear(&self, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor, LmError> {
        let weight = match weight {
            Matrix::Dense(weight) => weight,
            Matrix::Packed(weight) => return self.linear_packed(x, &**weight, bias),
        };
        let out = x.matmul(&weight.t()?)?;
        if let Some(bias) = bias {
            out.inplace_op2(bias, &AddInPlace(&*self.parallel))?;
        }
        Ok(out)
    }

    fn attention(
        &self,
        qkv: &Tensor,
        rope: &RopeTable,
        qk_norm: Option<QkNorm<'_, Tensor>>,
        heads: &Heads,
        seq: usize,
    ) -> Result<Tensor, LmError> {
        let (n_rows, _) = qkv.dims2()?;
        let (n_heads, kv, batch) = (heads.n_heads, heads.n_kv_heads, n_rows / seq);
        let group = n_heads / kv;
        let turned = |values: &[f32], which, gain: Option<&Tensor>| match (gain, &qk_norm) {
            (Some(gain), Some(norm)) => with_values(gain, |gain| {
                Ok(self.heads(values, heads, seq, which, Some((gain, norm.eps)), Some(rope)))
            }),
            _ => Ok(self.heads(values, heads, seq, which, None, Some(rope))),
        };
        let (q, k, v) = with_values(qkv, |values| {
            Ok((
                turned(values, (0, group), qk_norm.as_ref().map(|norm| norm.query))?,
                turned(values, (n_heads, 1), qk_norm.as_ref().map(|norm| norm.key))?,
                self.heads(values, heads, seq, (n_heads + kv, 1), None, None),
            ))
        })?;
        if let Some(out) = self.attend(heads, seq, [&q, &k, &v])? {
            [q, k, v].into_iter().for_each(|buffer| self.buffers.give(buffer));
            return Ok(out);
        }
        let tensor = |x: Vec<f32>, n| Tensor::from_vec(x, (batch * kv, n, heads.head_dim), &Device::Cpu);
        let (q, k, v) = (tensor(q, seq * group)?, tensor(k, seq)?, tensor(v, seq)?);
        let out = Tensor::zeros((n_rows, n_heads * heads.head_dim), candle_core::DType::F32, &Device::Cpu)?;
        let parallel = &*self.parallel;
        let affordable = MAX_SCORES / (batch * n_heads * seq).max(1);
        let step = QUERY_TILE.min(affordable.max(8));
        for first_query in (0..seq).step_by(step) {
            let tile = step.min(seq - first_query);
            let first_key = heads.visible(first_query).start;
            let n_keys = first_query + tile - first_key;
            let queries = q.narrow(1, first_query * group, tile * group)?;
            let scores = queries.matmul(&k.narrow(1, first_key, n_keys)?.t()?)?;
            scores.inplace_op1(&MaskedSoftmax {
                parallel,
                heads: *heads,
                group,
                tile,
                first_query,
                first_key,
                n_keys,
            })?;
            let mixed = scores.matmul(&v.narrow(1, first_key, n_keys)?)?;
            out.inplace_op2(&mixed, &PlaceHeads { parallel, heads: *heads, seq, tile, first_query })?;
        }
        Ok(out)
    }

    fn gated(&self, gate_up: &Tensor, activation: MlpActivation) -> Result<Tensor, LmError> {
        let (n_rows, width) = gate_up.dims2()?;
        let d_ff = width / 2;
        with_values(gate_up, |values| {
            self.build(n_rows, d_ff, |first, piece| {
                let from = &values[first * width..first * width + 2 * piece.len()];
                kernels::gated(from, piece, d_ff, activation);
            })
        })
    }

    fn activate(&self, x: Tensor, activation: MlpActivation) -> Result<Tensor, LmError> {
        x.inplace_op1(&Activate(&*self.parallel, activation))?;
        Ok(x)
    }

    fn mlp(
        &self,
        x: &Tensor,
        (up, up_bias): Projection<'_, Self>,
        (down, down_bias): Projection<'_, Self>,
        mlp: &MlpSpec,
    ) -> Result<Tensor, LmError> {
        if let (Matrix::Packed(up), Matrix::Packed(down)) = (up, down) {
            return self.mlp_packed(x, (&**up, up_bias), (&**down, down_bias), mlp);
        }
        let up = self.linear(x, up, up_bias)?;
        let inner =
            if mlp.gated { self.gated(&up, mlp.activation)? } else { self.activate(up, mlp.activation)? };
        self.linear(&inner, down, down_bias)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor, LmError> {
        x.inplace_op2(y, &AddInPlace(&*self.parallel))?;
        Ok(x)
    }

    fn slice(&self, x: &Tensor, start: usize, end: usize) -> Result<Tensor, LmError> {
        Ok(x.narrow(0, start, end.saturating_sub(start))?)
    }

    fn logits(&self, x: &Tensor, unembedding: &Matrix, softcap: Option<f32>) -> Result<Tensor, LmError> {
        let logits = self.linear(x, unembedding, None)?;
        if let Some(cap) = softcap {
            logits.inplace_op1(&Softcap(&*self.parallel, cap))?;
        }
        Ok(logits)
    }

    fn parallel(&self) -> &dyn Parallel {
        &*self.parallel
    }

    fn read<T>(&self, x: &Tensor, see: impl FnOnce(Rows<'_>) -> Result<T, LmError>) -> Result<T, LmError> {
        let (_, width) = x.dims2()?;
        with_values(x, |values| see(Rows::new(values, width)?))
    }
}

#[cfg(test)]
mod tests;
