//! OpenMOSS' Llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.
//!
//! `W_E [d, n]`, `b_E [n]`, `W_D [n, d]`, `b_D [d]` (absent without `use_decoder_bias`), thresholds as logarithms. With
//! `sparsity_include_decoder_norm` a latent is gated by its pre-activation times the norm of its direction. Trained are
//! vectors scaled to an average norm of √d (`dataset-wise`); that scale is folded into the weights, so that latents are in
//! the units of the activations, as with Llamascopium's `inference` form. With `token-wise` every vector is scaled to a norm of
//! √d, and latents are in that scale.

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold::{self, to_f32};
use super::metadata::{SaeMetadata, tap_of_hook};
use super::tensors::{TensorFile, serialize, transpose};
use crate::reference::dot;
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// The name of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weight file, the same as SAELens'.
pub const WEIGHTS: &str = "sae_weights.safetensors";
/// Under which metadata keeps a foreign configuration.
const PROVENANCE: &str = "openmoss";

/// Reads the two files.
///
/// # Errors
/// If a part does not parse, the dictionary is no plain autoencoder, inputs are normalised by batch, sizes disagree, or a
/// weight is not finite.
pub fn read(config: &[u8], weights: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
    let mut cfg: Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| FormatError::container(CONFIG, e))?;
    let text = |key: &str, default: &'static str| match cfg.get(key) {
        None => Ok(default.to_owned()),
        Some(Value::String(text)) => Ok(text.to_ascii_lowercase()),
        Some(other) => Err(FormatError::field(CONFIG, key, "text", other)),
    };
    let sae_type = text("sae_type", "sae")?;
    if sae_type != "sae" {
        return Err(FormatError::field(CONFIG, "sae_type", "sae", sae_type));
    }
    let file = TensorFile::open(WEIGHTS, weights)?;
    if cfg.get("use_glu_encoder").and_then(Value::as_bool) == Some(true) || file.has("W_E_glu") {
        return Err(FormatError::field(CONFIG, "use_glu_encoder", "false", "true"));
    }
    let (d, n, w_enc) = file.matrix("W_E")?;
    if let Some(said) = cfg.get("d_model").filter(|said| said.as_u64() != Some(d as u64)) {
        return Err(FormatError::field(CONFIG, "d_model", format!("{d}, the size of the weights"), said));
    }
    let mut parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc: transpose(&w_enc, d, n),
        b_enc: file.exact("b_E", &[n])?,
        w_dec: file.exact("W_D", &[n, d])?,
        b_dec: if file.has("b_D") { file.exact("b_D", &[d])? } else { vec![0.0; d] },
        activation: Activation::Relu,
        w_skip: None,
        rows: RowScaling::None,
    };
    let gated_by_norm = match cfg.get("sparsity_include_decoder_norm") {
        None => true,
        Some(Value::Bool(set)) => *set,
        Some(other) => {
            return Err(FormatError::field(CONFIG, "sparsity_include_decoder_norm", "true or false", other));
        }
    };
    match text("act_fn", "relu")?.as_str() {
        "relu" => {}
        "jumprelu" => parts.activation = fold::threshold(thresholds(&file, &parts, gated_by_norm)?),
        "topk" => {
            let k = cfg.get("top_k").and_then(Value::as_u64).and_then(|k| usize::try_from(k).ok());
            let k = k.ok_or_else(|| FormatError::field(CONFIG, "top_k", "a whole number", "none"))?;
            parts.activation = Activation::TopK { k };
        }
        other => {
            let wanted =
                "relu, jumprelu or topk (batch-wise ones are turned into jumprelu before they are used)";
            return Err(FormatError::field(CONFIG, "act_fn", wanted, other));
        }
    }
    let norm = text("norm_activation", "dataset-wise")?;
    match norm.as_str() {
        "inference" => {}
        // Outputs are scaled by their own norms, so that there must be one hook for both.
        "token-wise" if cfg.get("hook_point_in") == cfg.get("hook_point_out") => {
            parts.rows = RowScaling::Norm;
        }
        "token-wise" => {
            let found = cfg.get("hook_point_out").unwrap_or(&Value::Null);
            return Err(FormatError::field(
                CONFIG,
                "hook_point_out",
                "hook_point_in with token-wise norms",
                found,
            ));
        }
        "dataset-wise" => fold_scale(
            &mut parts,
            scale(&file, &cfg, d, "hook_point_in")?,
            scale(&file, &cfg, d, "hook_point_out")?,
        ),
        other => {
            let wanted = "dataset-wise, token-wise or inference (batch-wise needs the batch)";
            return Err(FormatError::field(CONFIG, "norm_activation", wanted, other));
        }
    }
    if gated_by_norm && matches!(parts.activation, Activation::TopK { .. }) {
        fold::decoder_norm(&mut parts);
    }
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    let hook = cfg.get("hook_point_in").and_then(Value::as_str).map(str::to_owned);
    let mut metadata =
        SaeMetadata { tap: hook.as_deref().and_then(tap_of_hook), hook_name: hook, ..SaeMetadata::default() };
    if let Some(Value::Object(ours)) = cfg.remove("stratascope") {
        metadata.provenance = ours;
    }
    metadata.provenance.insert(PROVENANCE.to_owned(), Value::Object(cfg));
    Ok((sae, metadata))
}

/// `θ = exp(log θ)`; where the gate looks at `z ‖d‖`, the threshold on `z` is `θ / ‖d‖`.
fn thresholds(file: &TensorFile<'_>, parts: &SaeParts, gated_by_norm: bool) -> Result<Vec<f32>, FormatError> {
    let newer = "activation_function.log_jumprelu_threshold";
    let name = if file.has(newer) { newer } else { "log_jumprelu_threshold" };
    let logs = file.exact(name, &[parts.b_enc.len()])?;
    let directions = parts.w_dec.chunks_exact(parts.d_out);
    let threshold = |(log, direction): (f32, &[f32])| {
        let norm = if gated_by_norm { dot(direction, direction).sqrt() } else { 1.0 };
        // A direction of zeros passes no gate; the largest threshold says so.
        to_f32((f64::from(log).exp() / norm).min(f64::from(f32::MAX)))
    };
    Ok(logs.into_iter().zip(directions).map(threshold).collect())
}

/// `√d / average norm` at a hook.
fn scale(file: &TensorFile<'_>, cfg: &Map<String, Value>, d: usize, key: &str) -> Result<f64, FormatError> {
    let hook = cfg.get(key).and_then(Value::as_str);
    let hook = hook.ok_or_else(|| FormatError::field(CONFIG, key, "the name of a hook", "none"))?;
    let name = format!("dataset_average_activation_norm.{hook}");
    let found = file.read(&name)?;
    match found.data[..] {
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        [norm] if norm.is_finite() && norm > 0.0 => Ok((d as f64).sqrt() / f64::from(norm)),
        _ => Err(FormatError::field(WEIGHTS, &name, "one positive number", format!("{:?}", found.shape))),
    }
}

/// From `x s_in → … → x̂ s_out` to raw vectors: biases and thresholds of latents over `s_in`, directions times
/// `s_in / s_out`, the decoder's bias over `s_out`.
fn fold_scale(parts: &mut SaeParts, s_in: f64, s_out: f64) {
    let times = |values: &mut Vec<f32>, factor: f64| {
        for value in values {
            *value = to_f32(f64::from(*value) * factor);
        }
    };
    times(&mut parts.b_enc, 1.0 / s_in);
    times(&mut parts.b_dec, 1.0 / s_out);
    times(&mut parts.w_dec, s_in / s_out);
    if let Activation::JumpRelu { threshold } = &mut parts.activation {
        times(threshold, 1.0 / s_in);
    }
}

/// The folder's `config.json` and `sae_weights.safetensors`, in the `inference` form, or `token-wise` where rows are scaled. Thresholds become logarithms, which
/// keep them to a few parts in ten million.
///
/// # Errors
/// If input and output differ in width, which the format cannot say.
pub fn write(sae: &Sae, metadata: &SaeMetadata) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
    fold::refuse_skip(CONFIG, sae)?;
    fold::refuse_rows_but(CONFIG, sae, &[RowScaling::None, RowScaling::Norm])?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    if dims.d_out != d {
        let found = format!("a transcoder from {d} to {}", dims.d_out);
        return Err(FormatError::field(CONFIG, "d_model", "one width for input and output", found));
    }
    let hook = metadata.hook_name_for_export().unwrap_or_else(|| "unknown".to_owned());
    let mut cfg = json!({
        "sae_type": "sae",
        "d_model": d,
        "expansion_factor": expansion_factor(d, n),
        "use_decoder_bias": true,
        "norm_activation": if sae.rows().is_none() { "inference" } else { "token-wise" },
        "sparsity_include_decoder_norm": false,
        "use_glu_encoder": false,
        "hook_point_in": hook,
        "hook_point_out": hook,
    });
    let w_enc = transpose(sae.w_enc(), n, d);
    let (wide, tall, latents, inputs) = ([d, n], [n, d], [n], [d]);
    let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![
        ("W_E", &wide, &w_enc),
        ("b_E", &latents, sae.b_enc()),
        ("W_D", &tall, sae.w_dec()),
        ("b_D", &inputs, sae.b_dec()),
    ];
    let logs: Vec<f32>;
    match sae.activation() {
        Activation::Relu => cfg["act_fn"] = "relu".into(),
        Activation::TopK { k } => {
            cfg["act_fn"] = "topk".into();
            cfg["top_k"] = (*k).into();
        }
        Activation::JumpRelu { threshold } => {
            cfg["act_fn"] = "jumprelu".into();
            // A threshold of zero has no logarithm; the smallest one there is lets the same values pass.
            logs = threshold.iter().map(|&t| to_f32(f64::from(t.max(f32::MIN_POSITIVE)).ln())).collect();
            tensors.push(("activation_function.log_jumprelu_threshold", &latents, &logs));
        }
    }
    let mut ours = metadata.provenance.clone();
    ours.remove(PROVENANCE);
    if !ours.is_empty() {
        cfg["stratascope"] = Value::Object(ours);
    }
    let mut config = serde_json::to_vec_pretty(&cfg).map_err(|e| FormatError::container(CONFIG, e))?;
    config.push(b'\n');
    Ok((config, serialize(WEIGHTS, &tensors)?))
}

/// The factor that Llamascopium multiplies with `d` and cuts to a whole number to get `n`.
#[expect(clippy::cast_precision_loss, reason = "sizes")]
fn expansion_factor(d: usize, n: usize) -> f64 {
    let factor = n as f64 / d as f64;
    if factor * (d as f64) < n as f64 { factor.next_up() } else { factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sae() -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        let (w_enc, b_enc, w_dec) = (wave(15, 0.1), wave(5, 0.2), wave(15, 0.3));
        let activation = Activation::JumpRelu { threshold: vec![0.5, 0.0, 1.0, 2.0, 0.25] };
        Sae::new(SaeParts {
            d_in: 3,
            d_out: 3,
            w_enc,
            b_enc,
            w_dec,
            b_dec: wave(3, 0.4),
            activation,
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap()
    }

    #[test]
    fn what_cannot_be_held_is_refused_by_name() {
        let (config, weights) = write(&sae(), &SaeMetadata::default()).unwrap();
        let (again, _) = read(&config, &weights).unwrap();
        assert_eq!(again.w_dec(), sae().w_dec());
        for (i, wanted) in [0.5f32, 0.0, 1.0, 2.0, 0.25].into_iter().enumerate() {
            assert!((again.activation().threshold(i).unwrap() - wanted).abs() < 1e-6);
        }
        let cfg: Value = serde_json::from_slice(&config).unwrap();
        for (key, value, wanted) in [
            ("sae_type", json!("crosscoder"), "config.json: sae_type"),
            ("use_glu_encoder", json!(true), "config.json: use_glu_encoder"),
            ("act_fn", json!("batchtopk"), "config.json: act_fn"),
            ("act_fn", json!("topk"), "config.json: top_k"),
            ("norm_activation", json!("batch-wise"), "config.json: norm_activation"),
            ("norm_activation", json!("dataset-wise"), "sae_weights.safetensors: dataset_average"),
            ("d_model", json!(4), "config.json: d_model: wanted 3"),
        ] {
            let mut broken = cfg.clone();
            broken[key] = value;
            let error = read(broken.to_string().as_bytes(), &weights).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
        for length in 0..weights.len() {
            assert!(read(&config, &weights[..length]).is_err());
        }
        let scaled = Sae::new(SaeParts { rows: RowScaling::Norm, ..sae().into_parts() }).unwrap();
        let (config, weights) = write(&scaled, &SaeMetadata::default()).unwrap();
        assert_eq!(read(&config, &weights).unwrap().0.rows(), RowScaling::Norm);
        let mut cfg: Value = serde_json::from_slice(&config).unwrap();
        cfg["hook_point_out"] = "blocks.3.hook_mlp_out".into();
        let error = read(cfg.to_string().as_bytes(), &weights).unwrap_err().to_string();
        assert!(error.contains("hook_point_out"), "{error}");
    }

    #[test]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "as the other program cuts it"
    )]
    fn expansion_factors_come_back_as_widths() {
        for d in [3usize, 10, 49, 576, 2304] {
            for n in 1..2000usize {
                assert_eq!((d as f64 * expansion_factor(d, n)) as usize, n, "{d} {n}");
            }
        }
    }
}
