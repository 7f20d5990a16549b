//! Gemma 2: norms before and after both halves of a block with gain `1 + w`, scaled embeddings, soft-capped
//! attention and logits, a sliding window on even layers, a tanh-GELU gate, a query scale of its own.

use super::LmError;
use super::config::{Fields, LLAMA_NAMES};
use super::spec::{AttentionSpec, GateActivation, MlpSpec, NormSpec, Spec};
use super::weights::{Blueprint, Names};

const NAMES: Names = Names {
    post_attention: Some("post_attention_layernorm"),
    pre_mlp: "pre_feedforward_layernorm",
    post_mlp: Some("post_feedforward_layernorm"),
    ..LLAMA_NAMES
};

pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    if fields.flag("use_bidirectional_attention")? == Some(true) {
        return Err(LmError::config(
            "use_bidirectional_attention",
            "true; only causal attention is supported",
        ));
    }
    let n_layers = fields.n_layers()?;
    let d_model = fields.required("hidden_size")?;
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(8192);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let query_scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    let spec = Spec {
        architecture: "gemma2".to_owned(),
        n_layers,
        d_model,
        d_ff: fields.required("intermediate_size")?,
        vocab_size: fields.required("vocab_size")?,
        context_length,
        embed_scale: (d_model as f64).sqrt() as f32,
        norm: NormSpec {
            eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            unit_offset: true,
            post: true,
        },
        attention: AttentionSpec {
            n_heads: fields.required("num_attention_heads")?,
            n_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(4),
            head_dim: fields.count("head_dim")?.unwrap_or(256),
            query_scale: (1.0 / query_scalar.sqrt()) as f32,
            softcap: fields.softcap("attn_logit_softcapping", 50.0)?,
            windows: windows(fields, n_layers)?,
            rope: fields.rope(context_length)?,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_activation", GateActivation::GeluTanh)?,
            bias: false,
        },
        final_softcap: fields.softcap("final_logit_softcapping", 30.0)?,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
    };
    Ok(Blueprint { spec, names: NAMES, interleaved_rope: false })
}

/// Even layers slide unless `layer_types` says otherwise.
fn windows(fields: &Fields<'_>, n_layers: usize) -> Result<Vec<Option<usize>>, LmError> {
    let window =
        if fields.is_null("sliding_window") { None } else { fields.count("sliding_window")?.or(Some(4096)) };
    let sliding = match fields.sliding_layers(n_layers)? {
        Some(sliding) => sliding,
        None => (0..n_layers).map(|layer| layer % 2 == 0).collect(),
    };
    Ok(sliding.into_iter().map(|slides| if slides { window } else { None }).collect())
}
