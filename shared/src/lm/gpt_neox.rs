//! GPT-NeoX, which is what Pythia is: layer norms with biases, attention and MLP side by side (or not), heads whose
//! first values alone are turned, queries, keys and values interleaved in one matrix, an untied head.

use super::LmError;
use super::config::{Classic, Fields};
use super::names::{self, Names, Qkv};
use super::spec::{AttentionSpec, MlpActivation, MlpSpec, NormKind, NormSpec, Spec};
use super::weights::Blueprint;

const NAMES: Names = Names {
    spellings: &[
        ("gpt_neox.", "embed_out.weight"),
        ("gpt_neox.", "lm_head.weight"),
        ("", "embed_out.weight"),
    ],
    embedding: "embed_in.weight",
    final_norm: "final_layer_norm",
    qkv: Qkv::HeadByHead("attention.query_key_value"),
    out: "attention.dense",
    up: &["mlp.dense_h_to_4h"],
    down: "mlp.dense_4h_to_h",
    // Older files carry the mask and the frequencies.
    ignored: &["attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"],
    ..names::LLAMA
};

pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    let n_layers = fields.n_layers("num_hidden_layers")?;
    let d_model = fields.required("hidden_size")?;
    let n_heads = fields.required("num_attention_heads")?;
    let head_dim = d_model / n_heads;
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(2048);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(true);
    let classic = Classic {
        base: "rotary_emb_base",
        share: "rotary_pct",
        default_share: 0.25,
        partial: true,
        ..Classic::usual(10_000.0, head_dim, context_length)
    };
    let spec = Spec {
        architecture: "gpt_neox".to_owned(),
        n_layers,
        d_model,
        d_ff: fields.count("intermediate_size")?.unwrap_or(24_576),
        vocab_size: fields.count("vocab_size")?.unwrap_or(50_432),
        context_length,
        embed_scale: 1.0,
        learned_positions: false,
        parallel: fields.flag("use_parallel_residual")?.unwrap_or(true),
        norm: NormSpec {
            kind: NormKind::Layer,
            eps: fields.number("layer_norm_eps")?.unwrap_or(1e-5) as f32,
            unit_offset: false,
            bias: true,
            post: false,
        },
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: n_heads,
            head_dim,
            query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: false,
            softcap: None,
            windows: vec![None; n_layers],
            rope: fields.rope(&classic)?,
            local_rope: None,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_act", MlpActivation::Gelu)?,
            gated: false,
            bias: true,
        },
        final_softcap: None,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
    };
    Ok(Blueprint { spec, names: NAMES, interleaved_rope: false })
}
