//! Gemma Scope 2: `params.safetensors` with `config.json` beside it.
//!
//! Stored are `w_enc [d_in, n]`, `w_dec [n, d_out]`, `b_enc [n]`, `b_dec [d_out]`, `threshold [n]` and, in affine
//! transcoders, `affine_skip_connection [d_in, d_out]`, which multiplies the input from the right (Google's tutorial:
//! `recon + x @ affine_skip_connection`; SAELens transposes it into its `W_skip`). Inputs are raw.

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold;
use super::metadata::SaeMetadata;
use super::tensors::{TensorFile, serialize, transpose};
use crate::row_scaling::RowScaling;
use crate::sae::{Sae, SaeParts};
use crate::tap::{Site, TapPoint};

/// The name of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weight file.
pub const PARAMS: &str = "params.safetensors";
/// The tensor of a skip connection.
const SKIP: &str = "affine_skip_connection";
/// Under which metadata keeps a foreign configuration.
const PROVENANCE: &str = "gemma_scope_2";

/// Reads `params.safetensors`; the configuration adds only what is known about it. A file without these lower-case names is
/// another format's.
///
/// # Errors
/// If a part does not parse, the two disagree, shapes disagree, or a value is not finite.
pub fn read(config: Option<&[u8]>, params: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
    let file = TensorFile::open(PARAMS, params)?;
    let (d_in, n, w_enc) = file.matrix("w_enc")?;
    let (_, d_out, w_dec) = file.matrix("w_dec")?;
    let w_skip =
        if file.has(SKIP) { Some(transpose(&file.exact(SKIP, &[d_in, d_out])?, d_in, d_out)) } else { None };
    let metadata = config.map(|bytes| read_config(bytes, w_skip.is_some())).transpose()?;
    let parts = SaeParts {
        d_in,
        d_out,
        w_enc: transpose(&w_enc, d_in, n),
        b_enc: file.exact("b_enc", &[n])?,
        w_dec,
        b_dec: file.exact("b_dec", &[d_out])?,
        activation: fold::threshold(file.exact("threshold", &[n])?),
        w_skip,
        rows: RowScaling::None,
    };
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(PARAMS, e))?;
    Ok((sae, metadata.unwrap_or_default()))
}

fn read_config(bytes: &[u8], has_skip: bool) -> Result<SaeMetadata, FormatError> {
    let mut cfg: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| FormatError::container(CONFIG, e))?;
    if let Some(other) = cfg.get("architecture").filter(|a| a.as_str() != Some("jump_relu")) {
        return Err(FormatError::field(CONFIG, "architecture", "jump_relu", other));
    }
    if let Some(said) = cfg.get("affine_connection").filter(|said| said.as_bool() != Some(has_skip)) {
        return Err(FormatError::field(
            CONFIG,
            "affine_connection",
            format!("{has_skip}, as the weights say"),
            said,
        ));
    }
    let text = |key: &str| cfg.get(key).and_then(Value::as_str);
    // Some files were named before the model was.
    let model_name = text("model_name").map(|name| match name.strip_prefix("gemma-v3-") {
        Some(rest) => format!("google/gemma-3-{rest}"),
        None => name.to_owned(),
    });
    let (tap, hook_name) = text("hf_hook_point_in").and_then(tap_of_module).unzip();
    let out = text("hf_hook_point_out").filter(|&out| text("hf_hook_point_in") != Some(out));
    let target = out.and_then(tap_of_module).and_then(|(tap, _)| tap);
    let mut metadata = SaeMetadata {
        model_name,
        tap: tap.flatten(),
        target,
        hook_name: hook_name.flatten(),
        ..SaeMetadata::default()
    };
    if let Some(Value::Object(ours)) = cfg.remove("stratascope") {
        metadata.provenance = ours;
    }
    metadata.provenance.insert(PROVENANCE.to_owned(), Value::Object(cfg));
    Ok(metadata)
}

/// The tap that a module of Gemma 3 in transformers is, or else TransformerLens' name for it.
fn tap_of_module(module: &str) -> Option<(Option<TapPoint>, Option<String>)> {
    let (layer, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let tap = |site| Some((Some(TapPoint::new(site, layer)), None));
    match rest {
        "output" => tap(Site::Resid),
        "self_attn.o_proj.input" => tap(Site::Attn),
        "post_feedforward_layernorm.output" => tap(Site::Mlp),
        // With the norm's gain, which our `mlp_in` is without.
        "pre_feedforward_layernorm.output" => Some((None, Some(format!("blocks.{layer}.hook_mlp_in")))),
        _ => None,
    }
}

/// The opposite of [`tap_of_module`].
fn module(metadata: &SaeMetadata) -> Option<String> {
    if let Some(tap) = metadata.tap {
        return module_of(tap);
    }
    let layer = metadata.hook_name.as_deref()?.strip_prefix("blocks.")?.strip_suffix(".hook_mlp_in")?;
    let layer: usize = layer.parse().ok()?;
    Some(format!("model.layers.{layer}.pre_feedforward_layernorm.output"))
}

fn module_of(tap: TapPoint) -> Option<String> {
    let rest = match tap.site {
        Site::Resid => "output",
        Site::Attn => "self_attn.o_proj.input",
        Site::Mlp => "post_feedforward_layernorm.output",
        Site::Embed | Site::MlpIn => return None,
    };
    Some(format!("model.layers.{}.{rest}", tap.layer))
}

/// The folder's `config.json` and `params.safetensors`. A ReLU becomes thresholds of zero.
///
/// # Errors
/// If the autoencoder is top-k or scales rows, which the format cannot say.
pub fn write(sae: &Sae, metadata: &SaeMetadata) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
    fold::refuse_scaled_rows(PARAMS, sae)?;
    let dims = sae.dims();
    let (d_in, d_out, n) = (dims.d_in, dims.d_out, dims.n_latents);
    let threshold = fold::thresholds(PARAMS, sae)?;
    let mut ours = metadata.provenance.clone();
    let mut cfg = match ours.remove(PROVENANCE) {
        Some(Value::Object(foreign)) => foreign,
        _ => Map::new(),
    };
    let transcoder = d_in != d_out || sae.w_skip().is_some() || metadata.target.is_some();
    cfg.insert("architecture".to_owned(), "jump_relu".into());
    cfg.insert("affine_connection".to_owned(), sae.w_skip().is_some().into());
    let module = module(metadata);
    let out = match metadata.target {
        Some(target) => module_of(target),
        None => module.clone().filter(|_| !transcoder),
    };
    for (key, value) in [
        ("type", json!(if transcoder { "transcoder" } else { "sae" })),
        ("width", n.into()),
        ("model_name", json!(metadata.model_name)),
        ("hf_hook_point_in", json!(module)),
        ("hf_hook_point_out", json!(out)),
    ] {
        if !value.is_null() {
            cfg.entry(key).or_insert(value);
        }
    }
    if !ours.is_empty() {
        cfg.insert("stratascope".to_owned(), Value::Object(ours));
    }
    let mut config = serde_json::to_vec_pretty(&cfg).map_err(|e| FormatError::container(CONFIG, e))?;
    config.push(b'\n');
    let w_enc = transpose(sae.w_enc(), n, d_in);
    let w_skip = sae.w_skip().map(|w_skip| transpose(w_skip, d_out, d_in));
    let (encoder, decoder, latents, outputs, skip) = ([d_in, n], [n, d_out], [n], [d_out], [d_in, d_out]);
    let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![
        ("w_enc", &encoder, &w_enc),
        ("w_dec", &decoder, sae.w_dec()),
        ("b_enc", &latents, sae.b_enc()),
        ("b_dec", &outputs, sae.b_dec()),
        ("threshold", &latents, &threshold),
    ];
    if let Some(w_skip) = &w_skip {
        tensors.push((SKIP, &skip, w_skip));
    }
    Ok((config, serialize(PARAMS, &tensors)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sae::Activation;

    fn sae(d_out: usize, skip: bool) -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        Sae::new(SaeParts {
            d_in: 3,
            d_out,
            w_enc: wave(15, 0.1),
            b_enc: wave(5, 0.2),
            w_dec: wave(5 * d_out, 0.3),
            b_dec: wave(d_out, 0.4),
            activation: Activation::JumpRelu { threshold: vec![0.1, 0.2, 0.3, 0.4, 0.5] },
            w_skip: skip.then(|| wave(3 * d_out, 0.5)),
            rows: RowScaling::None,
        })
        .unwrap()
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let resid = SaeMetadata {
            model_name: Some("google/gemma-3-1b-pt".to_owned()),
            tap: Some(TapPoint::new(Site::Resid, 7)),
            ..SaeMetadata::default()
        };
        let mlp = SaeMetadata {
            hook_name: Some("blocks.7.hook_mlp_in".to_owned()),
            target: Some(TapPoint::new(Site::Mlp, 7)),
            ..SaeMetadata::default()
        };
        for (sae, metadata, kind) in [
            (sae(3, false), resid, "sae"),
            (sae(4, false), mlp.clone(), "transcoder"),
            (sae(4, true), mlp, "transcoder"),
        ] {
            let (config, params) = write(&sae, &metadata).unwrap();
            let (again, read_metadata) = read(Some(&config), &params).unwrap();
            assert_eq!(again, sae);
            assert_eq!(
                (
                    read_metadata.tap,
                    read_metadata.target,
                    &read_metadata.hook_name,
                    &read_metadata.model_name
                ),
                (metadata.tap, metadata.target, &metadata.hook_name, &metadata.model_name)
            );
            let cfg: Value = serde_json::from_slice(&config).unwrap();
            assert_eq!(
                (cfg["type"].as_str(), cfg["affine_connection"].as_bool()),
                (Some(kind), Some(again.w_skip().is_some()))
            );
            assert_eq!(read(None, &params).unwrap(), (sae, SaeMetadata::default()));
            // What was read is kept, and writing is then a fixed point.
            assert_eq!(write(&again, &read_metadata).unwrap(), (config, params));
        }
    }

    /// Two inputs, one output: x̂ = … + 10 x₀ + 20 x₁ whatever the order of the numbers would otherwise suggest.
    #[test]
    fn the_skip_connection_is_stored_by_inputs() {
        let tensors: [(&str, &[usize], &[f32]); 6] = [
            ("w_enc", &[2, 1], &[1.0, 2.0]),
            ("w_dec", &[1, 3], &[0.0; 3]),
            ("b_enc", &[1], &[0.0]),
            ("b_dec", &[3], &[0.0; 3]),
            ("threshold", &[1], &[0.0]),
            (SKIP, &[2, 3], &[10.0, 11.0, 12.0, 20.0, 21.0, 22.0]),
        ];
        let (sae, _) = read(None, &serialize(PARAMS, &tensors).unwrap()).unwrap();
        assert_eq!(sae.w_skip().unwrap(), [10.0, 20.0, 11.0, 21.0, 12.0, 22.0]);
    }

    #[test]
    fn configurations_that_contradict_the_weights_are_refused() {
        let (config, params) = write(&sae(4, true), &SaeMetadata::default()).unwrap();
        let cfg: Value = serde_json::from_slice(&config).unwrap();
        for (key, value, wanted) in [
            ("affine_connection", json!(false), "config.json: affine_connection: wanted true"),
            ("architecture", json!("top_k"), "config.json: architecture"),
        ] {
            let mut broken = cfg.clone();
            broken[key] = value;
            let error = read(Some(broken.to_string().as_bytes()), &params).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
        for length in 0..params.len() {
            assert!(read(None, &params[..length]).is_err());
        }
        let mut parts = sae(4, true).into_parts();
        parts.activation = Activation::TopK { k: 2 };
        assert!(write(&Sae::new(parts.clone()).unwrap(), &SaeMetadata::default()).is_err());
        (parts.activation, parts.rows) = (Activation::Relu, RowScaling::Norm);
        assert!(write(&Sae::new(parts).unwrap(), &SaeMetadata::default()).is_err());
    }
}
