//! Autoencoders on disk: which format a path holds, reading it, and writing one atomically.

use std::fs::{self, File};
use std::io::{BufReader, Cursor};
use std::path::Path;

use anyhow::{Context, Result, bail};
use shared::Sae;
use shared::format::{SaeMetadata, gemma_scope, saelens};

use crate::files;

/// An autoencoder and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct SaeFile {
    /// The weights.
    pub sae: Sae,
    /// Where they come from and what they read.
    pub metadata: SaeMetadata,
}

/// A file format autoencoders can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SaeFormat {
    /// A SAELens 6 folder: `cfg.json` and `sae_weights.safetensors`.
    #[value(name = "saelens")]
    SaeLens,
    /// A Gemma Scope `params.npz`, alone in a folder or as a file.
    GemmaScope,
}

/// Where the autoencoder at a path lies and how it is to be read.
enum Found<'a> {
    SaeLens { config: Box<Path>, weights: Box<Path> },
    Npz(Box<Path>),
    Params2(Box<Path>),
    Nothing(&'a Path),
}

/// Whether `path` holds an autoencoder in a format [`read`] knows, judged by its files' names only.
#[must_use]
pub fn is_sae(path: &Path) -> bool {
    !matches!(locate(path), Found::Nothing(_))
}

fn locate(path: &Path) -> Found<'_> {
    if path.is_dir() {
        let within = |name: &str| Some(path.join(name)).filter(|p| p.is_file()).map(Into::into);
        let files = (within(saelens::CONFIG), within(saelens::WEIGHTS));
        return match (files, within(gemma_scope::PARAMS), within(gemma_scope::PARAMS_2)) {
            ((Some(config), Some(weights)), ..) => Found::SaeLens { config, weights },
            (_, Some(npz), _) => Found::Npz(npz),
            (_, _, Some(params)) => Found::Params2(params),
            _ => Found::Nothing(path),
        };
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz") if path.is_file() => Found::Npz(path.into()),
        Some("safetensors") if path.is_file() => {
            let config = path.with_file_name(saelens::CONFIG);
            if config.is_file() {
                Found::SaeLens { config: config.into(), weights: path.into() }
            } else {
                Found::Params2(path.into())
            }
        }
        _ => Found::Nothing(path),
    }
}

/// Reads the autoencoder at `path`: a SAELens folder (or its weight file), a folder with a Gemma Scope `params.npz` or
/// `params.safetensors`, or such a file itself.
///
/// # Errors
/// If nothing readable is there; the message names the file, the field, what was wanted and found.
pub fn read(path: &Path) -> Result<SaeFile> {
    let bytes = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let wrong = || format!("cannot use the autoencoder at {}", path.display());
    let only = |sae| SaeFile { sae, metadata: SaeMetadata::default() };
    match locate(path) {
        Found::SaeLens { config, weights } => {
            let (sae, metadata) = saelens::read(&bytes(&config)?, &bytes(&weights)?).with_context(wrong)?;
            Ok(SaeFile { sae, metadata })
        }
        Found::Npz(npz) => {
            let file = File::open(&npz).with_context(|| format!("cannot open {}", npz.display()))?;
            gemma_scope::read(BufReader::with_capacity(1 << 20, file)).with_context(wrong).map(only)
        }
        Found::Params2(params) => {
            // Without a configuration only the format that leaves nothing to guess can be read.
            gemma_scope::read_safetensors(&bytes(&params)?)
                .with_context(|| format!("{} (read without a cfg.json beside it)", wrong()))
                .map(only)
        }
        Found::Nothing(path) if path.exists() => bail!(
            "{} holds no autoencoder: wanted cfg.json with sae_weights.safetensors, params.npz or params.safetensors",
            path.display()
        ),
        Found::Nothing(path) => bail!("{} does not exist", path.display()),
    }
}

/// Writes `file` at `path`: a folder for [`SaeFormat::SaeLens`], a folder or `.npz` path for
/// [`SaeFormat::GemmaScope`] (which has no place for metadata). Each file appears whole or not at all.
///
/// # Errors
/// If the format cannot hold the autoencoder or the disk refuses.
pub fn write(path: &Path, format: SaeFormat, file: &SaeFile) -> Result<()> {
    match format {
        SaeFormat::SaeLens => {
            let folder = saelens::write(&file.sae, &file.metadata)?;
            // The configuration comes last: a folder that has one is complete.
            files::write_bytes(&path.join(saelens::WEIGHTS), &folder.weights)?;
            files::write_bytes(&path.join(saelens::CONFIG), &folder.config)
        }
        SaeFormat::GemmaScope => {
            let mut bytes = Cursor::new(Vec::new());
            gemma_scope::write(&file.sae, &mut bytes)?;
            let is_file = path.extension().is_some_and(|e| e == "npz");
            let target = if is_file { path.to_path_buf() } else { path.join(gemma_scope::PARAMS) };
            files::write_bytes(&target, bytes.get_ref())
        }
    }
}

/// Adds `sparsity.safetensors` to a SAELens folder: log10 of the firing frequency of each latent, `density [n]`.
///
/// # Errors
/// If the disk refuses.
pub fn write_density(folder: &Path, density: &[f32]) -> Result<()> {
    files::write_bytes(&folder.join(saelens::SPARSITY), &saelens::sparsity(density)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::{Activation, SaeParts};

    fn file() -> SaeFile {
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, -1.0, 1.0],
            b_enc: vec![0.5, 0.0, 0.25],
            w_dec: vec![2.0, 0.0, 0.0, 3.0, 1.0, 1.0],
            b_dec: vec![0.125, -0.125],
            activation: Activation::JumpRelu { threshold: vec![1.0, 1.0, 0.125] },
        });
        SaeFile { sae: sae.unwrap(), metadata: SaeMetadata::default() }
    }

    #[test]
    fn both_formats_come_back_from_folder_and_file() {
        let folder = tempfile::tempdir().unwrap();
        let (lens, scope) = (folder.path().join("lens"), folder.path().join("scope"));
        write(&lens, SaeFormat::SaeLens, &file()).unwrap();
        write(&scope, SaeFormat::GemmaScope, &file()).unwrap();
        let npz = folder.path().join("x.npz");
        write(&npz, SaeFormat::GemmaScope, &file()).unwrap();
        for path in
            [lens.clone(), lens.join("sae_weights.safetensors"), scope.clone(), scope.join("params.npz"), npz]
        {
            assert!(is_sae(&path));
            assert_eq!(read(&path).unwrap().sae, file().sae, "{}", path.display());
        }
        fs::remove_file(lens.join("cfg.json")).unwrap();
        assert!(!is_sae(&lens));
        assert!(read(&lens).is_err());
        let alone = format!("{:#}", read(&lens.join("sae_weights.safetensors")).unwrap_err());
        assert!(alone.contains("without a cfg.json"), "{alone}");
        assert!(
            format!("{:#}", read(&folder.path().join("nowhere")).unwrap_err()).contains("does not exist")
        );
    }
}
