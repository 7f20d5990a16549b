//! mlsae: `config.json` and `model.safetensors`, one autoencoder for several layers.
//!
//! `encoder.weight [n, d]` without a bias, `decoder.weight [d, n]`, `pre_encoder_bias [d]`; top-k. With `standardize`, its
//! default, every vector is standardised on its own. The larger files with the language model beside the autoencoder
//! (names ending in `-tfm`) have the same tensors behind `autoencoder.` and a configuration of their own; where that says
//! `tuned_lens`, they have the maps of the lens that vectors went through (the small files beside, ending in `-lens`, do not).

use serde_json::{Map, Value, json};

use super::error::FormatError;
use super::fold;
use super::metadata::SaeMetadata;
use super::tensors::{TensorFile, serialize, transpose};
use super::tuned_lens;
use crate::multi_layer::{Layer, MultiLayer};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};
use crate::tap::{Site, TapPoint};

/// The name of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weight file.
pub const WEIGHTS: &str = "model.safetensors";
/// What stands before the names of tensors where a language model's stand beside them.
const PREFIX: &str = "autoencoder.";
/// What stands before the names of a lens's tensors, beside a language model.
const LENS: &str = "lens.layer_translators.";
/// Under which metadata keeps a foreign configuration.
const PROVENANCE: &str = "mlsae";

/// Whether these are an mlsae's weights: language models keep theirs in a file of the same name.
#[must_use]
pub fn is_mlsae(config: &[u8]) -> bool {
    let alone = ["n_inputs", "n_latents", "k"];
    let with_model = ["model_name", "expansion_factor", "k"];
    serde_json::from_slice::<Map<String, Value>>(config)
        .is_ok_and(|map| [alone, with_model].iter().any(|keys| keys.iter().all(|key| map.contains_key(*key))))
}

/// Whether a tensor of this name is one that [`read`] reads; the language model's are not.
#[must_use]
pub fn is_weight(name: &str) -> bool {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    matches!(name, "encoder.weight" | "decoder.weight" | "pre_encoder_bias") || name.starts_with(LENS)
}

/// Reads the two files.
///
/// # Errors
/// If a part does not parse, a lens is missing, sizes disagree or a weight is not finite.
pub fn read(config: &[u8], weights: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
    let mut cfg: Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| FormatError::container(CONFIG, e))?;
    let rows = match cfg.get("standardize") {
        None | Some(Value::Bool(true)) => RowScaling::LAYER_NORM,
        Some(Value::Bool(false)) => RowScaling::None,
        Some(other) => return Err(FormatError::field(CONFIG, "standardize", "true or false", other)),
    };
    if let Some(lens) = cfg.get("lens").filter(|lens| lens.as_bool() != Some(false)) {
        return Err(FormatError::field(
            CONFIG,
            "lens",
            "false (its maps are in the file with the language model)",
            lens,
        ));
    }
    let count = |key: &str| {
        let value = cfg.get(key).unwrap_or(&Value::Null);
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
        count.ok_or_else(|| FormatError::field(CONFIG, key, "a whole number", value))
    };
    let file = TensorFile::open(WEIGHTS, weights)?;
    let with_model = file.has(&format!("{PREFIX}encoder.weight"));
    let name = |name: &str| if with_model { format!("{PREFIX}{name}") } else { name.to_owned() };
    let (n, d, w_enc) = file.matrix(&name("encoder.weight"))?;
    // With a language model beside it, the autoencoder's sizes follow from the model's.
    let said = if with_model && !cfg.contains_key("n_latents") {
        vec![("expansion_factor", count("expansion_factor")?.saturating_mul(d), n)]
    } else {
        vec![("n_inputs", count("n_inputs")?, d), ("n_latents", count("n_latents")?, n)]
    };
    for (key, said, found) in said {
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
        rows,
    };
    fold::pre_encoder_bias(&mut parts);
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    let mut metadata = SaeMetadata {
        model_name: cfg.get("model_name").and_then(Value::as_str).map(str::to_owned),
        tap: only_layer(&cfg),
        layers: several_layers(&cfg),
        ..SaeMetadata::default()
    };
    if cfg.get("tuned_lens").is_some_and(|lens| lens.as_bool() != Some(false)) {
        // Where `layers` is absent they are all of them: as many as there are maps.
        let lens = tuned_lens::read_tensors(WEIGHTS, &file, LENS)?;
        let all = (0..lens.len()).map(|layer| Layer::of_raw(TapPoint::new(Site::Resid, layer)));
        let layers = match (metadata.layers.take(), metadata.tap.take()) {
            (Some(layers), _) => layers,
            (None, Some(tap)) => MultiLayer::new(vec![Layer::of_raw(tap)], Vec::new()),
            (None, None) => MultiLayer::new(all.collect(), Vec::new()),
        };
        // The published program gives the first maps to the layers there are.
        let maps = lens.into_iter().take(layers.layers.len()).collect();
        metadata.layers = Some(layers.behind(maps).map_err(|e| FormatError::weights(WEIGHTS, e))?);
    }
    if let Some(Value::Object(ours)) = cfg.remove("stratascope") {
        metadata.provenance = ours;
    }
    metadata.provenance.insert(PROVENANCE.to_owned(), Value::Object(cfg));
    Ok((sae, metadata))
}

/// The tap, where `layers` has a single one: layers are outputs of blocks.
fn only_layer(cfg: &Map<String, Value>) -> Option<TapPoint> {
    match &cfg.get("layers")?.as_array()?[..] {
        [layer] => Some(TapPoint::new(Site::Resid, usize::try_from(layer.as_u64()?).ok()?)),
        _ => None,
    }
}

/// The layers, where `layers` has several: the dictionary is the same at all.
fn several_layers(cfg: &Map<String, Value>) -> Option<MultiLayer> {
    let layers = cfg.get("layers")?.as_array().filter(|layers| layers.len() > 1)?;
    let layer = |layer: &Value| {
        let tap = TapPoint::new(Site::Resid, usize::try_from(layer.as_u64()?).ok()?);
        Some(Layer::of_raw(tap))
    };
    Some(MultiLayer::new(layers.iter().map(layer).collect::<Option<_>>()?, Vec::new()))
}

/// The numbers of the layers, which are outputs of blocks.
fn layer_numbers(metadata: &SaeMetadata) -> Result<Vec<usize>, FormatError> {
    let Some(several) = &metadata.layers else {
        return Ok(metadata.tap.iter().map(|tap| tap.layer).collect());
    };
    if several.translated {
        return Err(FormatError::field(
            CONFIG,
            "lens",
            "none: only files with the language model hold one",
            "a lens",
        ));
    }
    let number = |layer: &Layer| match layer.tap.site {
        Site::Resid if layer.scale == 1.0 => Ok(layer.tap.layer),
        Site::Resid => {
            Err(FormatError::field(CONFIG, "layers", "layers without scales of their own", layer.scale))
        }
        _ => Err(FormatError::field(CONFIG, "layers", "layers of resid", layer.tap)),
    };
    several.layers.iter().map(number).collect()
}

/// The two files that `MLSAE.from_pretrained` loads. A configuration read before is kept where it still holds.
///
/// # Errors
/// If the autoencoder is not top-k, its widths differ, it has an encoder bias of its own or a skip connection, or its rows
/// are scaled in another way, or layers have scales of their own.
pub fn write(sae: &Sae, metadata: &SaeMetadata) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
    fold::refuse_skip(CONFIG, sae)?;
    fold::refuse_rows_but(CONFIG, sae, &[RowScaling::None, RowScaling::LAYER_NORM])?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    let k = match sae.activation() {
        Activation::TopK { k } if dims.d_out == d => *k,
        Activation::TopK { .. } => {
            let found = format!("a transcoder from {d} to {}", dims.d_out);
            return Err(FormatError::field(CONFIG, "n_inputs", "one width for input and output", found));
        }
        Activation::Relu => return Err(FormatError::field(CONFIG, "k", "top-k", "ReLU")),
        Activation::JumpRelu { .. } => return Err(FormatError::field(CONFIG, "k", "top-k", "thresholds")),
    };
    let own = fold::bias_behind_b_dec(sae);
    // What the rounding of the folded bias, and of what it was folded from, leaves is no bias.
    let rounding = |i: usize| {
        let terms = sae.encoder_row(i).iter().zip(sae.b_dec()).map(|(w, b)| (w * b).abs()).sum::<f32>();
        4.0 * f32::EPSILON * (sae.b_enc()[i].abs() + terms)
    };
    if let Some(i) = (0..n).find(|&i| own[i].abs() > rounding(i)) {
        let found = format!("{} at latent {i}", own[i]);
        return Err(FormatError::field(WEIGHTS, "encoder bias", "none beside pre_encoder_bias", found));
    }
    let mut ours = metadata.provenance.clone();
    let mut cfg = match ours.remove(PROVENANCE) {
        Some(Value::Object(foreign)) => foreign,
        _ => Map::new(),
    };
    for key in ["model_name", "expansion_factor", "tuned_lens"] {
        // Of a file with the language model in it, which this one is not.
        cfg.remove(key);
    }
    for (key, value) in [
        ("n_inputs", json!(d)),
        ("n_latents", n.into()),
        ("k", k.into()),
        ("standardize", (!sae.rows().is_none()).into()),
        ("lens", false.into()),
    ] {
        cfg.insert(key.to_owned(), value);
    }
    let layers = layer_numbers(metadata)?;
    for (key, value) in [
        ("layers", json!(layers)),
        ("auxk", json!(256)),
        ("dead_steps_threshold", json!(76)),
        ("dead_threshold", json!(0.001)),
    ] {
        cfg.entry(key).or_insert(value);
    }
    if !ours.is_empty() {
        cfg.insert("stratascope".to_owned(), Value::Object(ours));
    }
    let mut config = serde_json::to_vec_pretty(&cfg).map_err(|e| FormatError::container(CONFIG, e))?;
    config.push(b'\n');
    let w_dec = transpose(sae.w_dec(), n, d);
    let tensors: [(&str, &[usize], &[f32]); 3] = [
        ("encoder.weight", &[n, d], sae.w_enc()),
        ("decoder.weight", &[d, n], &w_dec),
        ("pre_encoder_bias", &[d], sae.b_dec()),
    ];
    Ok((config, serialize(WEIGHTS, &tensors)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(prefix: &str) -> Vec<u8> {
        let named = |name: &str| format!("{prefix}{name}");
        let names = [named("encoder.weight"), named("decoder.weight"), named("pre_encoder_bias")];
        let tensors: [(&str, &[usize], &[f32]); 3] = [
            (&names[0], &[3, 2], &[1.0, 0.0, 0.0, 1.0, 0.5, -0.5]),
            (&names[1], &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            (&names[2], &[2], &[0.25, -1.0]),
        ];
        serialize(WEIGHTS, &tensors).unwrap()
    }

    #[test]
    fn what_cannot_be_held_is_refused_by_name() {
        let weights = weights("autoencoder.");
        let cfg = json!({"n_inputs": 2, "n_latents": 3, "k": 2, "standardize": false});
        let (sae, _) = read(cfg.to_string().as_bytes(), &weights).unwrap();
        assert_eq!((sae.decoder_direction(1), sae.b_enc()), (&[2.0, 5.0][..], &[-0.25, 1.0, -0.625][..]));
        assert_eq!(sae.rows(), RowScaling::None);
        for (key, value, wanted) in [
            ("standardize", json!("yes"), "config.json: standardize"),
            ("standardize", Value::Null, "config.json: standardize"),
            ("lens", json!(true), "config.json: lens"),
            ("tuned_lens", json!(true), "model.safetensors: 0.weight"),
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

    #[test]
    fn standardisation_is_the_default_and_files_with_the_model_say_sizes_otherwise() {
        let weights = weights("autoencoder.");
        let cfg = json!({"model_name": "EleutherAI/pythia-70m-deduped", "layers": [4], "expansion_factor": 2, "k": 2});
        assert!(is_mlsae(cfg.to_string().as_bytes()));
        let error = read(cfg.to_string().as_bytes(), &weights).unwrap_err().to_string();
        assert!(error.contains("expansion_factor: wanted 3"), "{error}");
        let mut whole = cfg;
        (whole["n_inputs"], whole["n_latents"]) = (2.into(), 3.into());
        let (sae, metadata) = read(whole.to_string().as_bytes(), &weights).unwrap();
        assert_eq!(sae.rows(), RowScaling::LAYER_NORM);
        assert_eq!(metadata.tap, Some(TapPoint::new(Site::Resid, 4)));
        assert_eq!(metadata.model_name.as_deref(), Some("EleutherAI/pythia-70m-deduped"));
    }

    #[test]
    fn a_lens_beside_the_language_model_is_read_and_cannot_be_written() {
        let cfg = json!({"model_name": "m", "expansion_factor": 2, "n_latents": 3, "n_inputs": 2, "k": 2, "tuned_lens": true});
        let map = |i: usize| [format!("{LENS}{i}.weight"), format!("{LENS}{i}.bias")];
        let (maps, plain) = ([map(0), map(1)], weights("autoencoder."));
        let plain = TensorFile::open(WEIGHTS, &plain).unwrap();
        let all: Vec<(String, Vec<usize>, Vec<f32>)> = plain
            .names()
            .into_iter()
            .map(|name| (name.to_owned(), plain.shape(name).unwrap(), plain.read(name).unwrap().data))
            .chain(maps.iter().flat_map(|[weight, bias]| {
                [
                    (weight.clone(), vec![2, 2], vec![1.0, 1.0, 0.0, 3.0]),
                    (bias.clone(), vec![2], vec![1.0, -1.0]),
                ]
            }))
            .collect();
        let all: Vec<(&str, &[usize], &[f32])> =
            all.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..])).collect();
        assert!(all.iter().all(|(name, ..)| is_weight(name)));
        let (sae, metadata) = read(cfg.to_string().as_bytes(), &serialize(WEIGHTS, &all).unwrap()).unwrap();
        let layers = metadata.layers.as_ref().unwrap();
        assert_eq!(
            (layers.layers.len(), layers.translator(1).unwrap().inverse()),
            (2, &[0.5, -0.125, 0.0, 0.25][..])
        );
        assert!(
            layers.at(&sae, 0).is_err() && layers.of_translated(&sae, 0).is_ok(),
            "standardised behind it"
        );
        assert!(write(&sae, &metadata).unwrap_err().to_string().contains("lens"));
    }

    #[test]
    fn what_is_written_reads_back_and_what_cannot_be_is_refused() {
        let cfg = json!({"n_inputs": 2, "n_latents": 3, "k": 2, "layers": [1, 5], "auxk": 7});
        let (sae, metadata) = read(cfg.to_string().as_bytes(), &weights("")).unwrap();
        let (config, bytes) = write(&sae, &metadata).unwrap();
        let (again, _) = read(&config, &bytes).unwrap();
        assert_eq!(again, sae);
        let layers = metadata.layers.clone().unwrap();
        assert_eq!(layers.layers.iter().map(|layer| layer.tap.layer).collect::<Vec<_>>(), [1, 5]);
        let mut scaled = metadata.clone();
        scaled.layers = Some(MultiLayer::new(
            layers.layers.into_iter().map(|layer| Layer { scale: 2.0, ..layer }).collect(),
            Vec::new(),
        ));
        assert!(write(&sae, &scaled).unwrap_err().to_string().contains("layers"));
        let written: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(
            (&written["layers"], &written["auxk"], &written["standardize"]),
            (&json!([1, 5]), &json!(7), &json!(true))
        );
        let breaks: [(&str, fn(&mut SaeParts)); 4] = [
            ("k: wanted top-k", |p| p.activation = Activation::Relu),
            ("encoder bias: wanted none", |p| p.b_enc[1] += 0.01),
            ("skip connection", |p| p.w_skip = Some(vec![0.5; 4])),
            ("vectors", |p| p.rows = RowScaling::Standardise { eps: 1e-3 }),
        ];
        for (wanted, change) in breaks {
            let mut parts = sae.clone().into_parts();
            change(&mut parts);
            let error = write(&Sae::new(parts).unwrap(), &metadata).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
