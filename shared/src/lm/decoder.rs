//! The decoder, written once: what a transformer computes, where it is tapped, when it stops.

use crate::tap::{Site, TapPoint};
use crate::{Rows, ShapeError};

use super::candle::CandleOps;
use super::ops::{Affine, Heads, Ops, QkNorm};
use super::tokens::{Divergence, nll_and_kl, token_nll};
use super::{LmError, NoTap, NormKind, Spec, Tap, TapAction, TokenBatch, Until};

/// Logits held at once while losses are taken: enough rows that a product does not wait for the unembedding's weights, with a vocabulary
/// of 2^18 too; less in a browser's memory.
const LOGITS_AT_ONCE: usize = if cfg!(target_family = "wasm") { 1 << 23 } else { 1 << 25 };

/// A language model that runs on the CPU (or in wasm) through candle.
pub type LanguageModel = Decoder<CandleOps>;

/// A decoder-only transformer over the arithmetic `O`.
pub struct Decoder<O: Ops> {
    pub(super) ops: O,
    pub(super) spec: Spec,
    pub(super) embedding: O::Matrix,
    /// Learned positions, `context_length` rows.
    pub(super) positions: Option<O::Matrix>,
    pub(super) blocks: Vec<Block<O>>,
    pub(super) final_gain: Vec<f32>,
    pub(super) final_norm: Norm<O>,
    /// `None` when the unembedding is the embedding table.
    pub(super) unembedding: Option<O::Matrix>,
}

/// One block's weights; queries, keys and values in one matrix, gate and up in one (up alone where nothing gates).
pub(super) struct Block<O: Ops> {
    pub(super) pre_attention: Norm<O>,
    pub(super) qkv: Linear<O>,
    pub(super) query_gain: Option<O::Vector>,
    pub(super) key_gain: Option<O::Vector>,
    pub(super) out: Linear<O>,
    pub(super) post_attention: Option<Norm<O>>,
    pub(super) pre_mlp: Norm<O>,
    pub(super) up: Linear<O>,
    pub(super) down: Linear<O>,
    pub(super) post_mlp: Option<Norm<O>>,
}

/// A norm's gain and its bias, if it has one.
pub(super) struct Norm<O: Ops> {
    pub(super) gain: O::Vector,
    pub(super) bias: Option<O::Vector>,
}

impl<O: Ops> Norm<O> {
    fn affine(&self) -> Affine<'_, O::Vector> {
        Affine { gain: &self.gain, bias: self.bias.as_ref() }
    }
}

/// A matrix and its bias, if it has one.
pub(super) struct Linear<O: Ops> {
    pub(super) weight: O::Matrix,
    pub(super) bias: Option<O::Vector>,
}

impl<O: Ops> std::fmt::Debug for Decoder<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl<O: Ops> Decoder<O> {
    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Runs the model; `tap` sees the points it wants, in the order the model computes them.
    /// Returns logits `[batch · seq, vocab]`, or `None` when stopped before them.
    ///
    /// # Errors
    /// On ids outside the vocabulary, a layer that does not exist, and whatever the tap reports.
    pub fn forward(
        &self,
        tokens: TokenBatch<'_>,
        tap: &mut dyn Tap,
        until: Until,
    ) -> Result<Option<Vec<f32>>, LmError> {
        let last = match until {
            Until::Layer(layer) if layer >= self.spec.n_layers => {
                return Err(LmError::Layer { layer, n_layers: self.spec.n_layers });
            }
            Until::Layer(layer) => layer,
            Until::Logits => self.spec.n_layers - 1,
        };
        let h = self.blocks(tokens, tap, last)?;
        if matches!(until, Until::Layer(_)) {
            return Ok(None);
        }
        let mut logits = Vec::with_capacity(tokens.n_tokens() * self.spec.vocab_size);
        self.unembed(&h, tokens.n_tokens(), |_, rows| logits.extend_from_slice(rows.data()))?;
        Ok(Some(logits))
    }

    /// Next-token losses `[batch, seq − 1]` in nats (as [`super::nll`]), without ever holding all logits.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_nll(&self, tokens: TokenBatch<'_>, tap: &mut dyn Tap) -> Result<Vec<f32>, LmError> {
        let h = self.blocks(tokens, tap, self.spec.n_layers - 1)?;
        self.losses(tokens, &h)
    }

    /// As [`Decoder::forward_nll`], but from block `first` on, given the residual stream it reads, `[batch · seq, d_model]`
    /// (of [`Site::Resid`] of the block before, or of [`Site::Embed`]). Taps before that block are not visited.
    ///
    /// # Errors
    /// As [`Decoder::forward`], or if `residual` is of another shape.
    pub fn forward_nll_from(
        &self,
        tokens: TokenBatch<'_>,
        residual: Rows<'_>,
        first: usize,
        tap: &mut dyn Tap,
    ) -> Result<Vec<f32>, LmError> {
        let h = self.upload_residual(tokens, residual)?;
        let h = self.run_blocks(tokens.seq(), h, first..self.spec.n_layers, tap)?;
        self.losses(tokens, &h)
    }

    /// As [`Decoder::forward_nll_from`], but what the last block leaves in the residual stream, `[batch · seq, d_model]`.
    ///
    /// # Errors
    /// As [`Decoder::forward_nll_from`].
    pub fn forward_last_from(
        &self,
        tokens: TokenBatch<'_>,
        residual: Rows<'_>,
        first: usize,
        tap: &mut dyn Tap,
    ) -> Result<Vec<f32>, LmError> {
        let h = self.upload_residual(tokens, residual)?;
        let h = self.run_blocks(tokens.seq(), h, first..self.spec.n_layers, tap)?;
        self.ops.read(&h, |rows| Ok(rows.data().to_vec()))
    }

    /// What the predictions of other passes over `tokens` lose against an untouched one. All are given by the residual stream after the
    /// last block, `[batch · seq, d_model]`, so that the untouched one's logits are computed once for all.
    ///
    /// # Errors
    /// If a residual stream is of another shape.
    pub fn divergences(
        &self,
        tokens: TokenBatch<'_>,
        untouched: Rows<'_>,
        changed: &[Rows<'_>],
    ) -> Result<Vec<Vec<Divergence>>, LmError> {
        let normed = |rows| self.norm(&self.upload_residual(tokens, rows)?, &self.final_norm);
        let untouched = normed(untouched)?;
        let changed = changed.iter().map(|rows| normed(*rows)).collect::<Result<Vec<_>, _>>()?;
        let (ids, seq, softcap) = (tokens.ids(), tokens.seq(), self.spec.final_softcap);
        let mut all = vec![Vec::with_capacity(tokens.batch() * (seq - 1)); changed.len()];
        let step = self.rows_at_once();
        for first in (0..tokens.n_tokens()).step_by(step) {
            let end = (first + step).min(tokens.n_tokens());
            let predicting: Vec<usize> = (first..end).filter(|i| (i + 1) % seq != 0).collect();
            let p = self.logits(&untouched, first, end, softcap)?;
            for (changed, out) in changed.iter().zip(&mut all) {
                let q = self.logits(changed, first, end, softcap)?;
                // A loss and a divergence for each prediction.
                let mut pairs = vec![0f32; 2 * predicting.len()];
                self.ops.read(&p, |p| {
                    self.ops.read(&q, |q| {
                        self.ops.parallel().for_each_piece(&mut pairs, 2, &|at, pair| {
                            let i = predicting[at];
                            pair.copy_from_slice(&nll_and_kl(p.row(i - first), q.row(i - first), ids[i + 1]));
                        });
                        Ok(())
                    })
                })?;
                out.extend(pairs.chunks_exact(2).map(|pair| Divergence { nll: pair[0], kl: pair[1] }));
            }
        }
        Ok(all)
    }

    fn upload_residual(&self, tokens: TokenBatch<'_>, residual: Rows<'_>) -> Result<O::Rows, LmError> {
        residual.expect_width("residual", self.spec.d_model)?;
        let (expected, found) = (tokens.n_tokens(), residual.n_rows());
        if expected != found {
            let shape = vec![expected];
            return Err(ShapeError::Length { name: "residual", shape, expected, found }.into());
        }
        self.ops.upload(residual.data().to_vec(), self.spec.d_model)
    }

    /// Next-token losses of the last block's residual stream.
    fn losses(&self, tokens: TokenBatch<'_>, h: &O::Rows) -> Result<Vec<f32>, LmError> {
        let (ids, seq) = (tokens.ids(), tokens.seq());
        let mut losses = Vec::with_capacity(tokens.batch() * (seq - 1));
        self.unembed(h, tokens.n_tokens(), |first, rows| {
            for (i, row) in rows.iter().enumerate() {
                if (first + i + 1) % seq != 0 {
                    losses.push(token_nll(row, ids[first + i + 1]));
                }
            }
        })?;
        Ok(losses)
    }

    /// Mean next-token loss in nats over all sequences; `None` for sequences of one token.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn mean_loss(&self, tokens: TokenBatch<'_>) -> Result<Option<f64>, LmError> {
        let losses = self.forward_nll(tokens, &mut NoTap)?;
        let total: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        Ok((!losses.is_empty()).then(|| total / losses.len() as f64))
    }

    /// Direct effect of residual directions on the logits: rows `[m, d_model]` (less their mean, where the final norm
    /// takes it away) times the final norm's gain, times the unembedding, `[m, vocab]`. The norm's division and the
    /// soft-cap, which depend on the rest of the residual stream, are left out, and so is the norm's bias.
    ///
    /// # Errors
    /// If the rows are not `d_model` wide.
    pub fn direct_logits(&self, directions: Rows<'_>) -> Result<Vec<f32>, LmError> {
        directions.expect_width("directions", self.spec.d_model)?;
        let scaled = directions.iter().flat_map(|row| {
            let mean = match self.spec.norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => row.iter().sum::<f32>() / row.len() as f32,
            };
            row.iter().zip(&self.final_gain).map(move |(x, g)| (x - mean) * g)
        });
        let mut logits = Vec::with_capacity(directions.n_rows() * self.spec.vocab_size);
        if directions.n_rows() > 0 {
            let rows = self.ops.upload(scaled.collect(), self.spec.d_model)?;
            self.project(&rows, directions.n_rows(), None, |_, rows| logits.extend_from_slice(rows.data()))?;
        }
        Ok(logits)
    }

    /// As [`Decoder::forward_nll_from`], but only the taps see what is computed.
    ///
    /// # Errors
    /// As [`Decoder::forward_nll_from`].
    pub fn forward_taps_from(
        &self,
        tokens: TokenBatch<'_>,
        residual: Rows<'_>,
        first: usize,
        tap: &mut dyn Tap,
    ) -> Result<(), LmError> {
        let h = self.upload_residual(tokens, residual)?;
        self.run_blocks(tokens.seq(), h, first..self.spec.n_layers, tap).map(drop)
    }

    /// Logits `[m, vocab]` of vectors of the residual stream `[m, d_model]`, as if each were that of the last block: the final
    /// norm, the unembedding and the soft-cap (the logit lens).
    ///
    /// # Errors
    /// If the rows are not `d_model` wide.
    pub fn logit_lens(&self, residual: Rows<'_>) -> Result<Vec<f32>, LmError> {
        residual.expect_width("residual", self.spec.d_model)?;
        let mut logits = Vec::with_capacity(residual.n_rows() * self.spec.vocab_size);
        if residual.n_rows() > 0 {
            let rows = self.ops.upload(residual.data().to_vec(), self.spec.d_model)?;
            self.unembed(&rows, residual.n_rows(), |_, rows| logits.extend_from_slice(rows.data()))?;
        }
        Ok(logits)
    }

    /// The residual stream after block `last`.
    fn blocks(&self, tokens: TokenBatch<'_>, tap: &mut dyn Tap, last: usize) -> Result<O::Rows, LmError> {
        let vocab_size = self.spec.vocab_size;
        if let Some(position) = tokens.ids().iter().position(|&id| id as usize >= vocab_size) {
            return Err(LmError::TokenId { id: tokens.ids()[position], position, vocab_size });
        }
        let h = self.embed(tokens)?;
        let h = self.tapped(tap, TapPoint::new(Site::Embed, 0), h)?;
        self.run_blocks(tokens.seq(), h, 0..last + 1, tap)
    }

    /// The residual stream after the last of `layers`, from the one before the first.
    fn run_blocks(
        &self,
        seq: usize,
        mut h: O::Rows,
        layers: std::ops::Range<usize>,
        tap: &mut dyn Tap,
    ) -> Result<O::Rows, LmError> {
        let attention = &self.spec.attention;
        let rope = self.ops.rope(&attention.rope.inverse_frequencies(), seq)?;
        let local_rope = match &attention.local_rope {
            Some(local) => Some(self.ops.rope(&local.inverse_frequencies(), seq)?),
            None => None,
        };
        for (layer, block) in self.blocks.iter().enumerate().take(layers.end).skip(layers.start) {
            let slides = attention.windows.get(layer).is_some_and(Option::is_some);
            let rope = local_rope.as_ref().filter(|_| slides).unwrap_or(&rope);
            h = self.block(block, layer, h, rope, seq, tap)?;
        }
        Ok(h)
    }

    fn embed(&self, tokens: TokenBatch<'_>) -> Result<O::Rows, LmError> {
        let h = self.ops.embed(&self.embedding, tokens.ids(), self.spec.embed_scale)?;
        let Some(positions) = &self.positions else { return Ok(h) };
        let (seq, context_length) = (tokens.seq(), self.spec.context_length);
        if seq > context_length {
            return Err(LmError::TooLong { seq, context_length });
        }
        // A context length fits an id: no dimension exceeds 2²⁴.
        let ids: Vec<u32> = (0..tokens.n_tokens()).map(|i| (i % seq) as u32).collect();
        self.ops.add(h, &self.ops.embed(positions, &ids, 1.0)?)
    }

    fn block(
        &self,
        block: &Block<O>,
        layer: usize,
        h: O::Rows,
        rope: &O::Rope,
        seq: usize,
        tap: &mut dyn Tap,
    ) -> Result<O::Rows, LmError> {
        let attention = self.attention(block, layer, &h, rope, seq, tap)?;
        if self.spec.parallel {
            let mlp = self.mlp(block, layer, &h, tap)?;
            let h = self.ops.add(self.ops.add(h, &attention)?, &mlp)?;
            return self.tapped(tap, TapPoint::new(Site::Resid, layer), h);
        }
        let h = self.ops.add(h, &attention)?;
        let mlp = self.mlp(block, layer, &h, tap)?;
        let h = self.ops.add(h, &mlp)?;
        self.tapped(tap, TapPoint::new(Site::Resid, layer), h)
    }

    /// What attention adds to the residual stream.
    fn attention(
        &self,
        block: &Block<O>,
        layer: usize,
        h: &O::Rows,
        rope: &O::Rope,
        seq: usize,
        tap: &mut dyn Tap,
    ) -> Result<O::Rows, LmError> {
        let (ops, eps) = (&self.ops, self.spec.norm.eps);
        let x = self.norm(h, &block.pre_attention)?;
        let qkv = ops.linear(&x, &block.qkv.weight, block.qkv.bias.as_ref())?;
        let gains = block.query_gain.as_ref().zip(block.key_gain.as_ref());
        let qk_norm = gains.map(|(query, key)| QkNorm { query, key, eps });
        let mixed = ops.attention(&qkv, rope, qk_norm, &self.heads(layer), seq)?;
        let mixed = self.tapped(tap, TapPoint::new(Site::Attn, layer), mixed)?;
        let out = ops.linear(&mixed, &block.out.weight, block.out.bias.as_ref())?;
        self.post_norm(block.post_attention.as_ref(), out)
    }

    /// What the MLP adds to the residual stream.
    fn mlp(
        &self,
        block: &Block<O>,
        layer: usize,
        h: &O::Rows,
        tap: &mut dyn Tap,
    ) -> Result<O::Rows, LmError> {
        let x = self.mlp_input(block, TapPoint::new(Site::MlpIn, layer), h, tap)?;
        let [up, down] = [&block.up, &block.down].map(|linear| (&linear.weight, linear.bias.as_ref()));
        let out = self.ops.mlp(&x, up, down, &self.spec.mlp)?;
        let out = self.post_norm(block.post_mlp.as_ref(), out)?;
        self.tapped(tap, TapPoint::new(Site::Mlp, layer), out)
    }

    /// The pre-MLP norm, in two steps only for who looks between them.
    fn mlp_input(
        &self,
        block: &Block<O>,
        point: TapPoint,
        h: &O::Rows,
        tap: &mut dyn Tap,
    ) -> Result<O::Rows, LmError> {
        if !tap.wants(point) {
            return self.norm(h, &block.pre_mlp);
        }
        let bare = self.ops.norm(h, self.spec.norm.kind, self.spec.norm.eps, None)?;
        let bare = self.tapped(tap, point, bare)?;
        self.ops.affine(bare, block.pre_mlp.affine())
    }

    fn norm(&self, x: &O::Rows, norm: &Norm<O>) -> Result<O::Rows, LmError> {
        self.ops.norm(x, self.spec.norm.kind, self.spec.norm.eps, Some(norm.affine()))
    }

    fn post_norm(&self, norm: Option<&Norm<O>>, x: O::Rows) -> Result<O::Rows, LmError> {
        match norm {
            Some(norm) => self.norm(&x, norm),
            None => Ok(x),
        }
    }

    fn heads(&self, layer: usize) -> Heads {
        let attention = &self.spec.attention;
        Heads {
            n_heads: attention.n_heads,
            n_kv_heads: attention.n_kv_heads,
            head_dim: attention.head_dim,
            scale: attention.query_scale / if attention.scale_by_layer { (layer + 1) as f32 } else { 1.0 },
            softcap: attention.softcap,
            window: attention.windows.get(layer).copied().flatten(),
        }
    }

    fn tapped(&self, tap: &mut dyn Tap, point: TapPoint, value: O::Rows) -> Result<O::Rows, LmError> {
        if !tap.wants(point) {
            return Ok(value);
        }
        let (action, expected) =
            self.ops.read(&value, |rows| Ok((tap.visit(point, rows)?, rows.data().len())))?;
        match action {
            TapAction::Keep => Ok(value),
            TapAction::Replace(new) if new.len() == expected => {
                self.ops.upload(new, self.spec.site_width(point.site))
            }
            TapAction::Replace(new) => Err(LmError::Replacement { point, expected, found: new.len() }),
        }
    }

    /// Final norm, unembedding and soft-cap, in pieces of rows: `see(first_row, logits)`.
    fn unembed(&self, h: &O::Rows, n_rows: usize, see: impl FnMut(usize, Rows<'_>)) -> Result<(), LmError> {
        let x = self.norm(h, &self.final_norm)?;
        self.project(&x, n_rows, self.spec.final_softcap, see)
    }

    fn project(
        &self,
        x: &O::Rows,
        n_rows: usize,
        softcap: Option<f32>,
        mut see: impl FnMut(usize, Rows<'_>),
    ) -> Result<(), LmError> {
        let step = self.rows_at_once();
        for first in (0..n_rows).step_by(step) {
            let logits = self.logits(x, first, (first + step).min(n_rows), softcap)?;
            self.ops.read(&logits, |rows| {
                see(first, rows);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Rows whose logits are held at once.
    fn rows_at_once(&self) -> usize {
        (LOGITS_AT_ONCE / self.spec.vocab_size).max(1)
    }

    /// Logits of rows `first..end` of `x`.
    fn logits(
        &self,
        x: &O::Rows,
        first: usize,
        end: usize,
        softcap: Option<f32>,
    ) -> Result<O::Rows, LmError> {
        let unembedding = self.unembedding.as_ref().unwrap_or(&self.embedding);
        self.ops.logits(&self.ops.slice(x, first, end)?, unembedding, softcap)
    }
}
