//! mlsae: `config.json` and `model.safetensors`, one autoencoder for several layers.
//!
//! `encoder.weight [n, d]` without a bias, `decoder.weight [d, n]`, `pre_encoder_bias [d]`, perhaps behind `autoencoder.`;
//! top-k. With `standardize`, its default, every input is standardised on its own and that is undone afterwards, which
//! weights alone cannot express; so is a `lens` of each layer.

use serde_json::{Map, Value};

use super::error::FormatError;
use super::fold;
use super::metadata::SaeMetadata;
use super::tensors::{TensorFile, transpose};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// The name of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weight file.
pub const WEIGHTS: &str = "model.safetensors";

/// Whether these are an mlsae's weights: language models keep theirs in a file of the same name.
#[must_use]
pub fn is_mlsae(config: &[u8]) -> bool {
    let keys = ["n_inputs", "n_latents", "k"];
    serde_json::from_slice::<Map<String, Value>>(config)
        .is_ok_and(|map| keys.iter().all(|key| map.contains_key(*key)))
}

/// Reads the two files.
///
/// # Errors
/// If a part does not parse, inputs are standardised, there is a lens, sizes disagree or a weight is not finite.
pub fn read(config: &[u8], weights: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
    let cfg: Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| FormatError::container(CONFIG, e))?;
    if cfg.get("standardize").and_then(Value::as_bool) != Some(false) {
        let wanted = "false (standardising every input on its own is more than weights can express)";
        let found = cfg.get("standardize").map_or("nothing, which means true".to_owned(), Value::to_string);
        return Err(FormatError::field(CONFIG, "standardize", wanted, found));
    }
    for key in ["lens", "tuned_lens"] {
        if cfg.get(key).is_some_and(|lens| lens.as_bool() != Some(false)) {
            return Err(FormatError::field(
                CONFIG,
                key,
                "false (one autoencoder, not one a layer)",
                &cfg[key],
            ));
        }
    }
    let count = |key: &str| {
        let value = cfg.get(key).unwrap_or(&Value::Null);
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
        count.ok_or_else(|| FormatError::field(CONFIG, key, "a whole number", value))
    };
    let file = TensorFile::open(WEIGHTS, weights)?;
    let prefix = if file.has("autoencoder.encoder.weight") { "autoencoder." } else { "" };
    let name = |name: &str| format!("{prefix}{name}");
    let (n, d, w_enc) = file.matrix(&name("encoder.weight"))?;
    for (key, found) in [("n_inputs", d), ("n_latents", n)] {
        let said = count(key)?;
        if said != found {
            return Err(FormatError::field(CONFIG, key, format!("{found}, the size of the weights"), said));
        }
    }
    let mut parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc,
        b_enc: vec![0.0; n],
        w_dec: transpose(&file.exact(&name("decoder.weight"), &[d, n])?, d, n),
        b_dec: file.exact(&name("pre_encoder_bias"), &[d])?,
        activation: Activation::TopK { k: count("k")? },
        w_skip: None,
        rows: RowScaling::None,
    };
    fold::pre_encoder_bias(&mut parts);
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    let mut metadata = SaeMetadata::default();
    metadata.provenance.insert("mlsae".to_owned(), Value::Object(cfg));
    Ok((sae, metadata))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::format::tensors::serialize;

    #[test]
    fn what_cannot_be_held_is_refused_by_name() {
        let tensors: [(&str, &[usize], &[f32]); 3] = [
            ("autoencoder.encoder.weight", &[3, 2], &[1.0, 0.0, 0.0, 1.0, 0.5, -0.5]),
            ("autoencoder.decoder.weight", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            ("autoencoder.pre_encoder_bias", &[2], &[0.25, -1.0]),
        ];
        let weights = serialize(WEIGHTS, &tensors).unwrap();
        let cfg = json!({"n_inputs": 2, "n_latents": 3, "k": 2, "standardize": false});
        let (sae, _) = read(cfg.to_string().as_bytes(), &weights).unwrap();
        assert_eq!((sae.decoder_direction(1), sae.b_enc()), (&[2.0, 5.0][..], &[-0.25, 1.0, -0.625][..]));
        for (key, value, wanted) in [
            ("standardize", json!(true), "config.json: standardize"),
            ("standardize", Value::Null, "config.json: standardize"),
            ("lens", json!(true), "config.json: lens"),
            ("k", json!(-1), "config.json: k"),
            ("n_latents", json!(4), "config.json: n_latents: wanted 3"),
        ] {
            let mut broken = cfg.clone();
            broken[key] = value;
            let error = read(broken.to_string().as_bytes(), &weights).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
        assert!(
            is_mlsae(cfg.to_string().as_bytes()) && !is_mlsae(b"{\"hidden_size\": 3}") && !is_mlsae(b"[")
        );
    }
}
