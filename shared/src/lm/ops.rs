//! The seam between the decoder and the arithmetic it runs on: a few fused blocks over rows.
//!
//! A backend enqueues blocks; only [`Ops::read`] waits for a result.

use crate::Rows;

use super::{LmError, MlpActivation, MlpSpec, NormKind, Parallel};

/// The geometry of one attention block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// The number of query heads.
    pub n_heads: usize,
    /// The number of key and value heads.
    pub n_kv_heads: usize,
    /// The width of a head.
    pub head_dim: usize,
    /// Factor on query·key products.
    pub scale: f32,
    /// `cap · tanh(s / cap)` on scaled products, before the mask.
    pub softcap: Option<f32>,
    /// Only keys with `key > query − window` are seen.
    pub window: Option<usize>,
}

impl Heads {
    /// The width of concatenated queries, keys and values: `(n_heads + 2 n_kv_heads) · head_dim`.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// The range of keys the query at position `t` sees.
    #[must_use]
    pub fn visible(&self, t: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |window| (t + 1).saturating_sub(window));
        first..t + 1
    }
}

/// What follows a normalisation: `· gain + bias`.
#[derive(Debug)]
pub struct Affine<'a, V> {
    /// The factor of every value.
    pub gain: &'a V,
    /// What is added to every value.
    pub bias: Option<&'a V>,
}

/// RMS normalisation of every query and key head, before the rotary embedding.
#[derive(Debug)]
pub struct QkNorm<'a, V> {
    /// The gain of query heads, `head_dim` values.
    pub query: &'a V,
    /// The gain of key heads, `head_dim` values.
    pub key: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// A weight matrix and its bias, if it has one.
pub type Projection<'a, O> = (&'a <O as Ops>::Matrix, Option<&'a <O as Ops>::Vector>);

/// The building blocks of a decoder. Activations are rows `[n, width]`; matrices are `[out, in]`, row-major.
pub trait Ops {
    /// Rows of activations.
    type Rows;
    /// A weight matrix, laid out as the backend likes it.
    type Matrix;
    /// A weight vector.
    type Vector;
    /// Cosines and sines of the rotary embedding for a sequence length.
    type Rope;

    /// Takes a weight matrix `[out, in]`.
    ///
    /// # Errors
    /// If the backend cannot hold it.
    fn matrix(&self, data: Vec<f32>, n_out: usize, n_in: usize) -> Result<Self::Matrix, LmError>;

    /// Takes a weight vector.
    ///
    /// # Errors
    /// If the backend cannot hold it.
    fn vector(&self, data: Vec<f32>) -> Result<Self::Vector, LmError>;

    /// Takes rows from the host.
    ///
    /// # Errors
    /// If `data` does not fill rows of `width`, or the backend cannot hold them.
    fn upload(&self, data: Vec<f32>, width: usize) -> Result<Self::Rows, LmError>;

    /// Prepares the rotary embedding: angle `position · inverse_frequencies[i]` for positions `0..seq`. It turns the
    /// first `2 · inverse_frequencies.len()` values of a head, so without frequencies it does nothing.
    ///
    /// # Errors
    /// If the backend cannot hold it.
    fn rope(&self, inverse_frequencies: &[f32], seq: usize) -> Result<Self::Rope, LmError>;

    /// Rows `ids` of `table`, times `scale`. Ids are below the table's height.
    ///
    /// # Errors
    /// The backend's own.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], scale: f32) -> Result<Self::Rows, LmError>;

    /// Normalised rows, with gain and bias when `affine` is given.
    ///
    /// # Errors
    /// The backend's own.
    fn norm(
        &self,
        x: &Self::Rows,
        kind: NormKind,
        eps: f32,
        affine: Option<Affine<'_, Self::Vector>>,
    ) -> Result<Self::Rows, LmError>;

    /// `x · gain + bias`, taking `x`'s place.
    ///
    /// # Errors
    /// The backend's own.
    fn affine(&self, x: Self::Rows, affine: Affine<'_, Self::Vector>) -> Result<Self::Rows, LmError>;

    /// `x Wᵀ + bias`.
    ///
    /// # Errors
    /// The backend's own.
    fn linear(
        &self,
        x: &Self::Rows,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
    ) -> Result<Self::Rows, LmError>;

    /// Causal self-attention within sequences of `seq` rows, from concatenated query, key and value heads
    /// `[n, qkv_width]`: QK-norm, rotary embedding, scale, soft-cap, mask, softmax, weighted sum. Returns concatenated
    /// heads.
    ///
    /// # Errors
    /// The backend's own.
    fn attention(
        &self,
        qkv: &Self::Rows,
        rope: &Self::Rope,
        qk_norm: Option<QkNorm<'_, Self::Vector>>,
        heads: &Heads,
        seq: usize,
    ) -> Result<Self::Rows, LmError>;

    /// `act(gate) ∘ up` from concatenated gate and up halves `[n, 2 d_ff]`.
    ///
    /// # Errors
    /// The backend's own.
    fn gated(&self, gate_up: &Self::Rows, activation: MlpActivation) -> Result<Self::Rows, LmError>;

    /// `act(x)`, taking `x`'s place.
    ///
    /// # Errors
    /// The backend's own.
    fn activate(&self, x: Self::Rows, activation: MlpActivation) -> Result<Self::Rows, LmError>;

    /// A whole MLP: up (and gate), activation, down. Backends that keep what lies between in cache do it in one.
    ///
    /// # Errors
    /// The backend's own.
    fn mlp(
        &self,
        x: &Self::Rows,
        up: Projection<'_, Self>,
        down: Projection<'_, Self>,
        mlp: &MlpSpec,
    ) -> Result<Self::Rows, LmError> {
        let up = self.linear(x, up.0, up.1)?;
        let inner =
            if mlp.gated { self.gated(&up, mlp.activation)? } else { self.activate(up, mlp.activation)? };
        self.linear(&inner, down.0, down.1)
    }

    /// `x + y`, taking `x`'s place.
    ///
    /// # Errors
    /// The backend's own.
    fn add(&self, x: Self::Rows, y: &Self::Rows) -> Result<Self::Rows, LmError>;

    /// Rows `start..end`.
    ///
    /// # Errors
    /// The backend's own.
    fn slice(&self, x: &Self::Rows, start: usize, end: usize) -> Result<Self::Rows, LmError>;

    /// `cap · tanh((x Eᵀ) / cap)` for the unembedding `E` `[vocab, d_model]`.
    ///
    /// # Errors
    /// The backend's own.
    fn logits(
        &self,
        x: &Self::Rows,
        unembedding: &Self::Matrix,
        softcap: Option<f32>,
    ) -> Result<Self::Rows, LmError>;

    /// What loops over values on the host run through.
    fn parallel(&self) -> &dyn Parallel;

    /// Waits for `x` and shows it to `see`.
    ///
    /// # Errors
    /// What `see` reports, or the backend's own.
    fn read<T>(&self, x: &Self::Rows, see: impl FnOnce(Rows<'_>) -> Result<T, LmError>)
    -> Result<T, LmError>;
}
