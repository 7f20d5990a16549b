//! Gemma 2: norms before and after both halves of a block with gain `1 + w`, scaled embeddings, soft-capped
//! attention and logits, a sliding window on even layers, a tanh-GELU gate, a query scale of its own.

use super::config::{Classic, Fields};
use super::gguf::Gguf;
use super::names::{self, Names};
use super::spec::{AttentionSpec, MlpActivation, MlpSpec, NormKind, NormSpec, RopeScaling, RopeSpec, Spec};
use super::weights::Blueprint;
use super::{LmError, TensorSource};

pub(super) const NAMES: Names = Names {
    post_attention: Some("post_attention_layernorm"),
    pre_mlp: "pre_feedforward_layernorm",
    post_mlp: Some("post_feedforward_layernorm"),
    ..names::LLAMA
};

pub(super) const GGUF_NAMES: Names =
    Names { post_attention: Some("post_attention_norm"), post_mlp: Some("post_ffw_norm"), ..names::GGUF };

/// What Gemma's norms have in common; GGUF files hold gains with the one already added.
pub(super) fn norms(eps: f64, unit_offset: bool) -> NormSpec {
    NormSpec { kind: NormKind::Rms, eps: eps as f32, unit_offset, bias: false, post: true }
}

pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    fields.refuse("use_bidirectional_attention", "only causal attention is supported")?;
    let n_layers = fields.n_layers("num_hidden_layers")?;
    let d_model = fields.required("hidden_size")?;
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(8192);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let head_dim = fields.count("head_dim")?.unwrap_or(256);
    let query_scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    let spec = Spec {
        architecture: "gemma2".to_owned(),
        n_layers,
        d_model,
        d_ff: fields.required("intermediate_size")?,
        vocab_size: fields.required("vocab_size")?,
        context_length,
        embed_scale: (d_model as f64).sqrt() as f32,
        learned_positions: false,
        parallel: false,
        norm: norms(fields.number("rms_norm_eps")?.unwrap_or(1e-6), true),
        attention: AttentionSpec {
            n_heads: fields.required("num_attention_heads")?,
            n_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(4),
            head_dim,
            query_scale: (1.0 / query_scalar.sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: false,
            softcap: fields.softcap("attn_logit_softcapping", Some(50.0))?,
            windows: fields.windows(n_layers, fields.window(4096)?, |layer| layer % 2 == 0)?,
            rope: fields.rope(&Classic::usual(10_000.0, head_dim, context_length))?,
            local_rope: None,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_activation", MlpActivation::GeluTanh)?,
            gated: true,
            bias: false,
        },
        final_softcap: fields.softcap("final_logit_softcapping", Some(30.0))?,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
    };
    Ok(Blueprint { spec, names: NAMES, interleaved_rope: false })
}

/// The model of a GGUF whose architecture is `gemma2`.
pub(super) fn from_gguf(gguf: &Gguf, source: &dyn TensorSource) -> Result<Blueprint, LmError> {
    // The files do not say which query scale a model was made with; of the three sizes only 27B, known by its 46
    // layers, divides by the model's width per head and not by the head's own.
    let mut blueprint = gguf_common(gguf, source, "gemma2", 46)?;
    let attention = &mut blueprint.spec.attention;
    attention.softcap = Some(gguf.number("gemma2.attn_logit_softcapping")?.unwrap_or(50.0) as f32);
    blueprint.spec.final_softcap =
        Some(gguf.number("gemma2.final_logit_softcapping")?.unwrap_or(30.0) as f32);
    let window = Some(gguf.optional_count("gemma2.attention.sliding_window")?.unwrap_or(4096));
    attention.windows = (0..blueprint.spec.n_layers).map(|layer| window.filter(|_| layer % 2 == 0)).collect();
    Ok(blueprint)
}

/// What the GGUF files of Gemma 2 and 3 say alike; `wide_scale` is the number of layers of the size whose query scale
/// comes from the model's width.
pub(super) fn gguf_common(
    gguf: &Gguf,
    source: &dyn TensorSource,
    architecture: &str,
    wide_scale: usize,
) -> Result<Blueprint, LmError> {
    let key = |name: &str| format!("{architecture}.{name}");
    let n_layers = gguf.layers(&key("block_count"))?;
    let d_model = gguf.count(&key("embedding_length"))?;
    let n_heads = gguf.count(&key("attention.head_count"))?;
    let head_dim = gguf.optional_count(&key("attention.key_length"))?.unwrap_or(256);
    if gguf.optional_count(&key("attention.value_length"))?.is_some_and(|width| width != head_dim) {
        let problem = "another width than attention.key_length is not supported";
        return Err(LmError::config(key("attention.value_length"), problem));
    }
    let divisor = if n_layers == wide_scale { d_model as f64 / n_heads as f64 } else { head_dim as f64 };
    let spec = Spec {
        architecture: architecture.to_owned(),
        n_layers,
        d_model,
        d_ff: gguf.count(&key("feed_forward_length"))?,
        vocab_size: gguf.vocab_size(&key("vocab_size"), source)?,
        context_length: gguf.optional_count(&key("context_length"))?.unwrap_or(8192),
        embed_scale: (d_model as f64).sqrt() as f32,
        learned_positions: false,
        parallel: false,
        norm: norms(gguf.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6), false),
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: gguf.optional_count(&key("attention.head_count_kv"))?.unwrap_or(n_heads),
            head_dim,
            query_scale: (1.0 / divisor.sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: false,
            softcap: None,
            windows: vec![None; n_layers],
            rope: RopeSpec {
                dim: head_dim,
                base: gguf.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
                scaling: match gguf.text(&key("rope.scaling.type")) {
                    None | Some("none") => RopeScaling::None,
                    Some("linear") => match gguf.number(&key("rope.scaling.factor"))? {
                        Some(factor) => RopeScaling::Linear { factor },
                        None => return Err(LmError::config(key("rope.scaling.factor"), "missing")),
                    },
                    Some(other) => {
                        let problem = format!("`{other}`; supported are none and linear");
                        return Err(LmError::config(key("rope.scaling.type"), problem));
                    }
                },
            },
            local_rope: None,
            qkv_bias: false,
            out_bias: false,
        },
        mlp: MlpSpec { activation: MlpActivation::GeluTanh, gated: true, bias: false },
        final_softcap: None,
        tied_embeddings: source.shape("output.weight").is_none(),
    };
    Ok(Blueprint { spec, names: GGUF_NAMES, interleaved_rope: false })
}
