//! `stratascope encode`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use shared::format::tensors::TensorFile;
use shared::{Codes, Dims, Rows};

use crate::backend::Backend;
use crate::{cuda, files, sae_files};

/// Rows encoded and written at a time.
const CHUNK_ROWS: usize = 1024;
/// Dense latents are mostly zeros; beyond this the file would be of no use.
const LARGEST_OUTPUT: u64 = 64 << 30;

/// Arguments of `encode`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Reads `x` [n, d_in] (f32, f16, bf16 or f64) and writes, in f32, `features` [n, width], dense, and \
`reconstruction` [n, d_out]. The active set is that of exact arithmetic, on the processor and on a card; values of a card are \
f32 sums, those of the processor f64 sums rounded once. Where an autoencoder normalises vectors one by one, \
features are in the units of the normalised vector, reconstructions in those of the given one.

Example:
  stratascope encode --sae gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 --input x.safetensors --out codes.safetensors")]
pub(crate) struct Args {
    /// The autoencoder: a folder or file of any format in docs/formats.md, or its name on the hub.
    #[arg(long, value_name = "PATH")]
    sae: PathBuf,
    /// A safetensors file with `x` [n, d_in].
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What encodes: auto (a card where there is one), cpu, or a card such as cuda:0.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: cuda::Choice,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let sae = sae_files::read(&args.sae)?.sae;
    let Dims { d_in, d_out, n_latents } = sae.dims();
    let x = read_inputs(&args.input, d_in)?;
    let n_rows = x.len() / d_in;
    let sizes = [n_latents, d_out].map(|width| n_rows as u64 * width as u64 * 4);
    ensure!(
        sizes[0].saturating_add(sizes[1]) <= LARGEST_OUTPUT,
        "{n_rows} rows over {n_latents} latents make {} GiB of dense features; the limit is {} GiB: encode fewer rows at a time",
        sizes[0] >> 30,
        LARGEST_OUTPUT >> 30
    );
    let header = header(&[("features", n_rows, n_latents), ("reconstruction", n_rows, d_out)]);
    let device = cuda::open(args.device)?;
    let backend = Backend::new(sae, device.as_ref())?;
    let mut n_active = 0;
    files::write_atomic(&args.out, |out| {
        out.write_all(&header)?;
        // Features go out as they are made; only the sparse codes stay, for the reconstructions behind them.
        let mut all: Vec<Codes> = Vec::new();
        for start in (0..n_rows).step_by(CHUNK_ROWS) {
            let end = (start + CHUNK_ROWS).min(n_rows);
            let rows = Rows::new(&x[start * d_in..end * d_in], d_in).map_err(io::Error::other)?;
            let codes = backend.encode(rows).map_err(io::Error::other)?;
            let mut dense = vec![0.0; n_latents];
            for (latents, values) in codes.iter() {
                dense.fill(0.0);
                for (&latent, &value) in latents.iter().zip(values) {
                    dense[latent as usize] = value;
                }
                write_values(out, &dense)?;
            }
            n_active += codes.n_active();
            all.push(codes);
        }
        for (codes, x) in all.iter().zip(x.chunks(CHUNK_ROWS * d_in)) {
            let rows = Rows::new(x, d_in).map_err(io::Error::other)?;
            write_values(out, &backend.decode(rows, codes).map_err(io::Error::other)?)?;
        }
        Ok(())
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
    let l0 = n_active as f64 / n_rows.max(1) as f64;
    tracing::info!("encoded {n_rows} rows, mean L0 {l0:.1}, into {}", args.out.display());
    Ok(())
}

fn read_inputs(path: &std::path::Path, d_in: usize) -> Result<Vec<f32>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let part = path.display().to_string();
    let (n_rows, width, x) = TensorFile::open(&part, &bytes)?.matrix("x")?;
    ensure!(width == d_in, "{part}: x: wanted {d_in} columns, as the autoencoder has inputs, found {width}");
    if let Some(at) = x.iter().position(|v| !v.is_finite()) {
        anyhow::bail!("{part}: x: wanted finite numbers, found {} in row {} of {n_rows}", x[at], at / d_in);
    }
    Ok(x)
}

/// The header of a safetensors file of f32 matrices `(name, rows, columns)`, padded so that values are aligned.
fn header(tensors: &[(&str, usize, usize)]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    let mut offset = 0u64;
    for &(name, rows, cols) in tensors {
        let end = offset + rows as u64 * cols as u64 * 4;
        let entry = serde_json::json!({"dtype": "F32", "shape": [rows, cols], "data_offsets": [offset, end]});
        entries.insert(name.to_owned(), entry);
        offset = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

fn write_values(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(values.len().min(1 << 16) * 4);
    for chunk in values.chunks(1 << 16) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|v| v.to_le_bytes()));
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use shared::format::SaeMetadata;
    use shared::format::tensors::serialize;
    use shared::{Activation, RowScaling, Sae, SaeParts, reference};

    use super::*;
    use crate::sae_files::{SaeFile, SaeFormat};

    #[test]
    fn features_and_reconstructions_reach_the_file_across_chunks() {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        let parts = SaeParts {
            d_in: 3,
            d_out: 3,
            w_enc: wave(21, 0.1),
            b_enc: wave(7, 0.2),
            w_dec: wave(21, 0.3),
            b_dec: wave(3, 0.4),
            activation: Activation::JumpRelu { threshold: vec![0.3; 7] },
            w_skip: None,
            rows: RowScaling::None,
        };
        let sae = Sae::new(parts).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let file = SaeFile { sae: sae.clone(), metadata: SaeMetadata::default() };
        sae_files::write(&path("sae"), SaeFormat::SaeLens, &file).unwrap();
        let n_rows = CHUNK_ROWS + 5;
        let x = wave(n_rows * 3, 0.9);
        files::write_bytes(&path("x"), &serialize("x", &[("x", &[n_rows, 3], &x)]).unwrap()).unwrap();
        let (sae_path, device) = (path("sae"), cuda::Choice::Cpu);
        let mut args = Args { sae: sae_path, input: path("x"), out: path("out"), device };
        run(&args).unwrap();
        let bytes = fs::read(path("out")).unwrap();
        let out = TensorFile::open("out", &bytes).unwrap();
        let codes = reference::encode(&sae, Rows::new(&x, 3).unwrap()).unwrap();
        assert_eq!(out.exact("features", &[n_rows, 7]).unwrap(), codes.to_dense());
        let reconstruction = out.exact("reconstruction", &[n_rows, 3]).unwrap();
        assert_eq!(reconstruction, reference::decode(&sae, Rows::new(&x, 3).unwrap(), &codes).unwrap());

        for (name, shape, values) in [
            ("narrow", vec![2, 2], vec![0.5; 4]),
            ("nan", vec![1, 3], vec![0.5, f32::NAN, 0.5]),
            ("flat", vec![3], vec![0.5; 3]),
        ] {
            files::write_bytes(&path(name), &serialize("x", &[("x", &shape, &values)]).unwrap()).unwrap();
            args.input = path(name);
            assert!(run(&args).is_err(), "{name}");
        }
    }
}
