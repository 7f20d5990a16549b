//! Llama 2 and 3, SmolLM2 and everything else that says `model_type: llama`: pre-norms, grouped queries, a
//! SiLU-gated MLP, plain RMS gains, optional biases, optionally stretched rotary frequencies.

use super::config::{Fields, LLAMA_NAMES};
use super::gguf::Gguf;
use super::spec::{AttentionSpec, GateActivation, MlpSpec, NormSpec, RopeScaling, RopeSpec, Spec};
use super::weights::{Blueprint, Names};
use super::{LmError, TensorSource};

const GGUF_NAMES: Names = Names {
    embedding: "token_embd.weight",
    final_norm: "output_norm.weight",
    unembedding: "output.weight",
    block: "blk.",
    pre_attention: "attn_norm",
    post_attention: None,
    pre_mlp: "ffn_norm",
    post_mlp: None,
    qkv: ["attn_q", "attn_k", "attn_v"],
    out: "attn_output",
    gate_up: ["ffn_gate", "ffn_up"],
    down: "ffn_down",
    ignored: &["rope_freqs.weight"],
};

pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    let n_layers = fields.n_layers()?;
    let d_model = fields.required("hidden_size")?;
    let n_heads = fields.required("num_attention_heads")?;
    let head_dim = fields.count("head_dim")?.unwrap_or(d_model / n_heads);
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(2048);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let spec = Spec {
        architecture: "llama".to_owned(),
        n_layers,
        d_model,
        d_ff: fields.required("intermediate_size")?,
        vocab_size: fields.required("vocab_size")?,
        context_length,
        embed_scale: 1.0,
        norm: NormSpec {
            eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            unit_offset: false,
            post: false,
        },
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim,
            query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            softcap: None,
            windows: vec![None; n_layers],
            rope: fields.rope(context_length)?,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_act", GateActivation::Silu)?,
            bias: fields.flag("mlp_bias")?.unwrap_or(false),
        },
        final_softcap: None,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
    };
    Ok(Blueprint { spec, names: LLAMA_NAMES, interleaved_rope: false })
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
    let vocab_size = match (gguf.optional_count("llama.vocab_size")?, source.shape("token_embd.weight")) {
        (Some(n), _) => n,
        (None, Some(shape)) => shape.first().copied().unwrap_or(0),
        (None, None) => gguf.count("llama.vocab_size")?,
    };
    let spec = Spec {
        architecture: "llama".to_owned(),
        n_layers,
        d_model,
        d_ff: gguf.count("llama.feed_forward_length")?,
        vocab_size,
        context_length: gguf.optional_count("llama.context_length")?.unwrap_or(2048),
        embed_scale: 1.0,
        norm: NormSpec {
            eps: gguf.number("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5) as f32,
            unit_offset: false,
            post: false,
        },
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: gguf.optional_count("llama.attention.head_count_kv")?.unwrap_or(n_heads),
            head_dim,
            query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            softcap: None,
            windows: vec![None; n_layers],
            rope: RopeSpec { base, scaling: gguf_scaling(gguf, source, head_dim)? },
            qkv_bias,
            out_bias,
        },
        mlp: MlpSpec { activation: GateActivation::Silu, bias: mlp_bias },
        final_softcap: None,
        tied_embeddings: tied,
    };
    Ok(Blueprint { spec, names: GGUF_NAMES, interleaved_rope: true })
}

fn gguf_scaling(gguf: &Gguf, source: &mut dyn TensorSource, head_dim: usize) -> Result<RopeScaling, LmError> {
    const FACTORS: &str = "rope_freqs.weight";
    if let Some(found) = source.shape(FACTORS) {
        let expected = vec![head_dim / 2];
        if found != expected {
            return Err(LmError::TensorShape { name: FACTORS.to_owned(), expected, found });
        }
        return Ok(RopeScaling::Factors { factors: source.read(FACTORS)? });
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
