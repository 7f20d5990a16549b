//! Llama 2 and 3, SmolLM2 and everything else that says `model_type: llama`: pre-norms, grouped queries, a
//! SiLU-gated MLP, plain RMS gains, optional biases, optionally stretched rotary frequencies. Mistral adds a window to
//! every layer, Qwen 2 biases to queries, keys and values, Qwen 3 norms to query and key heads.

use super::config::{Classic, Fields};
use super::gguf::Gguf;
use super::names::{self, Names};
use super::spec::{AttentionSpec, MlpActivation, MlpSpec, NormKind, NormSpec, RopeScaling, RopeSpec, Spec};
use super::weights::Blueprint;
use super::{LmError, TensorSource};

/// The members of the family.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

pub(super) fn from_config(fields: &Fields<'_>, kind: Kind) -> Result<Blueprint, LmError> {
    let n_layers = fields.n_layers("num_hidden_layers")?;
    let d_model = fields.required("hidden_size")?;
    let n_heads = fields.required("num_attention_heads")?;
    let default_head_dim = if kind == Kind::Qwen3 { 128 } else { d_model / n_heads };
    let head_dim = fields.count("head_dim")?.unwrap_or(default_head_dim);
    let (architecture, default_kv, default_context) = match kind {
        Kind::Llama => ("llama", n_heads, 2048),
        Kind::Mistral => ("mistral", 8, 131_072),
        Kind::Qwen2 => ("qwen2", 32, 32_768),
        Kind::Qwen3 => ("qwen3", 32, 32_768),
    };
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(default_context);
    let (qkv_bias, out_bias) = match kind {
        Kind::Llama | Kind::Qwen3 => {
            let bias = fields.flag("attention_bias")?.unwrap_or(false);
            (bias, bias)
        }
        Kind::Mistral => (false, false),
        Kind::Qwen2 => (true, false),
    };
    let mlp_bias = kind == Kind::Llama && fields.flag("mlp_bias")?.unwrap_or(false);
    let spec = Spec {
        architecture: architecture.to_owned(),
        n_layers,
        d_model,
        d_ff: fields.required("intermediate_size")?,
        vocab_size: fields.required("vocab_size")?,
        context_length,
        embed_scale: 1.0,
        learned_positions: false,
        parallel: false,
        norm: norms(fields.number("rms_norm_eps")?.unwrap_or(1e-6)),
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: kv_heads(fields, n_heads, default_kv)?,
            head_dim,
            query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: kind == Kind::Qwen3,
            softcap: None,
            windows: windows(fields, kind, n_layers)?,
            rope: fields.rope(&Classic::usual(10_000.0, head_dim, context_length))?,
            local_rope: None,
            qkv_bias,
            out_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_act", MlpActivation::Silu)?,
            gated: true,
            bias: mlp_bias,
        },
        final_softcap: None,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
    };
    let names = match kind {
        Kind::Qwen3 => Names { qk_norm: Some(["self_attn.q_norm", "self_attn.k_norm"]), ..names::LLAMA },
        _ => names::LLAMA,
    };
    Ok(Blueprint { spec, names, interleaved_rope: false })
}

/// Null means as many as query heads, absent the family's default.
fn kv_heads(fields: &Fields<'_>, n_heads: usize, default: usize) -> Result<usize, LmError> {
    if fields.is_null("num_key_value_heads") {
        return Ok(n_heads);
    }
    Ok(fields.count("num_key_value_heads")?.unwrap_or(default))
}

fn windows(fields: &Fields<'_>, kind: Kind, n_layers: usize) -> Result<Vec<Option<usize>>, LmError> {
    match kind {
        Kind::Llama => Ok(vec![None; n_layers]),
        Kind::Mistral => fields.windows(n_layers, fields.window(4096)?, |_| true),
        Kind::Qwen2 | Kind::Qwen3 => {
            let used = fields.flag("use_sliding_window")?.unwrap_or(false);
            let window = fields.window(4096)?.filter(|_| used);
            let first = fields.count("max_window_layers")?.unwrap_or(28);
            fields.windows(n_layers, window, |layer| layer >= first)
        }
    }
}

fn norms(eps: f64) -> NormSpec {
    NormSpec { kind: NormKind::Rms, eps: eps as f32, unit_offset: false, bias: false, post: false }
}

/// The model of a GGUF whose architecture is `llama`; `source` tells which optional tensors exist and holds
/// rotary factors.
pub(super) fn from_gguf(gguf: &Gguf, source: &mut dyn TensorSource) -> Result<Blueprint, LmError> {
    let n_layers = gguf.layers("llama.block_count")?;
    let d_model = gguf.count("llama.embedding_length")?;
    let n_heads = gguf.count("llama.attention.head_count")?;
    let head_dim = gguf.optional_count("llama.attention.key_length")?.unwrap_or(d_model / n_heads);
    if let Some(rotated) = gguf.optional_count("llama.rope.dimension_count")?
        && rotated != head_dim
    {
        let problem = format!("{rotated} of {head_dim} dimensions; only full rotation is supported");
        return Err(LmError::config("llama.rope.dimension_count", problem));
    }
    if gguf.optional_count("llama.expert_count")?.is_some() {
        return Err(LmError::config("llama.expert_count", "mixtures of experts are not supported"));
    }
    let base = gguf.number("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let has = |name: &str| source.shape(name).is_some();
    let (qkv_bias, out_bias) = (has("blk.0.attn_q.bias"), has("blk.0.attn_output.bias"));
    let (mlp_bias, tied) = (has("blk.0.ffn_gate.bias"), !has("output.weight"));
    let spec = Spec {
        architecture: "llama".to_owned(),
        n_layers,
        d_model,
        d_ff: gguf.count("llama.feed_forward_length")?,
        vocab_size: gguf.vocab_size("llama.vocab_size", source)?,
        context_length: gguf.optional_count("llama.context_length")?.unwrap_or(2048),
        embed_scale: 1.0,
        learned_positions: false,
        parallel: false,
        norm: norms(gguf.number("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5)),
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: gguf.optional_count("llama.attention.head_count_kv")?.unwrap_or(n_heads),
            head_dim,
            query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: false,
            softcap: None,
            windows: vec![None; n_layers],
            rope: RopeSpec { dim: head_dim, base, scaling: gguf_scaling(gguf, source, head_dim)? },
            local_rope: None,
            qkv_bias,
            out_bias,
        },
        mlp: MlpSpec { activation: MlpActivation::Silu, gated: true, bias: mlp_bias },
        final_softcap: None,
        tied_embeddings: tied,
    };
    Ok(Blueprint { spec, names: names::GGUF, interleaved_rope: true })
}

fn gguf_scaling(gguf: &Gguf, source: &mut dyn TensorSource, head_dim: usize) -> Result<RopeScaling, LmError> {
    const FACTORS: &str = "rope_freqs.weight";
    if let Some(found) = source.shape(FACTORS) {
        let expected = vec![head_dim / 2];
        if found != expected {
            return Err(LmError::TensorShape { name: FACTORS.to_owned(), expected, found });
        }
        let mut factors = vec![0f32; head_dim / 2];
        source.read(FACTORS, &mut factors)?;
        return Ok(RopeScaling::Factors { factors });
    }
    match gguf.text("llama.rope.scaling.type") {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => match gguf.number("llama.rope.scaling.factor")? {
            Some(factor) => Ok(RopeScaling::Linear { factor }),
            None => Err(LmError::config("llama.rope.scaling.factor", "missing")),
        },
        Some(other) => {
            let problem = format!("`{other}`; supported are none, linear and rope_freqs");
            Err(LmError::config("llama.rope.scaling.type", problem))
        }
    }
}
