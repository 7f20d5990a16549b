//! dictionary_learning: `ae.pt`, a state dictionary saved by torch, and `config.json` beside it.
//!
//! The classes hold different tensors, by which they are told apart where `config.json` is missing:
//!
//! | class | tensors | reads |
//! | --- | --- | --- |
//! | AutoEncoder | `bias`, `encoder.{weight,bias}`, `decoder.weight` | `x − bias` |
//! | AutoEncoderNew | `encoder.{weight,bias}`, `decoder.{weight,bias}` | `x` |
//! | GatedAutoEncoder | `decoder_bias`, `encoder.weight`, `r_mag`, `gate_bias`, `mag_bias`, `decoder.weight` | `x − decoder_bias` |
//! | JumpReluAutoEncoder | `W_enc`, `b_enc`, `W_dec`, `b_dec`, `threshold [n]` | `x` |
//! | AutoEncoderTopK, BatchTopKSAE | `k`, `threshold`, `encoder.{weight,bias}`, `decoder.weight`, `b_dec` | `x − b_dec` |
//! | MatryoshkaBatchTopKSAE | `k`, `threshold`, `group_sizes`, `W_enc`, `b_enc`, `W_dec`, `b_dec` | `x − b_dec` |
//!
//! `encoder.weight` is `[n, d]`, `decoder.weight` `[d, n]`, `W_enc` `[d, n]`, `W_dec` `[n, d]`. The two batch classes use
//! their scalar threshold at inference, AutoEncoderTopK the k largest of each row.

use std::io::{Read, Seek, Write};

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold;
use super::metadata::SaeMetadata;
use super::tensors::transpose;
use super::torch::{self, Item, TorchFile};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};
use crate::tap::{Site, TapPoint};

/// The name of the weight file.
pub const WEIGHTS: &str = "ae.pt";
/// The name of the configuration.
pub const CONFIG: &str = "config.json";
/// Under which metadata keeps a foreign configuration.
const PROVENANCE: &str = "dictionary_learning";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    AutoEncoder,
    AutoEncoderNew,
    Gated,
    JumpRelu,
    TopK,
    BatchTopK,
    Matryoshka,
}

const CLASSES: [(&str, Class); 7] = [
    ("AutoEncoder", Class::AutoEncoder),
    ("AutoEncoderNew", Class::AutoEncoderNew),
    ("GatedAutoEncoder", Class::Gated),
    ("JumpReluAutoEncoder", Class::JumpRelu),
    ("AutoEncoderTopK", Class::TopK),
    ("BatchTopKSAE", Class::BatchTopK),
    ("MatryoshkaBatchTopKSAE", Class::Matryoshka),
];

/// Reads `ae.pt` and, where there is one, `config.json`.
///
/// # Errors
/// If a part does not parse, the pickle holds anything but data, the class cannot be held, tensors disagree, a batch class
/// has no threshold yet, or a weight is not finite.
pub fn read(config: Option<&[u8]>, weights: impl Read + Seek) -> Result<(Sae, SaeMetadata), FormatError> {
    let config = config.map(parse).transpose()?;
    let mut file = TorchFile::open(WEIGHTS, weights)?;
    if file.has("ae") && file.has("optimizer") {
        let found =
            "a checkpoint of training (its biases may still be scaled); use the ae.pt written at the end";
        return Err(FormatError::field(WEIGHTS, "ae", "a state dictionary", found));
    }
    let class = class(config.as_ref(), &file)?;
    let sae = Sae::new(parts(&mut file, class)?).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    if let Some(config) = &config {
        check_sizes(config, &sae)?;
    }
    Ok((sae, metadata(config)))
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, FormatError> {
    match serde_json::from_slice(bytes).map_err(|e| FormatError::container(CONFIG, e))? {
        Value::Object(map) => Ok(map),
        _ => Err(FormatError::container(CONFIG, "wanted a JSON object")),
    }
}

fn class<R: Read + Seek>(
    config: Option<&Map<String, Value>>,
    file: &TorchFile<'_, R>,
) -> Result<Class, FormatError> {
    let known = || CLASSES.map(|(name, _)| name).join(", ");
    if let Some(named) = config.and_then(|c| c.get("trainer")?.get("dict_class")) {
        // Old files hold the type as Python prints it: <class 'dictionary_learning.dictionary.AutoEncoder'>.
        let name = named.as_str().unwrap_or_default().trim_end_matches(['>', '\'']);
        let name = name.rsplit('.').next().unwrap_or(name);
        let found = CLASSES.iter().find(|(class, _)| *class == name);
        let wrong = || FormatError::field(CONFIG, "trainer.dict_class", known(), named);
        return found.map(|&(_, class)| class).ok_or_else(wrong);
    }
    let has = |names: &[&str]| names.iter().all(|name| file.has(name));
    Ok(if has(&["r_mag", "gate_bias"]) {
        Class::Gated
    } else if has(&["group_sizes", "W_enc"]) {
        Class::Matryoshka
    } else if has(&["W_enc", "threshold"]) {
        Class::JumpRelu
    } else if has(&["k", "threshold", "encoder.weight"]) {
        let wanted = "a config.json that says AutoEncoderTopK or BatchTopKSAE, which hold the same tensors";
        return Err(FormatError::field(WEIGHTS, "k", wanted, "no configuration"));
    } else if has(&["encoder.weight", "bias"]) {
        Class::AutoEncoder
    } else if has(&["encoder.weight", "decoder.bias"]) {
        Class::AutoEncoderNew
    } else {
        return Err(FormatError::field(WEIGHTS, "tensors", format!("those of {}", known()), file.names()));
    })
}

/// The tensors of a class in our layout, everything folded.
fn parts<R: Read + Seek>(file: &mut TorchFile<'_, R>, class: Class) -> Result<SaeParts, FormatError> {
    let (d, n, w_enc, w_dec) = if matches!(class, Class::JumpRelu | Class::Matryoshka) {
        let (d, n, w_enc) = file.matrix("W_enc")?;
        (d, n, transpose(&w_enc, d, n), file.exact("W_dec", &[n, d])?)
    } else {
        let (n, d, w_enc) = file.matrix("encoder.weight")?;
        (d, n, w_enc, transpose(&file.exact("decoder.weight", &[d, n])?, d, n))
    };
    let (b_enc, b_dec) = match class {
        Class::AutoEncoder => ("encoder.bias", "bias"),
        Class::AutoEncoderNew => ("encoder.bias", "decoder.bias"),
        Class::Gated => ("mag_bias", "decoder_bias"),
        Class::JumpRelu | Class::Matryoshka => ("b_enc", "b_dec"),
        Class::TopK | Class::BatchTopK => ("encoder.bias", "b_dec"),
    };
    let (b_enc, b_dec) = (file.exact(b_enc, &[n])?, file.exact(b_dec, &[d])?);
    let mut parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc,
        b_enc,
        w_dec,
        b_dec,
        activation: Activation::Relu,
        w_skip: None,
        rows: RowScaling::None,
    };
    match class {
        Class::AutoEncoder | Class::AutoEncoderNew => {}
        Class::Gated => fold::gate(&mut parts, &file.exact("gate_bias", &[n])?, &file.exact("r_mag", &[n])?),
        Class::JumpRelu => parts.activation = fold::threshold(file.exact("threshold", &[n])?),
        Class::TopK => parts.activation = Activation::TopK { k: file.count("k")? },
        Class::BatchTopK | Class::Matryoshka => {
            let threshold = file.exact("threshold", &[])?[0];
            if threshold < 0.0 {
                let wanted = "at least 0 (training sets it from threshold_start_step on)";
                return Err(FormatError::field(WEIGHTS, "threshold", wanted, threshold));
            }
            parts.activation = fold::threshold(vec![threshold; n]);
        }
    }
    if !matches!(class, Class::AutoEncoderNew | Class::JumpRelu) {
        fold::pre_encoder_bias(&mut parts);
    }
    Ok(parts)
}

fn check_sizes(config: &Map<String, Value>, sae: &Sae) -> Result<(), FormatError> {
    for (field, found) in [("activation_dim", sae.dims().d_in), ("dict_size", sae.dims().n_latents)] {
        let said =
            config.get("trainer").and_then(|trainer| trainer.get(field)).filter(|said| !said.is_null());
        if let Some(said) = said.filter(|said| said.as_u64() != Some(found as u64)) {
            let field = format!("trainer.{field}");
            return Err(FormatError::field(
                CONFIG,
                &field,
                format!("{found}, the size of the weights"),
                said,
            ));
        }
    }
    Ok(())
}

fn metadata(config: Option<Map<String, Value>>) -> SaeMetadata {
    let Some(mut config) = config else { return SaeMetadata::default() };
    let trainer = config.get("trainer");
    let text = |key: &str| trainer?.get(key)?.as_str().map(str::to_owned);
    let layer = trainer.and_then(|t| t.get("layer")?.as_u64()).and_then(|layer| usize::try_from(layer).ok());
    let submodule = text("submodule_name").unwrap_or_default();
    let site = [("resid_post", Site::Resid), ("mlp_out", Site::Mlp)];
    let site = site.into_iter().find(|(prefix, _)| submodule.starts_with(prefix)).map(|(_, site)| site);
    let context = config.get("buffer").and_then(|b| b.get("ctx_len")?.as_u64());
    let mut metadata = SaeMetadata {
        model_name: text("lm_name"),
        tap: site.zip(layer).map(|(site, layer)| TapPoint::new(site, layer)),
        context_size: context.and_then(|n| usize::try_from(n).ok()),
        ..SaeMetadata::default()
    };
    if let Some(Value::Object(ours)) = config.remove("stratascope") {
        metadata.provenance = ours;
    }
    metadata.provenance.insert(PROVENANCE.to_owned(), Value::Object(config));
    metadata
}

/// Writes `ae.pt` and gives `config.json` back: a ReLU becomes an AutoEncoderNew, thresholds a JumpReluAutoEncoder, top-k
/// an AutoEncoderTopK, whose encoder bias takes up the `b_dec` it subtracts.
///
/// # Errors
/// If input and output differ in width, which no class holds, or writing fails.
pub fn write(sae: &Sae, metadata: &SaeMetadata, target: impl Write + Seek) -> Result<Vec<u8>, FormatError> {
    fold::refuse_skip(WEIGHTS, sae)?;
    fold::refuse_scaled_rows(WEIGHTS, sae)?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    if dims.d_out != d {
        let found = format!("a transcoder from {d} to {}", dims.d_out);
        return Err(FormatError::field(WEIGHTS, "activation_dim", "one width for input and output", found));
    }
    let (wide, tall, latents, inputs) = ([d, n], [n, d], [n], [d]);
    let trainer = match sae.activation() {
        Activation::JumpRelu { threshold } => {
            let w_enc = transpose(sae.w_enc(), n, d);
            let items = [
                ("W_enc", Item::F32(&wide, &w_enc)),
                ("b_enc", Item::F32(&latents, sae.b_enc())),
                ("W_dec", Item::F32(&tall, sae.w_dec())),
                ("b_dec", Item::F32(&inputs, sae.b_dec())),
                ("threshold", Item::F32(&latents, threshold)),
            ];
            torch::write(WEIGHTS, &items, target)?;
            json!({"trainer_class": "JumpReluTrainer", "dict_class": "JumpReluAutoEncoder"})
        }
        Activation::Relu => {
            let w_dec = transpose(sae.w_dec(), n, d);
            let items = [
                ("encoder.weight", Item::F32(&tall, sae.w_enc())),
                ("encoder.bias", Item::F32(&latents, sae.b_enc())),
                ("decoder.weight", Item::F32(&wide, &w_dec)),
                ("decoder.bias", Item::F32(&inputs, sae.b_dec())),
            ];
            torch::write(WEIGHTS, &items, target)?;
            json!({"trainer_class": "StandardTrainerAprilUpdate", "dict_class": "AutoEncoderNew"})
        }
        Activation::TopK { k } => {
            let (w_dec, bias) = (transpose(sae.w_dec(), n, d), fold::bias_behind_b_dec(sae));
            let count =
                i32::try_from(*k).map_err(|_| FormatError::field(WEIGHTS, "k", "a k below 2^31", k))?;
            let items = [
                ("b_dec", Item::F32(&inputs, sae.b_dec())),
                ("k", Item::I32(count)),
                ("threshold", Item::F32(&[], &[-1.0])),
                ("decoder.weight", Item::F32(&wide, &w_dec)),
                ("encoder.weight", Item::F32(&tall, sae.w_enc())),
                ("encoder.bias", Item::F32(&latents, &bias)),
            ];
            torch::write(WEIGHTS, &items, target)?;
            json!({"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "k": k})
        }
    };
    config(trainer, sae, metadata)
}

/// `config.json` around what the class needs. What a foreign one said before is kept where it does not contradict.
fn config(mut trainer: Value, sae: &Sae, metadata: &SaeMetadata) -> Result<Vec<u8>, FormatError> {
    let mut ours = metadata.provenance.clone();
    let mut config = match ours.remove(PROVENANCE) {
        Some(Value::Object(foreign)) => foreign,
        _ => Map::new(),
    };
    trainer["activation_dim"] = sae.dims().d_in.into();
    trainer["dict_size"] = sae.dims().n_latents.into();
    trainer["lm_name"] = json!(metadata.model_name);
    if let Some(tap) = metadata.tap {
        trainer["layer"] = tap.layer.into();
        trainer["submodule_name"] = match tap.site {
            Site::Resid => format!("resid_post_layer_{}", tap.layer).into(),
            Site::Mlp => format!("mlp_out_layer_{}", tap.layer).into(),
            Site::Attn | Site::Embed | Site::MlpIn => tap.to_string().into(),
        };
    }
    // Other keys of a foreign trainer say how it was trained; those above say what is in the file.
    if let (Some(Value::Object(foreign)), Some(new)) = (config.remove("trainer"), trainer.as_object_mut()) {
        for (key, value) in foreign {
            new.entry(key).or_insert(value);
        }
    }
    config.insert("trainer".to_owned(), trainer);
    let buffer = json!({"d_submodule": sae.dims().d_in, "io": "out", "ctx_len": metadata.context_size});
    config.entry("buffer").or_insert(buffer);
    if !ours.is_empty() {
        config.insert("stratascope".to_owned(), Value::Object(ours));
    }
    let mut bytes = serde_json::to_vec_pretty(&config).map_err(|e| FormatError::container(CONFIG, e))?;
    bytes.push(b'\n');
    Ok(bytes)
}
