//! `stratascope inspect`: what a path holds, told by what is in it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shared::certify::norm;
use shared::{Activation, RowScaling, Sae};

use crate::model;
use crate::progress;
use crate::sae_files::{self, SaeFile};
use crate::store::Store;
use crate::store::describe::bytes;
use crate::store::place::is_url;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Tells the kind by content: an autoencoder, a store, a pack or a language model.

Examples:
  stratascope inspect runs/a --json
  stratascope inspect s3://bucket/store --verify")]
pub(crate) struct Args {
    /// A file or folder; for a store also s3://bucket/prefix or gs://bucket/prefix.
    #[arg(value_name = "PATH|URL")]
    path: PathBuf,
    /// Read every file of a store and compare its checksums; says how fast that went.
    #[arg(long)]
    verify: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let path = &args.path;
    let (mut text, mut value) = describe(path)?;
    if args.verify {
        ensure!(value["kind"] == "store", "--verify is for stores; {} is none", path.display());
        let (line, figures) = verify(&Store::open(path)?)?;
        text.push_str(&line);
        value["verified"] = figures;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &value)?;
        out.write_all(b"\n")?;
    } else {
        out.write_all(text.as_bytes())?;
    }
    Ok(())
}

/// Reads all of a store; what is to be said of it.
fn verify(store: &Store) -> Result<(String, Value)> {
    let total: u64 = store.manifest().files().iter().map(|(_, file)| file.bytes).sum();
    let bar = progress::bar(total, "verify", "B");
    let started = Instant::now();
    store.verify(|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let rate = total as f64 / seconds / 1e9;
    let line = format!(
        "  verified   {} in {seconds:.1} s, {rate:.2} GB/s: every file is what it was\n",
        bytes(total)
    );
    Ok((line, json!({"bytes": total, "seconds": seconds})))
}

fn describe_store(path: &Path) -> Result<(String, Value)> {
    let store = Store::open(path)?;
    let mut value = serde_json::to_value(store.manifest())?;
    value["kind"] = "store".into();
    value["manifest_sha256"] = store.manifest_sha256().into();
    Ok((store.describe(), value))
}

/// What is at `path`, for people and for machines.
fn describe(path: &Path) -> Result<(String, Value)> {
    if is_url(path) {
        return describe_store(path);
    }
    if sae_files::is_sae(path) {
        let value = sae_summary(&sae_files::read_whole(path)?);
        return Ok((lines(&format!("autoencoder {}", path.display()), &value), value));
    }
    if path.join("pack.json").is_file() {
        let bytes =
            fs::read(path.join("pack.json")).with_context(|| format!("cannot read {}", path.display()))?;
        let pack = shared::pack::Manifest::read(&bytes)?;
        let mut value = serde_json::to_value(&pack)?;
        let bytes: u64 = pack.files.values().map(|file| file.bytes).sum();
        let mut brief = value.clone();
        brief["files"] = format!("{} files, {bytes} bytes", pack.files.len()).into();
        brief["density_histogram"] = Value::Null;
        value["kind"] = "pack".into();
        return Ok((lines(&format!("pack {}", path.display()), &brief), value));
    }
    if path.join("manifest.json").is_file() {
        return describe_store(path);
    }
    let is_gguf = |p: &Path| p.extension().is_some_and(|e| e == "gguf");
    let holds_gguf = || fs::read_dir(path).is_ok_and(|entries| entries.flatten().any(|e| is_gguf(&e.path())));
    if is_gguf(path) || path.join("config.json").is_file() || holds_gguf() {
        let (model, provenance) = model::load_weights(path)?;
        let value = json!({"kind": "model", "provenance": provenance, "spec": model.spec()});
        return Ok((lines(&format!("language model {}", path.display()), &value), value));
    }
    if !path.exists() {
        bail!("{} does not exist", path.display());
    }
    bail!(
        "{} is nothing known: wanted an autoencoder (docs/formats.md lists the formats), a store \
         (manifest.json), a pack (pack.json) or a model (config.json, .gguf)",
        path.display()
    )
}

fn sae_summary(file: &SaeFile) -> Value {
    let sae = &file.sae;
    let dims = sae.dims();
    let n = dims.n_latents;
    let (activation, threshold) = match sae.activation() {
        Activation::JumpRelu { threshold } => ("jumprelu".to_owned(), quantiles(threshold.clone())),
        Activation::Relu => ("relu".to_owned(), Value::Null),
        Activation::TopK { k } => (format!("top-k, k = {k}"), Value::Null),
    };
    let rows = match sae.rows() {
        RowScaling::None => Value::Null,
        RowScaling::Standardise { eps } => format!("each standardised on its own, ε = {eps}").into(),
        RowScaling::Norm => "each scaled to a norm of √d".into(),
    };
    let cosine = |i: usize| {
        let (e, d) = (sae.encoder_row(i), sae.decoder_direction(i));
        #[expect(clippy::cast_possible_truncation, reason = "a summary")]
        let dot = shared::reference::dot(e, d) as f32;
        dot / (norm(e) * norm(d)).max(f32::MIN_POSITIVE)
    };
    let tied = if dims.d_in == dims.d_out { quantiles((0..n).map(cosine).collect()) } else { Value::Null };
    json!({
        "kind": "sae",
        "d_in": dims.d_in,
        "d_out": dims.d_out,
        "n_latents": n,
        "activation": activation,
        "rows": rows,
        "skip_norm": sae.w_skip().map(norm),
        "threshold": threshold,
        "encoder_norm": quantiles((0..n).map(|i| norm(sae.encoder_row(i))).collect()),
        "decoder_norm": quantiles((0..n).map(|i| norm(sae.decoder_direction(i))).collect()),
        "encoder_decoder_cosine": tied,
        "b_enc": quantiles(sae.b_enc().to_vec()),
        "b_dec_norm": norm(sae.b_dec()),
        "zero_directions": zero_directions(sae),
        "metadata": file.metadata,
    })
}

fn zero_directions(sae: &Sae) -> usize {
    (0..sae.dims().n_latents).filter(|&i| sae.decoder_direction(i).iter().all(|&d| d == 0.0)).count()
}

/// Minimum, quartiles and maximum.
fn quantiles(mut values: Vec<f32>) -> Value {
    values.sort_unstable_by(f32::total_cmp);
    let at = |quarter: usize| values.get(quarter * (values.len().max(1) - 1) / 4).copied();
    json!({"min": at(0), "q25": at(1), "median": at(2), "q75": at(3), "max": at(4)})
}

/// One line a field; nested objects on one line, nothing for what is absent.
fn lines(title: &str, value: &Value) -> String {
    let mut text = format!("{title}\n");
    for (key, value) in value.as_object().into_iter().flatten() {
        let shown = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Object(fields) => {
                let fields = fields.iter().filter(|(_, v)| !v.is_null());
                fields.map(|(k, v)| format!("{k} {}", short(v))).collect::<Vec<_>>().join(", ")
            }
            other => short(other),
        };
        if key != "kind" && !shown.is_empty() {
            text.push_str(&format!("  {key:<22} {shown}\n"));
        }
    }
    text
}

fn short(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(x) if number.is_f64() => format!("{x:.4}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use shared::SaeParts;
    use shared::format::SaeMetadata;

    use super::*;
    use crate::sae_files::SaeFormat;

    #[test]
    fn an_autoencoder_is_told_from_other_things() {
        let parts = SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![3.0, 4.0, 0.0, 1.0, -1.0, 0.0],
            b_enc: vec![0.5, 0.0, 0.25],
            w_dec: vec![0.6, 0.8, 0.0, 0.0, 1.0, 0.0],
            b_dec: vec![0.0, 2.0],
            activation: Activation::JumpRelu { threshold: vec![0.1, 0.3, 0.2] },
            w_skip: None,
            rows: RowScaling::None,
        };
        let folder = tempfile::tempdir().unwrap();
        let file = SaeFile { sae: Sae::new(parts).unwrap(), metadata: SaeMetadata::default() };
        sae_files::write(&folder.path().join("sae"), SaeFormat::SaeLens, &file).unwrap();
        let (text, value) = describe(&folder.path().join("sae")).unwrap();
        assert_eq!((value["kind"].as_str(), value["n_latents"].as_u64()), (Some("sae"), Some(3)));
        assert_eq!(value["zero_directions"], 1);
        let close = |value: &Value, wanted: f64| (value.as_f64().unwrap() - wanted).abs() < 1e-4;
        assert!(close(&value["threshold"]["median"], 0.2) && close(&value["encoder_norm"]["max"], 5.0));
        assert!(close(&value["b_dec_norm"], 2.0));
        assert!(text.contains("jumprelu") && text.contains("median 0.2000"), "{text}");
        assert!(value["rows"].is_null() && value["skip_norm"].is_null() && !text.contains("rows"), "{text}");
        let parts = SaeParts { rows: RowScaling::LAYER_NORM, ..file.sae.into_parts() };
        let file = SaeFile { sae: Sae::new(parts).unwrap(), metadata: SaeMetadata::default() };
        assert!(lines("x", &sae_summary(&file)).contains("each standardised on its own, ε = 0.00001"));
        let parts = SaeParts { w_skip: Some(vec![3.0, 0.0, 0.0, 4.0]), ..file.sae.into_parts() };
        let file = SaeFile { sae: Sae::new(parts).unwrap(), metadata: SaeMetadata::default() };
        assert!(close(&sae_summary(&file)["skip_norm"], 5.0));

        let nothing = format!("{:#}", describe(folder.path()).unwrap_err());
        assert!(nothing.contains("is nothing known"), "{nothing}");
        assert!(describe(&folder.path().join("absent")).unwrap_err().to_string().contains("does not exist"));
        fs::write(folder.path().join("manifest.json"), "{}").unwrap();
        assert!(describe(folder.path()).is_err());
    }
}
