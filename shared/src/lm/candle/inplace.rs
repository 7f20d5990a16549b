//! Blocks that change a candle tensor in its own memory.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout};

use crate::lm::kernels::{self, vectorised};
use crate::lm::ops::Heads;
use crate::lm::{MlpActivation, Parallel};

pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("tensor is not contiguous".to_owned()))?;
    Ok(&values[start..end])
}

pub(super) fn contiguous_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("tensor is not contiguous".to_owned()))?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => Err(candle_core::Error::Msg("tensor is not f32".to_owned())),
    }
}

/// `x += y`, rows of `x` against rows of `y` or against one row.
pub(super) struct AddInPlace<'a>(pub(super) &'a dyn Parallel);

impl InplaceOp2 for AddInPlace<'_> {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (x, y) = (contiguous_mut(x, x_layout)?, contiguous(y, y_layout)?);
        let one_row = y.len() < x.len();
        let piece = if one_row { y.len() } else { 16_384 };
        self.0.for_each_piece(x, piece, &|i, x| {
            let y = if one_row { y } else { &y[i * piece..i * piece + x.len()] };
            vectorised(|| kernels::add(x, y));
        });
        Ok(())
    }
}

/// Causal softmax over scores `[batch · kv, tile · group, keys]`.
pub(super) struct MaskedSoftmax<'a> {
    pub(super) parallel: &'a dyn Parallel,
    pub(super) heads: Heads,
    pub(super) group: usize,
    pub(super) tile: usize,
    pub(super) first_query: usize,
    pub(super) first_key: usize,
    pub(super) n_keys: usize,
}

impl InplaceOp1 for MaskedSoftmax<'_> {
    fn name(&self) -> &'static str {
        "masked softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let scores = contiguous_mut(storage, layout)?;
        // A piece is all query heads of one position, so that its mask is computed once.
        self.parallel.for_each_piece(scores, self.group * self.n_keys, &|i, rows| {
            let visible = self.heads.visible(self.first_query + i % self.tile);
            let visible = visible.start - self.first_key..visible.end - self.first_key;
            vectorised(|| {
                for row in rows.chunks_exact_mut(self.n_keys) {
                    kernels::masked_softmax(row, visible.clone(), self.heads.scale, self.heads.softcap);
                }
            });
        });
        Ok(())
    }
}

/// Puts a tile of mixed heads `[batch · kv, tile · group, head_dim]` into rows `[batch · seq, heads · head_dim]`.
pub(super) struct PlaceHeads<'a> {
    pub(super) parallel: &'a dyn Parallel,
    pub(super) heads: Heads,
    pub(super) seq: usize,
    pub(super) tile: usize,
    pub(super) first_query: usize,
}

impl InplaceOp2 for PlaceHeads<'_> {
    fn name(&self) -> &'static str {
        "place heads"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        mixed: &CpuStorage,
        mixed_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (out, mixed) = (contiguous_mut(out, out_layout)?, contiguous(mixed, mixed_layout)?);
        let (kv, width) = (self.heads.n_kv_heads, self.heads.n_heads * self.heads.head_dim);
        let per_kv = width / kv;
        self.parallel.for_each_piece(out, self.seq * width, &|sequence, rows| {
            let rows = rows.chunks_exact_mut(width).skip(self.first_query).take(self.tile);
            for (t, row) in rows.enumerate() {
                for (k, out) in row.chunks_exact_mut(per_kv).enumerate() {
                    let from = ((sequence * kv + k) * self.tile + t) * per_kv;
                    out.copy_from_slice(&mixed[from..from + per_kv]);
                }
            }
        });
        Ok(())
    }
}

/// `x = cap · tanh(x / cap)`.
pub(super) struct Softcap<'a>(pub(super) &'a dyn Parallel, pub(super) f32);

impl InplaceOp1 for Softcap<'_> {
    fn name(&self) -> &'static str {
        "soft-cap"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let values = contiguous_mut(storage, layout)?;
        self.0.for_each_piece(values, 16_384, &|_, piece| vectorised(|| kernels::softcap(piece, self.1)));
        Ok(())
    }
}

/// `x = act(x)`.
pub(super) struct Activate<'a>(pub(super) &'a dyn Parallel, pub(super) MlpActivation);

impl InplaceOp1 for Activate<'_> {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let values = contiguous_mut(storage, layout)?;
        self.0.for_each_piece(values, 16_384, &|_, piece| vectorised(|| kernels::activate(piece, self.1)));
        Ok(())
    }
}
