//! GPT-2 and nanoGPT: learned positions, layer norms, a plain MLP, queries, keys and values stacked in one matrix.
//! They differ in how matrices are stored, in which biases there are, and in the GELU.

use super::LmError;
use super::config::Fields;
use super::names::{self, Names, Qkv};
use super::spec::{AttentionSpec, MlpActivation, MlpSpec, NormKind, NormSpec, RopeSpec, Spec};
use super::weights::Blueprint;

const NAMES: Names = Names {
    spellings: &[("transformer.", "lm_head.weight"), ("", "lm_head.weight")],
    embedding: "wte.weight",
    positions: Some("wpe.weight"),
    final_norm: "ln_f",
    block: "h.",
    pre_attention: "ln_1",
    pre_mlp: "ln_2",
    qkv: Qkv::Stacked("attn.c_attn"),
    out: "attn.c_proj",
    up: &["mlp.c_fc"],
    down: "mlp.c_proj",
    transposed: true,
    // The causal mask, which older files carry.
    ignored: &[".attn.bias", ".attn.masked_bias"],
    ..names::LLAMA
};

/// Plain linear layers, and the prefix that `torch.compile` leaves behind.
const NANOGPT_NAMES: Names = Names {
    spellings: &[("transformer.", "lm_head.weight"), ("_orig_mod.transformer.", "_orig_mod.lm_head.weight")],
    transposed: false,
    ..NAMES
};

/// Hugging Face's GPT-2.
pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    fields.refuse("add_cross_attention", "only decoders by themselves are supported")?;
    let d_model = fields.count("n_embd")?.unwrap_or(768);
    let n_heads = fields.count("n_head")?.unwrap_or(12);
    let scaled = fields.flag("scale_attn_weights")?.unwrap_or(true);
    let shape = Shape {
        n_layers: if fields.count("n_layer")?.is_some() { fields.n_layers("n_layer")? } else { 12 },
        d_model,
        n_heads,
        d_ff: fields.count("n_inner")?.unwrap_or(4 * d_model),
        vocab_size: fields.count("vocab_size")?.unwrap_or(50_257),
        context_length: fields.count("n_positions")?.unwrap_or(1024),
    };
    let mut spec = shape.spec("gpt2", true);
    spec.norm.eps = fields.number("layer_norm_epsilon")?.unwrap_or(1e-5) as f32;
    if !scaled {
        spec.attention.query_scale = 1.0;
    }
    spec.attention.scale_by_layer = fields.flag("scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
    spec.mlp.activation = fields.activation("activation_function", MlpActivation::GeluTanh)?;
    spec.tied_embeddings = fields.flag("tie_word_embeddings")?.unwrap_or(true);
    Ok(Blueprint { spec, names: NAMES, interleaved_rope: false })
}

/// A configuration of this project for checkpoints in nanoGPT's layout: its own arguments under `model_type: nanogpt`.
pub(super) fn from_nanogpt_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    let d_model = fields.required("n_embd")?;
    let shape = Shape {
        n_layers: fields.n_layers("n_layer")?,
        d_model,
        n_heads: fields.required("n_head")?,
        d_ff: 4 * d_model,
        vocab_size: fields.required("vocab_size")?,
        context_length: fields.required("block_size")?,
    };
    let mut spec = shape.spec("nanogpt", fields.flag("bias")?.unwrap_or(true));
    spec.tied_embeddings = fields.flag("tie_word_embeddings")?.unwrap_or(true);
    Ok(Blueprint { spec, names: NANOGPT_NAMES, interleaved_rope: false })
}

struct Shape {
    n_layers: usize,
    d_model: usize,
    n_heads: usize,
    d_ff: usize,
    vocab_size: usize,
    context_length: usize,
}

impl Shape {
    fn spec(self, architecture: &str, bias: bool) -> Spec {
        let head_dim = self.d_model / self.n_heads;
        Spec {
            architecture: architecture.to_owned(),
            n_layers: self.n_layers,
            d_model: self.d_model,
            d_ff: self.d_ff,
            vocab_size: self.vocab_size,
            context_length: self.context_length,
            embed_scale: 1.0,
            learned_positions: true,
            parallel: false,
            norm: NormSpec { kind: NormKind::Layer, eps: 1e-5, unit_offset: false, bias, post: false },
            attention: AttentionSpec {
                n_heads: self.n_heads,
                n_kv_heads: self.n_heads,
                head_dim,
                query_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
                scale_by_layer: false,
                qk_norm: false,
                softcap: None,
                windows: vec![None; self.n_layers],
                rope: RopeSpec::NONE,
                local_rope: None,
                qkv_bias: bias,
                out_bias: bias,
            },
            mlp: MlpSpec { activation: MlpActivation::Gelu, gated: false, bias },
            final_softcap: None,
            tied_embeddings: true,
        }
    }
}
