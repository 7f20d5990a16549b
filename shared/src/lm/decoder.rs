//! The decoder, written once: what a transformer computes, where it is tapped, when it stops.

use crate::Rows;
use crate::tap::{Site, TapPoint};

use super::candle::CandleOps;
use super::ops::{Heads, Ops};
use super::tokens::token_nll;
use super::{LmError, NoTap, Spec, Tap, TapAction, TokenBatch, Until};

/// Logits held at once while losses are taken.
const LOGITS_AT_ONCE: usize = 1 << 23;

/// A language model that runs on the CPU (or in wasm) through candle.
pub type LanguageModel = Decoder<CandleOps>;

/// A decoder-only transformer over the arithmetic `O`.
pub struct Decoder<O: Ops> {
    pub(super) ops: O,
    pub(super) spec: Spec,
    pub(super) inverse_frequencies: Vec<f32>,
    pub(super) embedding: O::Matrix,
    pub(super) blocks: Vec<Block<O>>,
    pub(super) final_gain: Vec<f32>,
    pub(super) final_norm: O::Vector,
    /// `None` when the unembedding is the embedding table.
    pub(super) unembedding: Option<O::Matrix>,
}

/// One block's weights; queries, keys and values in one matrix, gate and up in one.
pub(super) struct Block<O: Ops> {
    pub(super) pre_attention: O::Vector,
    pub(super) qkv: Linear<O>,
    pub(super) out: Linear<O>,
    pub(super) post_attention: Option<O::Vector>,
    pub(super) pre_mlp: O::Vector,
    pub(super) gate_up: Linear<O>,
    pub(super) down: Linear<O>,
    pub(super) post_mlp: Option<O::Vector>,
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
        let (ids, seq) = (tokens.ids(), tokens.seq());
        let mut losses = Vec::with_capacity(tokens.batch() * (seq - 1));
        self.unembed(&h, tokens.n_tokens(), |first, rows| {
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

    /// Direct effect of residual directions on the logits: rows `[m, d_model]` times the final norm's gain, times
    /// the unembedding, `[m, vocab]`. The norm's division and the soft-cap, which depend on the rest of the
    /// residual stream, are left out.
    ///
    /// # Errors
    /// If the rows are not `d_model` wide.
    pub fn direct_logits(&self, directions: Rows<'_>) -> Result<Vec<f32>, LmError> {
        directions.expect_width("directions", self.spec.d_model)?;
        let scaled = directions.iter().flat_map(|row| row.iter().zip(&self.final_gain).map(|(x, g)| x * g));
        let mut logits = Vec::with_capacity(directions.n_rows() * self.spec.vocab_size);
        if directions.n_rows() > 0 {
            let rows = self.ops.upload(scaled.collect(), self.spec.d_model)?;
            self.project(&rows, directions.n_rows(), None, |_, rows| logits.extend_from_slice(rows.data()))?;
        }
        Ok(logits)
    }

    /// The residual stream after block `last`.
    fn blocks(&self, tokens: TokenBatch<'_>, tap: &mut dyn Tap, last: usize) -> Result<O::Rows, LmError> {
        let vocab_size = self.spec.vocab_size;
        if let Some(position) = tokens.ids().iter().position(|&id| id as usize >= vocab_size) {
            return Err(LmError::TokenId { id: tokens.ids()[position], position, vocab_size });
        }
        let rope = self.ops.rope(&self.inverse_frequencies, tokens.seq())?;
        let h = self.ops.embed(&self.embedding, tokens.ids(), self.spec.embed_scale)?;
        let mut h = self.tapped(tap, TapPoint::new(Site::Embed, 0), h)?;
        for (layer, block) in self.blocks.iter().enumerate().take(last + 1) {
            h = self.block(block, layer, h, &rope, tokens.seq(), tap)?;
        }
        Ok(h)
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
        let (ops, eps) = (&self.ops, self.spec.norm.eps);
        let x = ops.norm(&h, &block.pre_attention, eps)?;
        let qkv = ops.linear(&x, &block.qkv.weight, block.qkv.bias.as_ref())?;
        let mixed = ops.attention(&qkv, rope, &self.heads(layer), seq)?;
        let mixed = self.tapped(tap, TapPoint::new(Site::Attn, layer), mixed)?;
        let attention = ops.linear(&mixed, &block.out.weight, block.out.bias.as_ref())?;
        let attention = self.post_norm(block.post_attention.as_ref(), attention)?;
        let h = ops.add(h, &attention)?;
        let x = ops.norm(&h, &block.pre_mlp, eps)?;
        let gate_up = ops.linear(&x, &block.gate_up.weight, block.gate_up.bias.as_ref())?;
        let inner = ops.gated(&gate_up, self.spec.mlp.activation)?;
        let mlp = ops.linear(&inner, &block.down.weight, block.down.bias.as_ref())?;
        let mlp = self.post_norm(block.post_mlp.as_ref(), mlp)?;
        let mlp = self.tapped(tap, TapPoint::new(Site::Mlp, layer), mlp)?;
        let h = ops.add(h, &mlp)?;
        self.tapped(tap, TapPoint::new(Site::Resid, layer), h)
    }

    fn post_norm(&self, gain: Option<&O::Vector>, x: O::Rows) -> Result<O::Rows, LmError> {
        match gain {
            Some(gain) => self.ops.norm(&x, gain, self.spec.norm.eps),
            None => Ok(x),
        }
    }

    fn heads(&self, layer: usize) -> Heads {
        let attention = &self.spec.attention;
        Heads {
            n_heads: attention.n_heads,
            n_kv_heads: attention.n_kv_heads,
            head_dim: attention.head_dim,
            scale: attention.query_scale,
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
        let x = self.ops.norm(h, &self.final_norm, self.spec.norm.eps)?;
        self.project(&x, n_rows, self.spec.final_softcap, see)
    }

    fn project(
        &self,
        x: &O::Rows,
        n_rows: usize,
        softcap: Option<f32>,
        mut see: impl FnMut(usize, Rows<'_>),
    ) -> Result<(), LmError> {
        let unembedding = self.unembedding.as_ref().unwrap_or(&self.embedding);
        let step = (LOGITS_AT_ONCE / self.spec.vocab_size).max(1);
        for first in (0..n_rows).step_by(step) {
            let rows = self.ops.slice(x, first, (first + step).min(n_rows))?;
            let logits = self.ops.logits(&rows, unembedding, softcap)?;
            self.ops.read(&logits, |rows| {
                see(first, rows);
                Ok(())
            })?;
        }
        Ok(())
    }
}
