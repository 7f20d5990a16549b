//! Reading `config.json`: checked fields, the family table, and what families have in common.

use serde_json::{Map, Value};

use super::spec::{GateActivation, RopeScaling, RopeSpec};
use super::weights::{Blueprint, Names};
use super::{LmError, gemma2, llama};

/// The largest dimension any field may ask for.
const MAX_DIMENSION: u64 = 1 << 24;
/// The largest number of layers.
const MAX_LAYERS: usize = 4096;

/// Tensor names of the Llama layout; families change the norms.
pub(super) const LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens.weight",
    final_norm: "model.norm.weight",
    unembedding: "lm_head.weight",
    block: "model.layers.",
    pre_attention: "input_layernorm",
    post_attention: None,
    pre_mlp: "post_attention_layernorm",
    post_mlp: None,
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    out: "self_attn.o_proj",
    gate_up: ["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    ignored: &["rotary_emb.inv_freq"],
};

impl Blueprint {
    /// The model that a Hugging Face `config.json` describes.
    ///
    /// # Errors
    /// If it is not JSON, its `model_type` is not supported, or a field is missing, malformed or unsupported.
    pub fn from_config(json: &[u8]) -> Result<Self, LmError> {
        let value: Value =
            serde_json::from_slice(json).map_err(|e| LmError::config("config.json", e.to_string()))?;
        let Value::Object(map) = &value else {
            return Err(LmError::config("config.json", "expected an object"));
        };
        let fields = Fields { map, path: "" };
        match fields.text("model_type")? {
            Some("llama") => llama::from_config(&fields),
            Some("gemma2") => gemma2::from_config(&fields),
            Some(other) => {
                Err(LmError::config("model_type", format!("`{other}`; supported are llama, gemma2")))
            }
            None => Err(LmError::config("model_type", "missing; supported are llama, gemma2")),
        }
    }
}

/// An object of `config.json`. A JSON null reads as absent, as in the programs that write these files.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'static str,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there and null, which some fields read differently from absent.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    fn wrong(&self, name: &str, wanted: &str, found: &Value) -> LmError {
        LmError::config(
            format!("{}{name}", self.path),
            format!("expected {wanted}, found {}", excerpt(found)),
        )
    }

    /// A positive whole number.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, LmError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n @ 1..=MAX_DIMENSION) => Ok(Some(n as usize)),
            _ => Err(self.wrong(name, "a whole number from 1 to 16777216", value)),
        }
    }

    /// A positive whole number that must be there.
    pub(super) fn required(&self, name: &str) -> Result<usize, LmError> {
        self.count(name)?.ok_or_else(|| LmError::config(format!("{}{name}", self.path), "missing"))
    }

    /// The number of layers.
    pub(super) fn n_layers(&self) -> Result<usize, LmError> {
        match self.required("num_hidden_layers")? {
            n if n <= MAX_LAYERS => Ok(n),
            n => Err(LmError::config("num_hidden_layers", format!("{n}, expected at most {MAX_LAYERS}"))),
        }
    }

    /// A positive finite number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, LmError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(self.wrong(name, "a positive number", value)),
        }
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, LmError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false", value))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, LmError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "a string", value))
    }

    /// A soft-cap: absent and null differ. Absent is `default`, null is none.
    pub(super) fn softcap(&self, name: &str, default: f32) -> Result<Option<f32>, LmError> {
        match self.map.get(name) {
            None => Ok(Some(default)),
            Some(_) => Ok(self.number(name)?.map(|cap| cap as f32)),
        }
    }

    /// The gate's activation under `name`, or `default`.
    pub(super) fn activation(&self, name: &str, default: GateActivation) -> Result<GateActivation, LmError> {
        match self.text(name)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(GateActivation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(GateActivation::GeluTanh),
            Some("gelu") => Ok(GateActivation::Gelu),
            Some("relu") => Ok(GateActivation::Relu),
            Some(other) => {
                let known = "silu, gelu_pytorch_tanh, gelu, relu";
                Err(LmError::config(name, format!("`{other}`; supported are {known}")))
            }
        }
    }

    /// Per layer whether it is a sliding one, from `layer_types`; `None` when the field is absent.
    pub(super) fn sliding_layers(&self, n_layers: usize) -> Result<Option<Vec<bool>>, LmError> {
        let Some(value) = self.get("layer_types") else { return Ok(None) };
        let Some(types) = value.as_array() else {
            return Err(self.wrong("layer_types", "a list", value));
        };
        if types.len() != n_layers {
            let problem = format!("{} entries for {n_layers} layers", types.len());
            return Err(LmError::config("layer_types", problem));
        }
        let sliding = types.iter().map(|value| match value.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(self.wrong("layer_types", "sliding_attention or full_attention", value)),
        });
        sliding.collect::<Result<_, _>>().map(Some)
    }

    /// The rotary embedding, from the newer `rope_parameters` or the classic `rope_theta` and `rope_scaling`.
    pub(super) fn rope(&self, max_position: usize) -> Result<RopeSpec, LmError> {
        // Where both layouts are present, the classic `rope_scaling` is the one that counts.
        let scaling = ["rope_scaling", "rope_parameters"].into_iter().find_map(|name| {
            let object = self.get(name)?;
            (object.as_object().is_none_or(|map| !map.is_empty())).then_some((name, object))
        });
        let top = self.number("rope_theta")?.unwrap_or(10_000.0);
        let top_partial = self.number("partial_rotary_factor")?;
        let Some((name, value)) = scaling else {
            check_full_rotation(top_partial)?;
            return Ok(RopeSpec { base: top, scaling: RopeScaling::None });
        };
        let Some(map) = value.as_object() else {
            return Err(self.wrong(name, "an object", value));
        };
        let fields = Fields { map, path: "rope_parameters." };
        check_full_rotation(fields.number("partial_rotary_factor")?.or(top_partial))?;
        let base = fields.number("rope_theta")?.unwrap_or(top);
        let kind = match fields.text("rope_type")? {
            Some(kind) => Some(kind),
            None => fields.text("type")?,
        };
        let needed = |field: &str| {
            fields.number(field)?.ok_or_else(|| LmError::config(format!("{name}.{field}"), "missing"))
        };
        let scaling = match kind.unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_context: match self.number("original_max_position_embeddings")? {
                    Some(outer) => outer,
                    None => fields.number("original_max_position_embeddings")?.unwrap_or(max_position as f64),
                },
            },
            other => {
                let problem = format!("`{other}`; supported are default, linear, llama3");
                return Err(LmError::config(format!("{name}.rope_type"), problem));
            }
        };
        Ok(RopeSpec { base, scaling })
    }
}

fn check_full_rotation(factor: Option<f64>) -> Result<(), LmError> {
    match factor {
        Some(factor) if factor != 1.0 => {
            Err(LmError::config("partial_rotary_factor", format!("{factor}; only 1 is supported")))
        }
        _ => Ok(()),
    }
}

/// The beginning of a JSON value, for messages.
fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
