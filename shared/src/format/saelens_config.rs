//! SAELens' `cfg.json`: version 6 and the flat files before it, read into what the weights need to be understood.

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold;
use super::metadata::{self, SaeMetadata, tap_of_hook};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae};

/// The name of the configuration file in messages and on disk.
pub const CONFIG: &str = "cfg.json";

/// Architectures that SAELens does not have, and refuses by name: a program that trains them still has to save them.
const TOP_K_TRANSCODER: &str = "topk_transcoder";
const TOP_K_SKIP_TRANSCODER: &str = "topk_skip_transcoder";

/// The release whose layout is written.
const LAYOUT_VERSION: &str = "6.54.12";

/// Keys of a flat configuration that describe the model and the data, not the weights.
const METADATA_KEYS: [&str; 19] = [
    "model_name",
    "hook_name",
    "hook_layer",
    "model_class_name",
    "hook_head_index",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "sae_lens_version",
    "sae_lens_training_version",
    "hook_name_out",
    "hook_head_index_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "dataset_trust_remote_code",
];

/// How the tensors of a SAELens folder are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// ReLU.
    Standard,
    /// A threshold per latent.
    JumpRelu,
    /// The `k` largest; ranked after scaling by decoder norms when `by_decoder_norm`.
    TopK {
        /// How many.
        k: usize,
        /// `rescale_acts_by_decoder_norm`.
        by_decoder_norm: bool,
    },
    /// A gate and a magnitude sharing one encoder.
    Gated,
}

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    pub(super) architecture: Architecture,
    /// Whether a skip connection is added.
    pub(super) skip: bool,
    pub(super) rows: RowScaling,
    pub(super) d_in: usize,
    pub(super) d_out: usize,
    pub(super) n_latents: usize,
    pub(super) subtract_b_dec: bool,
    pub(super) metadata: SaeMetadata,
}

/// Parses and checks `cfg.json`.
pub(super) fn read(bytes: &[u8]) -> Result<Config, FormatError> {
    let root: Value = serde_json::from_slice(bytes).map_err(|e| FormatError::container(CONFIG, e))?;
    let Value::Object(mut cfg) = root else {
        return Err(FormatError::container(CONFIG, "wanted a JSON object"));
    };
    if !is_version_6(&cfg) {
        migrate(&mut cfg)?;
    }
    let Kind { architecture, transcoder, skip } = kind(&cfg)?;
    let rows = rows(&cfg, transcoder)?;
    let subtract_b_dec = match cfg.get("apply_b_dec_to_input") {
        None | Some(Value::Null) => !transcoder,
        Some(Value::Bool(apply)) => *apply,
        Some(other) => {
            return Err(FormatError::field(CONFIG, "apply_b_dec_to_input", "true or false", other));
        }
    };
    if subtract_b_dec && transcoder {
        return Err(FormatError::field(CONFIG, "apply_b_dec_to_input", "false in a transcoder", "true"));
    }
    Ok(Config {
        architecture,
        skip,
        rows,
        d_in: required(&cfg, "d_in")?,
        d_out: required(&cfg, if transcoder { "d_out" } else { "d_in" })?,
        n_latents: required(&cfg, "d_sae")?,
        subtract_b_dec,
        metadata: metadata(cfg)?,
    })
}

/// SAELens itself takes a configuration without a version, or with one below 6, as flat.
fn is_version_6(cfg: &Map<String, Value>) -> bool {
    let version = cfg.get("sae_lens_version").filter(|v| !v.is_null());
    let version = version.or_else(|| cfg.get("metadata")?.get("sae_lens_version")).and_then(Value::as_str);
    let major = version.and_then(|v| v.split('.').next()).and_then(|major| major.parse::<u32>().ok());
    major.is_some_and(|major| major >= 6)
}

/// Flat keys to version 6 keys, with the defaults they had.
fn migrate(cfg: &mut Map<String, Value>) -> Result<(), FormatError> {
    for (old, new) in [
        ("hook_point", "hook_name"),
        ("hook_point_layer", "hook_layer"),
        ("hook_point_head_index", "hook_head_index"),
        ("activation_fn_str", "activation_fn"),
    ] {
        if let Some(value) = cfg.remove(old) {
            cfg.entry(new).or_insert(value);
        }
    }
    cfg.entry("prepend_bos").or_insert(Value::Bool(true));
    if cfg.get("architecture").is_none_or(Value::is_null) {
        cfg.insert("architecture".to_owned(), "standard".into());
    }
    match cfg.get("activation_fn").and_then(Value::as_str) {
        Some("topk") => {
            let k = cfg.get("activation_fn_kwargs").and_then(|kwargs| kwargs.get("k")).cloned();
            let k =
                k.ok_or_else(|| FormatError::field(CONFIG, "activation_fn_kwargs.k", "a number", "nothing"))?;
            cfg.insert("k".to_owned(), k);
            cfg.insert("architecture".to_owned(), "topk".into());
        }
        None | Some("relu") => {}
        Some(other) => return Err(FormatError::field(CONFIG, "activation_fn", "relu or topk", other)),
    }
    if let Some(Value::Bool(normalise)) = cfg.get("normalize_activations") {
        let name = if *normalise { "expected_average_only_in" } else { "none" };
        cfg.insert("normalize_activations".to_owned(), name.into());
    }
    // Flat keys win over a stray metadata object, as they do in the original migration.
    let mut metadata = Map::new();
    for key in METADATA_KEYS {
        if let Some(value) = cfg.remove(key) {
            metadata.insert(key.to_owned(), value);
        }
    }
    cfg.insert("metadata".to_owned(), Value::Object(metadata));
    Ok(())
}

/// What the name of an architecture says.
struct Kind {
    architecture: Architecture,
    /// Input and output are different places, perhaps of different width.
    transcoder: bool,
    skip: bool,
}

fn kind(cfg: &Map<String, Value>) -> Result<Kind, FormatError> {
    const WANTED: &str = "standard, jumprelu, topk, gated, transcoder, jumprelu_transcoder, skip_transcoder or \
        jumprelu_skip_transcoder (batchtopk autoencoders are saved as jumprelu for inference)";
    let of = |architecture, transcoder, skip| Kind { architecture, transcoder, skip };
    let name = cfg.get("architecture").and_then(Value::as_str);
    Ok(match name {
        Some("standard") => of(Architecture::Standard, false, false),
        Some("jumprelu") => of(Architecture::JumpRelu, false, false),
        Some("gated") => of(Architecture::Gated, false, false),
        Some("transcoder") => of(Architecture::Standard, true, false),
        Some("skip_transcoder") => of(Architecture::Standard, true, true),
        Some("jumprelu_transcoder") => of(Architecture::JumpRelu, true, false),
        Some("jumprelu_skip_transcoder") => of(Architecture::JumpRelu, true, true),
        Some(name @ ("topk" | TOP_K_TRANSCODER | TOP_K_SKIP_TRANSCODER)) => {
            let k = required(cfg, "k")?;
            let by_decoder_norm = match cfg.get("rescale_acts_by_decoder_norm") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(rescale)) => *rescale,
                Some(other) => {
                    return Err(FormatError::field(
                        CONFIG,
                        "rescale_acts_by_decoder_norm",
                        "true or false",
                        other,
                    ));
                }
            };
            of(Architecture::TopK { k, by_decoder_norm }, name != "topk", name == TOP_K_SKIP_TRANSCODER)
        }
        Some(other) => return Err(FormatError::field(CONFIG, "architecture", WANTED, other)),
        None => return Err(FormatError::field(CONFIG, "architecture", WANTED, "nothing")),
    })
}

/// How vectors are scaled. An average that the whole of the data shares is folded into the weights before they are saved,
/// and so is whitening.
fn rows(cfg: &Map<String, Value>, transcoder: bool) -> Result<RowScaling, FormatError> {
    const WANTED: &str = "none, expected_average_only_in, layer_norm or constant_norm_rescale";
    let Some(value) = cfg.get("normalize_activations").filter(|v| !v.is_null()) else {
        return Ok(RowScaling::None);
    };
    let rows = match value.as_str() {
        Some("none" | "expected_average_only_in") => return Ok(RowScaling::None),
        Some("layer_norm") => RowScaling::LAYER_NORM,
        Some("constant_norm_rescale") => RowScaling::Norm,
        _ => return Err(FormatError::field(CONFIG, "normalize_activations", WANTED, value)),
    };
    // SAELens' transcoders scale what they read and leave what they write on that scale.
    if transcoder {
        let wanted = "none in a transcoder, where it would not be undone";
        return Err(FormatError::field(CONFIG, "normalize_activations", wanted, value));
    }
    Ok(rows)
}

fn required(cfg: &Map<String, Value>, key: &str) -> Result<usize, FormatError> {
    let value = cfg.get(key).unwrap_or(&Value::Null);
    let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
    size.ok_or_else(|| FormatError::field(CONFIG, key, "a positive whole number", value))
}

fn metadata(mut cfg: Map<String, Value>) -> Result<SaeMetadata, FormatError> {
    let mut foreign = match cfg.remove("metadata") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(FormatError::field(CONFIG, "metadata", "an object", other)),
    };
    let mut text = |key: &str| match foreign.remove(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    };
    let (model_name, hook_name) = (text("model_name"), text("hook_name"));
    let tap = hook_name.as_deref().and_then(tap_of_hook);
    let target = foreign.get("hook_name_out").and_then(Value::as_str).and_then(tap_of_hook);
    let context_size = foreign.remove("context_size").and_then(|v| usize::try_from(v.as_u64()?).ok());
    let prepend_bos = foreign.remove("prepend_bos").and_then(|v| v.as_bool());
    let mut provenance = match foreign.remove("stratascope") {
        Some(Value::Object(ours)) => ours,
        _ => Map::new(),
    };
    foreign.retain(|_, value| !value.is_null());
    if !foreign.is_empty() {
        provenance.insert("saelens".to_owned(), Value::Object(foreign));
    }
    Ok(SaeMetadata {
        model_name,
        tap,
        target,
        layers: None,
        hook_name,
        context_size,
        prepend_bos,
        provenance,
    })
}

/// The `cfg.json` of version 6 for an autoencoder; with `own` also for one that SAELens has no architecture for.
///
/// # Errors
/// If SAELens has no such architecture, or scales rows in no such way.
pub(super) fn write(sae: &Sae, metadata: &SaeMetadata, own: bool) -> Result<Value, FormatError> {
    let dims = sae.dims();
    let mut ours = metadata.provenance.clone();
    let foreign = match ours.remove("saelens") {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let skip = sae.w_skip().is_some();
    let transcoder =
        dims.d_in != dims.d_out || skip || metadata.target.is_some() || foreign.contains_key("hook_name_out");
    let known = [RowScaling::None, RowScaling::LAYER_NORM, RowScaling::Norm];
    fold::refuse_rows_but(CONFIG, sae, if transcoder { &known[..1] } else { &known })?;
    let mut cfg = json!({
        "architecture": match (sae.activation(), transcoder, skip) {
            (Activation::Relu, false, _) => "standard",
            (Activation::Relu, true, false) => "transcoder",
            (Activation::Relu, true, true) => "skip_transcoder",
            (Activation::JumpRelu { .. }, false, _) => "jumprelu",
            (Activation::JumpRelu { .. }, true, false) => "jumprelu_transcoder",
            (Activation::JumpRelu { .. }, true, true) => "jumprelu_skip_transcoder",
            (Activation::TopK { .. }, false, _) => "topk",
            (Activation::TopK { .. }, true, _) if !own => {
                return Err(FormatError::field(CONFIG, "architecture", "an architecture SAELens has", "a top-k transcoder"));
            }
            (Activation::TopK { .. }, true, false) => TOP_K_TRANSCODER,
            (Activation::TopK { .. }, true, true) => TOP_K_SKIP_TRANSCODER,
        },
        "d_in": dims.d_in,
        "d_sae": dims.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": false,
        "normalize_activations": match sae.rows() {
            RowScaling::None => "none",
            RowScaling::Standardise { .. } => "layer_norm",
            RowScaling::Norm => "constant_norm_rescale",
        },
        "reshape_activations": "none",
    });
    if transcoder {
        cfg["d_out"] = dims.d_out.into();
    }
    if let Activation::TopK { k } = sae.activation() {
        cfg["k"] = (*k).into();
        cfg["rescale_acts_by_decoder_norm"] = false.into();
    }
    let hook_name = metadata.hook_name_for_export();
    if hook_name.as_deref().is_some_and(|hook| hook.contains("hook_z")) {
        cfg["reshape_activations"] = "hook_z".into();
    }
    let mut meta = json!({
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_head_index": null,
        "hook_name_out": metadata.target.map(metadata::hook_name),
        "neuronpedia_id": null,
        "sae_lens_training_version": null,
    });
    for (key, value) in foreign {
        meta[key] = value;
    }
    meta["sae_lens_version"] = LAYOUT_VERSION.into();
    meta["model_name"] = json!(metadata.model_name);
    meta["hook_name"] = json!(hook_name);
    meta["context_size"] = json!(metadata.context_size);
    meta["prepend_bos"] = json!(metadata.prepend_bos);
    if !ours.is_empty() {
        meta["stratascope"] = Value::Object(ours);
    }
    cfg["metadata"] = meta;
    Ok(cfg)
}
