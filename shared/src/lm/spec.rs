//! What a decoder is, as plain data: everything in which the supported families differ.
//! A family file maps its configuration onto a [`Spec`]; the decoder reads nothing else.

use serde::{Deserialize, Serialize};

use super::LmError;
use crate::ShapeError;
use crate::tap::Site;

/// A decoder-only transformer as data. Built and checked by a family file; lengths in values, layers 0-indexed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The architecture's name as the model's own files spell it: `llama`, `gemma2`, `gpt_neox`.
    pub architecture: String,
    /// The number of blocks.
    pub n_layers: usize,
    /// The width of the residual stream.
    pub d_model: usize,
    /// The inner width of the MLP.
    pub d_ff: usize,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The longest sequence the model was made for.
    pub context_length: usize,
    /// Factor on embedding rows (√d_model for Gemma, else 1).
    pub embed_scale: f32,
    /// Whether a learned vector of its position, one of `context_length`, is added to every token's embedding.
    pub learned_positions: bool,
    /// Whether attention and MLP read the same residual stream, and both outputs are added to it at the end.
    pub parallel: bool,
    /// Normalisation.
    pub norm: NormSpec,
    /// Self-attention.
    pub attention: AttentionSpec,
    /// The MLP.
    pub mlp: MlpSpec,
    /// Soft-cap on the logits: `cap · tanh(logit / cap)`.
    pub final_softcap: Option<f32>,
    /// Whether the unembedding is the embedding table.
    pub tied_embeddings: bool,
}

/// Normalisation `y = normalise(x) · gain + bias`; the loader folds Gemma's `1 + w` into the gain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NormSpec {
    /// What is divided by what.
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether files store `gain − 1`.
    pub unit_offset: bool,
    /// Whether norms add a bias.
    pub bias: bool,
    /// Whether attention and MLP outputs are normalised before they are added to the residual stream.
    pub post: bool,
}

/// How a vector is normalised, before gain and bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / √(mean x² + eps)`.
    Rms,
    /// `(x − mean x) / √(mean (x − mean x)² + eps)`.
    Layer,
}

/// Self-attention with grouped queries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// The number of query heads.
    pub n_heads: usize,
    /// The number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// The width of a head (not necessarily `d_model / n_heads`).
    pub head_dim: usize,
    /// Factor on query·key products.
    pub query_scale: f32,
    /// Whether layer `l` further divides query·key products by `l + 1`.
    pub scale_by_layer: bool,
    /// Whether every query and key head is RMS-normalised, with a gain, before the rotary embedding.
    pub qk_norm: bool,
    /// Soft-cap on scaled products, applied before the mask: `cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// Per layer: `None` sees every earlier token, `Some(w)` only keys with `key > query − w`.
    pub windows: Vec<Option<usize>>,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// The rotary embedding of layers with a window, where it is another one.
    pub local_rope: Option<RopeSpec>,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
}

/// Rotary position embedding of a head's first `dim` values, half-split pairing `(i, i + dim / 2)`: the angle of pair
/// `i` at position `p` is `p · inv_freq[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// How many values of a head are turned; even, at most the head's width, 0 for no rotary embedding.
    pub dim: usize,
    /// The base: `inv_freq[i] = base^(−2i / dim)` before scaling.
    pub base: f64,
    /// How frequencies were stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies differ from the plain geometric series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_context: f64,
    },
    /// Frequency `i` divided by `factors[i]` (how GGUF files store Llama 3's scaling), `dim / 2` values.
    Factors {
        /// The divisors.
        factors: Vec<f32>,
    },
}

/// The MLP: `down(act(gate · x) ∘ (up · x))` when gated, else `down(act(up · x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MlpSpec {
    /// The activation.
    pub activation: MlpActivation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Whether the projections have biases.
    pub bias: bool,
}

/// The activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpActivation {
    /// `x · σ(x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))`.
    GeluTanh,
    /// `x · Φ(x)` with the exact error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl Spec {
    /// The width of vectors at `site`.
    #[must_use]
    pub fn site_width(&self, site: Site) -> usize {
        match site {
            Site::Embed | Site::Resid | Site::Mlp | Site::MlpIn => self.d_model,
            Site::Attn => self.attention.n_heads * self.attention.head_dim,
        }
    }

    /// `Ok` when the numbers fit each other, so that building and running the decoder cannot fail on them.
    ///
    /// # Errors
    /// Names the field that does not fit.
    pub(super) fn check(&self) -> Result<(), LmError> {
        let attention = &self.attention;
        let positive = [
            ("number of layers", self.n_layers),
            ("model width", self.d_model),
            ("MLP width", self.d_ff),
            ("vocabulary size", self.vocab_size),
            ("attention heads", attention.n_heads),
            ("key/value heads", attention.n_kv_heads),
            ("head width", attention.head_dim),
        ];
        for (dimension, value) in positive {
            if value == 0 {
                return Err(ShapeError::Dimension { name: "model", dimension, value }.into());
            }
        }
        if !attention.n_heads.is_multiple_of(attention.n_kv_heads) {
            let problem = format!(
                "{} heads are not a multiple of {} key/value heads",
                attention.n_heads, attention.n_kv_heads
            );
            return Err(LmError::config("key/value heads", problem));
        }
        for rope in std::iter::once(&attention.rope).chain(&attention.local_rope) {
            if !rope.dim.is_multiple_of(2) || rope.dim > attention.head_dim {
                let (dim, width) = (rope.dim, attention.head_dim);
                let problem = format!("rotary embedding turns pairs, not {dim} values of heads of {width}");
                return Err(LmError::config("head_dim", problem));
            }
        }
        if attention.windows.len() != self.n_layers {
            let problem = format!("{} entries for {} layers", attention.windows.len(), self.n_layers);
            return Err(LmError::config("layer_types", problem));
        }
        if attention.windows.contains(&Some(0)) {
            return Err(LmError::config("sliding_window", "0, expected at least 1"));
        }
        Ok(())
    }
}

impl RopeSpec {
    /// No rotary embedding.
    pub(super) const NONE: Self = Self { dim: 0, base: 1.0, scaling: RopeScaling::None };

    /// `inv_freq`, `dim / 2` values.
    #[must_use]
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.dim / 2)
            .map(|i| {
                // Powers and quotients in f32, in the order the reference implementations take them: positions
                // multiply these numbers by up to the context length, so the rounding here is part of the model.
                let plain = 1.0 / (self.base as f32).powf((2 * i) as f32 / self.dim as f32);
                self.scaling.apply(plain, i)
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(&self, plain: f32, i: usize) -> f32 {
        match self {
            Self::None => plain,
            Self::Linear { factor } => plain / *factor as f32,
            Self::Factors { factors } => plain / factors.get(i).copied().unwrap_or(1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = 2.0 * std::f32::consts::PI / plain;
                let (low, high) = (original_context / low_freq_factor, original_context / high_freq_factor);
                if f64::from(wavelength) > low {
                    plain / *factor as f32
                } else if f64::from(wavelength) < high {
                    plain
                } else {
                    let blend = (original_context / f64::from(wavelength) - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    let (kept, divided) =
                        (blend as f32 * plain, (1.0 - blend) as f32 * (plain / *factor as f32));
                    kept + divided
                }
            }
        }
    }
}
