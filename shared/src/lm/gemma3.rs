//! Gemma 3, text part: Gemma 2 with normalised query and key heads in place of the attention's soft-cap, five sliding
//! layers to a global one, and a rotary base of its own for either kind.

use super::config::{Classic, Fields};
use super::gguf::Gguf;
use super::names::Names;
use super::spec::{AttentionSpec, MlpActivation, MlpSpec, RopeScaling, RopeSpec, Spec};
use super::weights::Blueprint;
use super::{LmError, TensorSource, gemma2};

/// Text models and, after the first, the spellings of the models that also see images.
const NAMES: Names = Names {
    spellings: &[
        ("model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.", "lm_head.weight"),
        ("", "lm_head.weight"),
    ],
    qk_norm: Some(["self_attn.q_norm", "self_attn.k_norm"]),
    foreign: &[
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ],
    ..gemma2::NAMES
};

const LOCAL_BASE: f64 = 10_000.0;
const GLOBAL_BASE: f64 = 1_000_000.0;

/// A configuration with an image encoder, whose text part is in `text_config`.
pub(super) fn from_multimodal_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    let Some(text) = fields.object("text_config", "text_config.")? else {
        return Err(LmError::config("text_config", "missing"));
    };
    let mut blueprint = from_config(&text)?;
    if blueprint.spec.final_softcap.is_some() {
        let problem =
            "transformers does not apply it in models with an image encoder; only null is supported";
        return Err(LmError::config("text_config.final_logit_softcapping", problem));
    }
    if let Some(tied) = fields.flag("tie_word_embeddings")? {
        blueprint.spec.tied_embeddings = tied;
    }
    Ok(blueprint)
}

/// A text configuration. Those of the released models leave out whatever is as in this family's defaults.
pub(super) fn from_config(fields: &Fields<'_>) -> Result<Blueprint, LmError> {
    fields.refuse("use_bidirectional_attention", "only causal attention is supported")?;
    let n_layers = fields.n_layers("num_hidden_layers")?;
    let d_model = fields.required("hidden_size")?;
    let head_dim = fields.count("head_dim")?.unwrap_or(256);
    let context_length = fields.count("max_position_embeddings")?.unwrap_or(131_072);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let query_scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    let pattern = fields.count("sliding_window_pattern")?.unwrap_or(6);
    let (rope, local_rope) = ropes(fields, head_dim, context_length)?;
    if fields.softcap("attn_logit_softcapping", None)?.is_some() {
        let problem = "no Gemma 3 has one, and transformers does not apply it; only null is supported";
        return Err(LmError::config("attn_logit_softcapping", problem));
    }
    let Some(window) = fields.window(4096)? else {
        return Err(LmError::config("sliding_window", "null, expected a whole number"));
    };
    let spec = Spec {
        architecture: "gemma3".to_owned(),
        n_layers,
        d_model,
        d_ff: fields.required("intermediate_size")?,
        vocab_size: fields.count("vocab_size")?.unwrap_or(262_208),
        context_length,
        embed_scale: (d_model as f64).sqrt() as f32,
        learned_positions: false,
        parallel: false,
        norm: gemma2::norms(fields.number("rms_norm_eps")?.unwrap_or(1e-6), true),
        attention: AttentionSpec {
            n_heads: fields.count("num_attention_heads")?.unwrap_or(8),
            n_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(4),
            head_dim,
            query_scale: (1.0 / query_scalar.sqrt()) as f32,
            scale_by_layer: false,
            qk_norm: true,
            softcap: None,
            windows: fields.windows(n_layers, Some(window), |layer| (layer + 1) % pattern != 0)?,
            rope,
            local_rope: Some(local_rope),
            qkv_bias: attention_bias,
            out_bias: attention_bias,
        },
        mlp: MlpSpec {
            activation: fields.activation("hidden_activation", MlpActivation::GeluTanh)?,
            gated: true,
            bias: false,
        },
        final_softcap: fields.softcap("final_logit_softcapping", None)?,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
    };
    Ok(Blueprint { spec, names: NAMES, interleaved_rope: false })
}

/// The rotary embeddings of global and of sliding layers.
fn ropes(
    fields: &Fields<'_>,
    head_dim: usize,
    context_length: usize,
) -> Result<(RopeSpec, RopeSpec), LmError> {
    let global = Classic::usual(GLOBAL_BASE, head_dim, context_length);
    let local =
        Classic { base: "rope_local_base_freq", ..Classic::usual(LOCAL_BASE, head_dim, context_length) };
    let Some(both) = fields.object("rope_parameters", "rope_parameters.")? else {
        let base = fields.number(local.base)?.unwrap_or(LOCAL_BASE);
        // The classic scaling belongs to the global layers alone.
        return Ok((fields.rope(&global)?, RopeSpec { dim: head_dim, base, scaling: RopeScaling::None }));
    };
    let kind = |name: &str, path: &'static str, classic: &Classic<'_>| {
        let base = fields.number(classic.base)?.unwrap_or(classic.default_base);
        let Some(fields) = both.object(name, path)? else {
            return Ok(RopeSpec { dim: head_dim, base, scaling: RopeScaling::None });
        };
        let base = fields.number("rope_theta")?.unwrap_or(base);
        let scaling = fields.rope_scaling(classic, None)?;
        Ok::<_, LmError>(RopeSpec { dim: head_dim, base, scaling })
    };
    if !both.has_only(&["full_attention", "sliding_attention"]) {
        let problem = "expected an object with full_attention and sliding_attention";
        return Err(LmError::config("rope_parameters", problem));
    }
    let mut full = kind("full_attention", "rope_parameters.full_attention.", &global)?;
    if let Some(classic) = fields.object("rope_scaling", "rope_scaling.")? {
        full.scaling = classic.rope_scaling(&global, None)?;
    }
    Ok((full, kind("sliding_attention", "rope_parameters.sliding_attention.", &local)?))
}

/// The model of a GGUF whose architecture is `gemma3`.
pub(super) fn from_gguf(gguf: &Gguf, source: &dyn TensorSource) -> Result<Blueprint, LmError> {
    // 27B, known by its 62 layers, has a query scale from the model's width.
    let mut blueprint = gemma2::gguf_common(gguf, source, "gemma3", 62)?;
    let (n_layers, attention) = (blueprint.spec.n_layers, &mut blueprint.spec.attention);
    attention.qk_norm = true;
    attention.rope.base = gguf.number("gemma3.rope.freq_base")?.unwrap_or(GLOBAL_BASE);
    // Neither the local base nor the pattern of layers is in the files of the released models.
    let local = gguf.number("gemma3.rope.freq_base_swa")?.unwrap_or(LOCAL_BASE);
    attention.local_rope =
        Some(RopeSpec { dim: attention.head_dim, base: local, scaling: RopeScaling::None });
    let window = Some(gguf.count("gemma3.attention.sliding_window")?);
    attention.windows = (0..n_layers).map(|layer| window.filter(|_| (layer + 1) % 6 != 0)).collect();
    blueprint.spec.context_length = gguf.optional_count("gemma3.context_length")?.unwrap_or(131_072);
    blueprint.names = Names { qk_norm: Some(["attn_q_norm", "attn_k_norm"]), ..gemma2::GGUF_NAMES };
    Ok(blueprint)
}
