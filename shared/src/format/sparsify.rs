//! EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named after the hookpoint.
//!
//! `encoder.weight [n, d]`, `encoder.bias [n]`, `W_dec [n, d]`, `b_dec [d]`, optionally `W_skip [d, d]`. An autoencoder
//! subtracts `b_dec` from what it reads, a transcoder (`transcode`) does not; both keep the `k` largest of the ReLU, and `W_skip`
//! multiplies the input as it is.

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold;
use super::metadata::SaeMetadata;
use super::tensors::{TensorFile, serialize};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};
use crate::tap::{Site, TapPoint};

/// The name of the configuration.
pub const CONFIG: &str = "cfg.json";
/// The name of the weight file.
pub const WEIGHTS: &str = "sae.safetensors";
/// Under which metadata keeps a foreign configuration.
const PROVENANCE: &str = "sparsify";

/// Reads a folder's two files; `hookpoint` is the folder's name, which alone says where the autoencoder reads.
///
/// # Errors
/// If a part does not parse, the activation is not top-k, sizes disagree, or a weight is not finite.
pub fn read(config: &[u8], weights: &[u8], hookpoint: &str) -> Result<(Sae, SaeMetadata), FormatError> {
    let parsed = serde_json::from_slice(config).map_err(|e| FormatError::container(CONFIG, e))?;
    let Value::Object(mut cfg) = parsed else {
        return Err(FormatError::container(CONFIG, "wanted a JSON object"));
    };
    let flag = |key: &str| match cfg.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(set)) => Ok(*set),
        Some(other) => Err(FormatError::field(CONFIG, key, "true or false", other)),
    };
    if let Some(activation) = cfg.get("activation").filter(|a| a.as_str() != Some("topk")) {
        return Err(FormatError::field(CONFIG, "activation", "topk", activation));
    }
    if flag("signed")? {
        return Err(FormatError::field(CONFIG, "signed", "false (latents are never negative here)", "true"));
    }
    let file = TensorFile::open(WEIGHTS, weights)?;
    let skip = flag("skip_connection")?;
    if skip != file.has("W_skip") {
        let (wanted, found) =
            if skip { ("a tensor", "none") } else { ("none, as skip_connection is false", "one") };
        return Err(FormatError::field(WEIGHTS, "W_skip", wanted, found));
    }
    let transcode = flag("transcode")?;
    let k = cfg.get("k").and_then(Value::as_u64).and_then(|k| usize::try_from(k).ok());
    let k =
        k.ok_or_else(|| FormatError::field(CONFIG, "k", "a whole number", format!("{:?}", cfg.get("k"))))?;
    let (n, d, w_enc) = file.matrix("encoder.weight")?;
    if let Some(said) = cfg.get("d_in").filter(|said| said.as_u64() != Some(d as u64)) {
        return Err(FormatError::field(CONFIG, "d_in", format!("{d}, the size of the weights"), said));
    }
    let mut parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc,
        b_enc: file.exact("encoder.bias", &[n])?,
        w_dec: file.exact("W_dec", &[n, d])?,
        b_dec: file.exact("b_dec", &[d])?,
        activation: Activation::TopK { k },
        w_skip: if skip { Some(file.exact("W_skip", &[d, d])?) } else { None },
        rows: RowScaling::None,
    };
    if !transcode {
        fold::pre_encoder_bias(&mut parts);
    }
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    let mut metadata = SaeMetadata { tap: tap(hookpoint, transcode), ..SaeMetadata::default() };
    if let Some(Value::Object(ours)) = cfg.remove("stratascope") {
        metadata.provenance = ours;
    }
    metadata.provenance.insert(PROVENANCE.to_owned(), Value::Object(cfg));
    Ok((sae, metadata))
}

/// The tap of a hookpoint: a module of the language model, whose output is meant (`layers.10`, `h.5.mlp`). A transcoder
/// reads the module's input, which is none of ours.
fn tap(hookpoint: &str, transcode: bool) -> Option<TapPoint> {
    if transcode {
        return None;
    }
    let (_, rest) = ["layers.", "h."].iter().find_map(|list| hookpoint.rsplit_once(list))?;
    let (layer, site) = match rest.split_once('.') {
        None => (rest, Site::Resid),
        Some((layer, "mlp")) => (layer, Site::Mlp),
        Some(_) => return None,
    };
    Some(TapPoint::new(site, layer.parse().ok()?))
}

/// The folder's `cfg.json` and `sae.safetensors`.
///
/// # Errors
/// If the autoencoder is not top-k or its widths differ, which the format cannot say.
pub fn write(sae: &Sae, metadata: &SaeMetadata) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
    fold::refuse_scaled_rows(CONFIG, sae)?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    let k = match sae.activation() {
        Activation::TopK { k } if dims.d_out == d => *k,
        Activation::TopK { .. } => {
            let found = format!("a transcoder from {d} to {}", dims.d_out);
            return Err(FormatError::field(CONFIG, "d_in", "one width for input and output", found));
        }
        Activation::Relu => return Err(FormatError::field(CONFIG, "activation", "topk", "ReLU")),
        Activation::JumpRelu { .. } => {
            return Err(FormatError::field(CONFIG, "activation", "topk", "thresholds"));
        }
    };
    let mut ours = metadata.provenance.clone();
    let was_one = ours.get(PROVENANCE).and_then(|cfg| cfg.get("transcode")?.as_bool()) == Some(true);
    let transcode = was_one || metadata.target.is_some();
    let mut cfg = match ours.remove(PROVENANCE) {
        Some(Value::Object(foreign)) => foreign,
        _ => Map::new(),
    };
    for (key, value) in [
        ("activation", json!("topk")),
        ("num_latents", n.into()),
        ("k", k.into()),
        ("skip_connection", sae.w_skip().is_some().into()),
        ("transcode", transcode.into()),
        ("d_in", d.into()),
    ] {
        cfg.insert(key.to_owned(), value);
    }
    for (key, value) in
        [("expansion_factor", json!(32)), ("normalize_decoder", json!(true)), ("multi_topk", json!(false))]
    {
        cfg.entry(key).or_insert(value);
    }
    if !ours.is_empty() {
        cfg.insert("stratascope".to_owned(), Value::Object(ours));
    }
    let mut config = serde_json::to_vec_pretty(&cfg).map_err(|e| FormatError::container(CONFIG, e))?;
    config.push(b'\n');
    let bias = if transcode { sae.b_enc().to_vec() } else { fold::bias_behind_b_dec(sae) };
    let (square, tall, latents, inputs) = ([d, d], [n, d], [n], [d]);
    let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![
        ("encoder.weight", &tall, sae.w_enc()),
        ("encoder.bias", &latents, &bias),
        ("W_dec", &tall, sae.w_dec()),
        ("b_dec", &inputs, sae.b_dec()),
    ];
    if let Some(w_skip) = sae.w_skip() {
        tensors.push(("W_skip", &square, w_skip));
    }
    Ok((config, serialize(WEIGHTS, &tensors)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sae(activation: Activation) -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        let (w_enc, b_enc, w_dec) = (wave(15, 0.1), wave(5, 0.2), wave(15, 0.3));
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
    fn hookpoints_are_taps() {
        let named = |name: &str| tap(name, false).map(|tap| tap.to_string());
        assert_eq!(named("layers.10").as_deref(), Some("resid.10"));
        assert_eq!(named("h.5").as_deref(), Some("resid.5"));
        assert_eq!(named("gpt_neox.layers.3.mlp").as_deref(), Some("mlp.3"));
        assert_eq!((named("layers.3.attn"), named("embed_tokens"), named("layers.x")), (None, None, None));
        assert_eq!(tap("layers.3.mlp", true), None);
    }

    #[test]
    fn what_cannot_be_held_is_refused_by_name() {
        let (config, weights) = write(&sae(Activation::TopK { k: 2 }), &SaeMetadata::default()).unwrap();
        let cfg: Value = serde_json::from_slice(&config).unwrap();
        for (key, value, wanted) in [
            ("activation", json!("groupmax"), "cfg.json: activation"),
            ("signed", json!(true), "cfg.json: signed"),
            ("skip_connection", json!(true), "sae.safetensors: W_skip"),
            ("transcode", json!(1), "cfg.json: transcode"),
            ("k", json!("2"), "cfg.json: k"),
            ("k", json!(6), "dimension k is 6"),
            ("d_in", json!(4), "cfg.json: d_in: wanted 3"),
        ] {
            let mut broken = cfg.clone();
            broken[key] = value;
            let error = read(broken.to_string().as_bytes(), &weights, "").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error} does not say {wanted}");
        }
        assert!(write(&sae(Activation::Relu), &SaeMetadata::default()).is_err());
        for length in 0..weights.len() {
            assert!(read(&config, &weights[..length], "").is_err());
        }
        let plain = sae(Activation::TopK { k: 2 });
        let skip = Sae::new(SaeParts { w_skip: Some(vec![0.5; 9]), ..plain.clone().into_parts() }).unwrap();
        let (config, skip_weights) = write(&skip, &SaeMetadata::default()).unwrap();
        assert_eq!(read(&config, &skip_weights, "").unwrap().0.w_skip(), skip.w_skip());
        let mut cfg: Value = serde_json::from_slice(&config).unwrap();
        cfg["skip_connection"] = false.into();
        let error = read(cfg.to_string().as_bytes(), &skip_weights, "").unwrap_err().to_string();
        assert!(error.contains("W_skip: wanted none"), "{error}");
        let scaled = Sae::new(SaeParts { rows: RowScaling::Norm, ..plain.into_parts() }).unwrap();
        assert!(write(&scaled, &SaeMetadata::default()).is_err());
    }

    /// A transcoder stays one: its bias is not that of an autoencoder that subtracts `b_dec`.
    #[test]
    fn transcoders_are_written_as_transcoders() {
        let sae = sae(Activation::TopK { k: 2 });
        let target = Some(TapPoint::new(Site::Mlp, 3));
        let (config, weights) = write(&sae, &SaeMetadata { target, ..SaeMetadata::default() }).unwrap();
        let cfg: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(cfg["transcode"], true);
        let (again, metadata) = read(&config, &weights, "layers.3.mlp").unwrap();
        assert_eq!(again, sae);
        assert_eq!(write(&again, &metadata).unwrap(), (config, weights));
    }
}
