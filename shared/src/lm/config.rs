//! Reading `config.json`: checked fields, the family table, and what families have in common.

use serde_json::{Map, Value};

use super::spec::{MlpActivation, RopeScaling, RopeSpec};
use super::weights::Blueprint;
use super::{LmError, gemma2, gemma3, gpt_neox, gpt2, llama};

/// The largest dimension any field may ask for.
const MAX_DIMENSION: u64 = 1 << 24;
/// The largest number of layers.
const MAX_LAYERS: usize = 4096;
const FAMILIES: &str =
    "gemma2, gemma3, gemma3_text, gpt2, gpt_neox, llama, mistral, nanogpt, qwen2 and qwen3";

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
            Some("llama") => llama::from_config(&fields, llama::Kind::Llama),
            Some("mistral") => llama::from_config(&fields, llama::Kind::Mistral),
            Some("qwen2") => llama::from_config(&fields, llama::Kind::Qwen2),
            Some("qwen3") => llama::from_config(&fields, llama::Kind::Qwen3),
            Some("gemma2") => gemma2::from_config(&fields),
            Some("gemma3_text") => gemma3::from_config(&fields),
            Some("gemma3") => gemma3::from_multimodal_config(&fields),
            Some("gpt_neox") => gpt_neox::from_config(&fields),
            Some("gpt2") => gpt2::from_config(&fields),
            Some("nanogpt") => gpt2::from_nanogpt_config(&fields),
            Some(other) => Err(LmError::config("model_type", format!("`{other}`; supported are {FAMILIES}"))),
            None => Err(LmError::config("model_type", format!("missing; supported are {FAMILIES}"))),
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

    /// Whether every field is one of `names`.
    pub(super) fn has_only(&self, names: &[&str]) -> bool {
        self.map.keys().all(|name| names.contains(&name.as_str()))
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

    /// The number of layers, under `name`.
    pub(super) fn n_layers(&self, name: &str) -> Result<usize, LmError> {
        match self.required(name)? {
            n if n <= MAX_LAYERS => Ok(n),
            n => Err(LmError::config(name, format!("{n}, expected at most {MAX_LAYERS}"))),
        }
    }

    /// `Ok` unless the flag `name` is true.
    pub(super) fn refuse(&self, name: &str, why: &str) -> Result<(), LmError> {
        match self.flag(name)? {
            Some(true) => Err(LmError::config(name, format!("true; {why}"))),
            _ => Ok(()),
        }
    }

    /// The object under `name`.
    pub(super) fn object(&self, name: &str, path: &'static str) -> Result<Option<Self>, LmError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Self { map, path })),
            None => Err(self.wrong(name, "an object", value)),
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
    pub(super) fn softcap(&self, name: &str, default: Option<f32>) -> Result<Option<f32>, LmError> {
        match self.map.get(name) {
            None => Ok(default),
            Some(_) => Ok(self.number(name)?.map(|cap| cap as f32)),
        }
    }

    /// The MLP's activation under `name`, or `default`.
    pub(super) fn activation(&self, name: &str, default: MlpActivation) -> Result<MlpActivation, LmError> {
        match self.text(name)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(MlpActivation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(MlpActivation::GeluTanh),
            Some("gelu") => Ok(MlpActivation::Gelu),
            Some("relu") => Ok(MlpActivation::Relu),
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

    /// Per layer its window: `window` wide where `layer_types` says sliding, or `slides(layer)` where it says nothing.
    pub(super) fn windows(
        &self,
        n_layers: usize,
        window: Option<usize>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, LmError> {
        let sliding = match self.sliding_layers(n_layers)? {
            Some(sliding) => sliding,
            None => (0..n_layers).map(slides).collect(),
        };
        Ok(sliding.into_iter().map(|slides| window.filter(|_| slides)).collect())
    }

    /// `sliding_window`: absent is `default`, null is none.
    pub(super) fn window(&self, default: usize) -> Result<Option<usize>, LmError> {
        match self.map.get("sliding_window") {
            None => Ok(Some(default)),
            Some(_) => self.count("sliding_window"),
        }
    }

    /// The rotary embedding, from the newer `rope_parameters` or the classic fields that `classic` names.
    pub(super) fn rope(&self, classic: &Classic<'_>) -> Result<RopeSpec, LmError> {
        // Where both layouts are present, the classic `rope_scaling` is the one that counts.
        let mut scaling = None;
        for (name, path) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
            let object = self.object(name, path)?;
            scaling = scaling.or(object.filter(|object| !object.map.is_empty()));
        }
        let base = self.number(classic.base)?.unwrap_or(classic.default_base);
        let share = self.number(classic.share)?.unwrap_or(classic.default_share);
        let Some(fields) = scaling else {
            return Ok(RopeSpec { dim: classic.turned(share)?, base, scaling: RopeScaling::None });
        };
        let share = fields.number("partial_rotary_factor")?.unwrap_or(share);
        let scaling = fields.rope_scaling(classic, self.number("original_max_position_embeddings")?)?;
        let base = fields.number("rope_theta")?.unwrap_or(base);
        Ok(RopeSpec { dim: classic.turned(share)?, base, scaling })
    }

    /// How the frequencies are stretched, from the fields of a `rope_scaling` or `rope_parameters`.
    pub(super) fn rope_scaling(
        &self,
        classic: &Classic<'_>,
        original_context: Option<f64>,
    ) -> Result<RopeScaling, LmError> {
        let kind = match self.text("rope_type")? {
            Some(kind) => Some(kind),
            None => self.text("type")?,
        };
        let needed = |field: &str| {
            self.number(field)?.ok_or_else(|| LmError::config(format!("{}{field}", self.path), "missing"))
        };
        Ok(match kind.unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_context: match original_context {
                    Some(outer) => outer,
                    None => self
                        .number("original_max_position_embeddings")?
                        .unwrap_or(classic.context_length as f64),
                },
            },
            other => {
                let problem = format!("`{other}`; supported are default, linear, llama3");
                return Err(LmError::config(format!("{}rope_type", self.path), problem));
            }
        })
    }
}

/// How a family's classic configurations spell the rotary embedding, and what holds when they do not.
pub(super) struct Classic<'a> {
    pub(super) base: &'a str,
    pub(super) default_base: f64,
    /// The field with the turned share of a head.
    pub(super) share: &'a str,
    pub(super) default_share: f64,
    /// Whether the family turns part of a head; else a share other than 1 is refused.
    pub(super) partial: bool,
    pub(super) head_dim: usize,
    pub(super) context_length: usize,
}

impl Classic<'_> {
    /// The usual spelling, with all of a head turned.
    pub(super) fn usual(default_base: f64, head_dim: usize, context_length: usize) -> Self {
        Self {
            base: "rope_theta",
            default_base,
            share: "partial_rotary_factor",
            default_share: 1.0,
            partial: false,
            head_dim,
            context_length,
        }
    }

    /// How many values of a head are turned.
    fn turned(&self, share: f64) -> Result<usize, LmError> {
        if share > 1.0 || (share != 1.0 && !self.partial) {
            let most = if self.partial { "at most 1" } else { "only 1" };
            return Err(LmError::config(self.share, format!("{share}; supported is {most}")));
        }
        Ok((self.head_dim as f64 * share) as usize)
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
