//! SAELens folders: `cfg.json`, `sae_weights.safetensors` and, beside them, `sparsity.safetensors`.
//!
//! Stored are `W_enc [d_in, n]`, `W_dec [n, d_out]`, `b_enc [n]`, `b_dec [d_out]`, with `threshold [n]` (JumpReLU) or
//! `b_gate`, `b_mag`, `r_mag [n]` in place of `b_enc` (gated), and `W_skip [d_out, d_in]` in skip transcoders.

use super::error::FormatError;
use super::metadata::SaeMetadata;
use super::saelens_config::{self, Architecture, Config};

use super::fold;
pub use super::saelens_config::CONFIG;
use super::tensors::{TensorFile, serialize, transpose};
use crate::sae::{Activation, Sae, SaeParts};

/// The name of the weight file.
pub const WEIGHTS: &str = "sae_weights.safetensors";
/// The name of the file of log10 firing frequencies.
pub const SPARSITY: &str = "sparsity.safetensors";

/// The bytes of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// `cfg.json`.
    pub config: Vec<u8>,
    /// `sae_weights.safetensors`.
    pub weights: Vec<u8>,
}

/// Reads a folder's configuration (version 6, or flat as before it) and weights.
///
/// Architectures: standard, jumprelu, topk, gated, and transcoders with and without thresholds and skip connection. A pre-encoder bias, the gate and
/// decoder-norm scaling are folded into the weights in f64.
///
/// # Errors
/// If a part does not parse, the two disagree, the architecture cannot be held, or a weight is not finite.
pub fn read(config: &[u8], weights: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
    let config = saelens_config::read(config)?;
    let file = TensorFile::open(WEIGHTS, weights)?;
    if file.has("W_skip") && !config.skip {
        let wanted = "no skip connection, as the architecture has none";
        return Err(FormatError::field(WEIGHTS, "W_skip", wanted, "one"));
    }
    let mut parts = dense_parts(&file, &config)?;
    let n = parts.w_enc.len() / parts.d_in.max(1);
    match config.architecture {
        Architecture::Standard => parts.b_enc = file.exact("b_enc", &[n])?,
        Architecture::TopK { k, .. } => {
            parts.b_enc = file.exact("b_enc", &[n])?;
            parts.activation = Activation::TopK { k };
        }
        Architecture::JumpRelu => {
            parts.b_enc = file.exact("b_enc", &[n])?;
            parts.activation = fold::threshold(thresholds(&file, n)?);
        }
        Architecture::Gated => {
            parts.b_enc = file.exact("b_mag", &[n])?;
            fold::gate(&mut parts, &file.exact("b_gate", &[n])?, &file.exact("r_mag", &[n])?);
        }
    }
    if config.subtract_b_dec {
        fold::pre_encoder_bias(&mut parts);
    }
    if let Architecture::TopK { by_decoder_norm: true, .. } = config.architecture {
        fold::decoder_norm(&mut parts);
    }
    scale_decoder(&file, &mut parts, n)?;
    let sae = Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))?;
    Ok((sae, config.metadata))
}

/// The tensors every architecture has, transposed, with sizes checked against the configuration.
fn dense_parts(file: &TensorFile<'_>, config: &Config) -> Result<SaeParts, FormatError> {
    let (d_in, n, w_enc) = file.matrix("W_enc")?;
    let (rows, d_out, w_dec) = file.matrix("W_dec")?;
    if rows != n {
        return Err(FormatError::field(WEIGHTS, "W_dec", format!("{n} rows, as W_enc has columns"), rows));
    }
    for (field, said, found) in
        [("d_in", config.d_in, d_in), ("d_sae", config.n_latents, n), ("d_out", config.d_out, d_out)]
    {
        if said != found {
            return Err(FormatError::field(CONFIG, field, format!("{found}, the size of the weights"), said));
        }
    }
    Ok(SaeParts {
        d_in,
        d_out,
        w_enc: transpose(&w_enc, d_in, n),
        b_enc: Vec::new(),
        w_dec,
        b_dec: file.exact("b_dec", &[d_out])?,
        activation: Activation::Relu,
        w_skip: if config.skip { Some(file.exact("W_skip", &[d_out, d_in])?) } else { None },
        rows: config.rows,
    })
}

/// `threshold`, or the exponential of the `log_threshold` that training checkpoints hold.
fn thresholds(file: &TensorFile<'_>, n: usize) -> Result<Vec<f32>, FormatError> {
    if !file.has("threshold") && file.has("log_threshold") {
        #[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
        return Ok(file
            .exact("log_threshold", &[n])?
            .into_iter()
            .map(|t| f64::from(t).exp() as f32)
            .collect());
    }
    file.exact("threshold", &[n])
}

/// The legacy per-latent `scaling_factor`, applied to latents on their way into the decoder.
fn scale_decoder(file: &TensorFile<'_>, parts: &mut SaeParts, n: usize) -> Result<(), FormatError> {
    if file.has("scaling_factor") {
        let factors = file.exact("scaling_factor", &[n])?;
        for (direction, factor) in parts.w_dec.chunks_exact_mut(parts.d_out.max(1)).zip(factors) {
            for d in direction {
                *d *= factor;
            }
        }
    }
    Ok(())
}

/// The folder SAELens 6 loads with `SAE.load_from_disk`: f32, no pre-encoder bias.
///
/// # Errors
/// If SAELens has no such architecture (a top-k transcoder), or rows are scaled as SAELens does not.
pub fn write(sae: &Sae, metadata: &SaeMetadata) -> Result<Folder, FormatError> {
    folder(sae, metadata, false)
}

/// As [`write`], and top-k transcoders in the same layout under names of our own, which [`read`] reads and SAELens refuses:
/// what was trained can always be saved.
///
/// # Errors
/// If rows are scaled as SAELens does not.
pub fn write_own(sae: &Sae, metadata: &SaeMetadata) -> Result<Folder, FormatError> {
    folder(sae, metadata, true)
}

fn folder(sae: &Sae, metadata: &SaeMetadata, own: bool) -> Result<Folder, FormatError> {
    let dims = sae.dims();
    let (d_in, d_out, n) = (dims.d_in, dims.d_out, dims.n_latents);
    let config = saelens_config::write(sae, metadata, own)?;
    let mut config = serde_json::to_vec_pretty(&config).map_err(|e| FormatError::container(CONFIG, e))?;
    config.push(b'\n');
    let w_enc = transpose(sae.w_enc(), n, d_in);
    let (encoder, decoder, latents, outputs, skip) = ([d_in, n], [n, d_out], [n], [d_out], [d_out, d_in]);
    let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![
        ("W_enc", &encoder, &w_enc),
        ("W_dec", &decoder, sae.w_dec()),
        ("b_enc", &latents, sae.b_enc()),
        ("b_dec", &outputs, sae.b_dec()),
    ];
    if let Activation::JumpRelu { threshold } = sae.activation() {
        tensors.push(("threshold", &latents, threshold));
    }
    if let Some(w_skip) = sae.w_skip() {
        tensors.push(("W_skip", &skip, w_skip));
    }
    Ok(Folder { config, weights: serialize(WEIGHTS, &tensors)? })
}

/// `sparsity.safetensors`: log10 of the firing frequency of each latent, floored at 1e-10 as SAELens does.
///
/// # Errors
/// Never for a slice that fits in memory; the signature follows the serialiser.
pub fn sparsity(density: &[f32]) -> Result<Vec<u8>, FormatError> {
    let log: Vec<f32> = density.iter().map(|d| (d + 1e-10).log10()).collect();
    serialize(SPARSITY, &[("sparsity", &[log.len()], &log)])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::tap::{Site, TapPoint};

    fn sae(activation: Activation, d_out: usize) -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        Sae::new(SaeParts {
            d_in: 3,
            d_out,
            w_enc: wave(15, 0.1),
            b_enc: wave(5, 0.2),
            w_dec: wave(5 * d_out, 0.3),
            b_dec: wave(d_out, 0.4),
            activation,
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap()
    }

    fn folder() -> (Value, Vec<u8>) {
        let sae = sae(Activation::JumpRelu { threshold: vec![0.1, 0.2, 0.3, 0.4, 0.5] }, 3);
        let folder = write(&sae, &SaeMetadata::default()).unwrap();
        (serde_json::from_slice(&folder.config).unwrap(), folder.weights)
    }

    fn reread(config: &Value, weights: &[u8]) -> Result<(Sae, SaeMetadata), FormatError> {
        read(config.to_string().as_bytes(), weights)
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let mut metadata = SaeMetadata {
            model_name: Some("m".to_owned()),
            tap: Some(TapPoint::new(Site::Resid, 7)),
            hook_name: Some("blocks.7.hook_resid_post".to_owned()),
            context_size: Some(128),
            prepend_bos: Some(true),
            ..SaeMetadata::default()
        };
        metadata.provenance.insert("steps".to_owned(), json!(12));
        let jump = Activation::JumpRelu { threshold: vec![0.1, 0.2, 0.0, 0.4, 0.5] };
        for (activation, d_out) in [
            (jump.clone(), 3),
            (Activation::Relu, 3),
            (Activation::TopK { k: 2 }, 3),
            (Activation::Relu, 2),
            (jump, 4),
        ] {
            let sae = sae(activation, d_out);
            let folder = write(&sae, &metadata).unwrap();
            let (again, read_metadata) = read(&folder.config, &folder.weights).unwrap();
            assert_eq!(again, sae);
            assert_eq!(read_metadata.provenance["steps"], 12);
            assert_eq!((read_metadata.tap, &read_metadata.model_name), (metadata.tap, &metadata.model_name));
            // What SAELens added on the way is kept, and writing is then a fixed point.
            assert_eq!(
                read(&write(&again, &read_metadata).unwrap().config, &folder.weights).unwrap().1,
                read_metadata
            );
        }
        let top_k = sae(Activation::TopK { k: 2 }, 2);
        assert!(write(&top_k, &metadata).is_err());
        let skip = Sae::new(SaeParts { w_skip: Some(vec![0.5; 6]), ..top_k.clone().into_parts() }).unwrap();
        for sae in [top_k, skip] {
            let own = write_own(&sae, &metadata).unwrap();
            assert_eq!(read(&own.config, &own.weights).unwrap().0, sae);
        }
    }

    #[test]
    fn skip_connections_and_scaled_rows_read_back_equal() {
        let jump = Activation::JumpRelu { threshold: vec![0.1, 0.2, 0.0, 0.4, 0.5] };
        let top_k = Activation::TopK { k: 2 };
        let (none, skip) = (None, |d_out: usize| Some(vec![0.25f32; 3 * d_out]));
        let held = [
            (jump.clone(), 4, skip(4), RowScaling::None, "jumprelu_skip_transcoder"),
            (Activation::Relu, 3, skip(3), RowScaling::None, "skip_transcoder"),
            (jump, 3, none.clone(), RowScaling::LAYER_NORM, "jumprelu"),
            (top_k.clone(), 3, none.clone(), RowScaling::Norm, "topk"),
        ];
        let with = |activation, d_out, w_skip, rows| {
            let parts = sae(activation, d_out).into_parts();
            Sae::new(SaeParts { w_skip, rows, ..parts }).unwrap()
        };
        for (activation, d_out, w_skip, rows, architecture) in held {
            let sae = with(activation, d_out, w_skip, rows);
            let folder = write(&sae, &SaeMetadata::default()).unwrap();
            assert_eq!(read(&folder.config, &folder.weights).unwrap().0, sae);
            let mut cfg: Value = serde_json::from_slice(&folder.config).unwrap();
            assert_eq!(cfg["architecture"], architecture);
            // The weights must be what the architecture says.
            if sae.w_skip().is_some() {
                cfg["normalize_activations"] = "layer_norm".into();
                assert!(reread(&cfg, &folder.weights).unwrap_err().to_string().contains("not be undone"));
                cfg["normalize_activations"] = "none".into();
                cfg["architecture"] = architecture.replace("skip_", "").into();
                assert!(reread(&cfg, &folder.weights).unwrap_err().to_string().contains("W_skip"));
            }
        }
        for (activation, d_out, w_skip, rows) in [
            (top_k, 3, skip(3), RowScaling::None),
            (Activation::Relu, 4, none.clone(), RowScaling::LAYER_NORM),
            (Activation::Relu, 3, skip(3), RowScaling::Norm),
            (Activation::Relu, 3, none, RowScaling::Standardise { eps: 1e-3 }),
        ] {
            assert!(write(&with(activation, d_out, w_skip, rows), &SaeMetadata::default()).is_err());
        }
    }

    #[test]
    fn a_flat_configuration_means_what_it_meant() {
        let (_, weights) = folder();
        let plain = sae(Activation::Relu, 3);
        let flat = json!({"d_in": 3, "d_sae": 5, "dtype": "torch.float32", "hook_point": "blocks.2.hook_mlp_out",
            "model_name": "gpt2", "normalize_activations": false});
        let (read, metadata) = reread(&flat, &weights).unwrap();
        assert_eq!(*read.activation(), Activation::Relu);
        // `apply_b_dec_to_input` was the default, so the bias is folded.
        let shift = crate::reference::dot(plain.encoder_row(1), plain.b_dec());
        assert!((f64::from(read.b_enc()[1]) - (f64::from(plain.b_enc()[1]) - shift)).abs() < 1e-6);
        assert_eq!((metadata.tap, metadata.prepend_bos), (Some(TapPoint::new(Site::Mlp, 2)), Some(true)));

        let mut topk = flat.clone();
        topk["activation_fn_str"] = "topk".into();
        assert!(reread(&topk, &weights).is_err(), "k is missing");
        topk["activation_fn_kwargs"] = json!({"k": 2});
        assert_eq!(*reread(&topk, &weights).unwrap().0.activation(), Activation::TopK { k: 2 });
        topk["activation_fn_str"] = "tanh-relu".into();
        assert!(reread(&topk, &weights).is_err());
    }

    #[test]
    fn errors_name_part_field_wanted_and_found() {
        let (config, weights) = folder();
        let cases: [(&str, Value, &str); 8] = [
            ("architecture", json!("matching_pursuit"), "cfg.json: architecture"),
            ("normalize_activations", json!("covariance_whitening"), "cfg.json: normalize_activations"),
            ("architecture", json!("jumprelu_skip_transcoder"), "cfg.json: d_out"),
            ("d_in", json!(4), "cfg.json: d_in: wanted 3"),
            ("d_sae", json!(-5), "cfg.json: d_sae: wanted a positive whole number, found -5"),
            ("d_sae", json!(1e30), "cfg.json: d_sae"),
            ("apply_b_dec_to_input", json!("yes"), "cfg.json: apply_b_dec_to_input"),
            ("architecture", json!("gated"), "sae_weights.safetensors: b_mag"),
        ];
        for (key, value, wanted) in cases {
            let mut broken = config.clone();
            broken[key] = value;
            let error = reread(&broken, &weights).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
        for text in ["", "[]", "{}", "null", "{\"architecture\": 3}"] {
            assert!(read(text.as_bytes(), &weights).is_err(), "{text}");
        }
    }

    #[test]
    fn not_finite_weights_are_refused() {
        let (config, mut weights) = folder();
        let end = weights.len();
        weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(reread(&config, &weights).unwrap_err().to_string().contains("NaN"));
    }

    #[test]
    fn log_thresholds_and_scaling_factors_of_old_files() {
        let plain = sae(Activation::Relu, 3);
        let w_enc = transpose(plain.w_enc(), 5, 3);
        let tensors: [(&str, &[usize], &[f32]); 6] = [
            ("W_enc", &[3, 5], &w_enc),
            ("W_dec", &[5, 3], plain.w_dec()),
            ("b_enc", &[5], plain.b_enc()),
            ("b_dec", &[3], plain.b_dec()),
            ("log_threshold", &[5], &[0.0, -1.0, -2.0, -3.0, -4.0]),
            ("scaling_factor", &[5], &[2.0, 1.0, 1.0, 1.0, 1.0]),
        ];
        let weights = serialize(WEIGHTS, &tensors).unwrap();
        let (read, _) = reread(&folder().0, &weights).unwrap();
        assert_eq!(read.activation().threshold(0), Some(1.0));
        assert_eq!(read.decoder_direction(0)[0], 2.0 * plain.decoder_direction(0)[0]);
        assert_eq!(read.decoder_direction(1), plain.decoder_direction(1));
    }

    #[test]
    fn sparsity_is_log10_with_a_floor() {
        let bytes = sparsity(&[0.01, 0.0]).unwrap();
        let read = TensorFile::open(SPARSITY, &bytes).unwrap().exact("sparsity", &[2]).unwrap();
        assert!((read[0] + 2.0).abs() < 1e-4 && (read[1] + 10.0).abs() < 1e-4);
    }
}
