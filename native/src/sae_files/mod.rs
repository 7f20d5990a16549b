//! Autoencoders on disk: reading one of any supported format, and writing one atomically.
//!
//! `found` decides which format a path holds; `named` fetches what is no path but a name on the Hugging Face hub.

mod found;
mod named;
mod part;

use std::fs::{self, File};
use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use shared::Sae;
use shared::format::{
    FormatError, SaeMetadata, dictionary_learning, gemma_scope, gemma_scope_2, mlsae, openai, openmoss,
    saelens, sparsify,
};
use shared::multi_layer::{self, MultiLayer};
use shared::tap::TapPoint;

use crate::files;
use crate::hub::Settings;
use found::{Found, locate};
use named::Named;

/// The file beside a multi-layer SAE's weights that says which layers it reads (docs/formats.md).
const LAYERS: &str = "multi_layer.json";

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
    /// A Gemma Scope 2 folder: `config.json` and `params.safetensors`.
    #[value(name = "gemma-scope-2")]
    GemmaScope2,
    /// A dictionary_learning folder: `ae.pt` and `config.json`.
    DictionaryLearning,
    /// A file of OpenAI's sparse_autoencoder (ReLU only).
    #[value(name = "openai")]
    OpenAi,
    /// A sparsify folder: `cfg.json` and `sae.safetensors` (top-k only).
    Sparsify,
    /// A Llamascopium folder of OpenMOSS: `config.json` and `sae_weights.safetensors`.
    #[value(name = "openmoss")]
    OpenMoss,
    /// An mlsae folder: `config.json` and `model.safetensors` (top-k only).
    Mlsae,
}

impl SaeFormat {
    /// Every format.
    pub const ALL: [Self; 8] = [
        Self::SaeLens,
        Self::GemmaScope,
        Self::GemmaScope2,
        Self::DictionaryLearning,
        Self::OpenAi,
        Self::Sparsify,
        Self::OpenMoss,
        Self::Mlsae,
    ];
}

/// Whether `path` holds an autoencoder in a format [`read`] knows, or is the name of one on the hub. Judged by names.
#[must_use]
pub fn is_sae(path: &Path) -> bool {
    !matches!(locate(path), Found::Nothing) || name(path).is_some()
}

/// The name on the hub that `path` is, if nothing lies there.
fn name(path: &Path) -> Option<Named> {
    if path.exists() { None } else { named::parse(path.to_str()?) }
}

/// Reads the autoencoder at `path`: a folder or file of any format this program knows (docs/formats.md), or the name of one
/// on the Hugging Face hub, such as `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. After a `#` stands the layer of a
/// multi-layer SAE that is wanted: `runs/all#resid.14`.
///
/// # Errors
/// If nothing readable is there; the message names the file, the field, what was wanted and found.
pub fn read(path: &Path) -> Result<SaeFile> {
    if let Some((folder, tap)) = layer_of(path)
        && !path.exists()
    {
        return read_layer(&folder, tap);
    }
    let file = read_whole(path)?;
    if let Some(layers) = file.metadata.layers.as_ref().filter(|layers| !layers.is_one()) {
        let first = layers.layers.first().map_or_else(String::new, |layer| format!("#{}", layer.tap));
        bail!(
            "{} reads {} layers, each in its own units: name one, as in {}{first}",
            path.display(),
            layers.layers.len(),
            path.display()
        );
    }
    Ok(file)
}

/// [`read`], but a multi-layer SAE as it is, in units of its layers.
///
/// # Errors
/// As [`read`].
pub fn read_whole(path: &Path) -> Result<SaeFile> {
    if let Some(named) = name(path) {
        let mut file = read_local(&named.fetch(&Settings::from_env()?)?)?;
        named.describe(&mut file.metadata);
        return Ok(file);
    }
    read_local(path)
}

fn read_local(path: &Path) -> Result<SaeFile> {
    let wrong = || format!("cannot use the autoencoder at {}", path.display());
    let only = |sae| SaeFile { sae, metadata: SaeMetadata::default() };
    let both = |(sae, metadata)| SaeFile { sae, metadata };
    match locate(path) {
        Found::SaeLens { config, weights } => {
            let (sae, mut metadata) =
                saelens::read(&bytes(&config)?, &bytes(&weights)?).with_context(wrong)?;
            let layers = config.with_file_name(LAYERS);
            if layers.is_file() {
                let broken = || format!("{} is broken", layers.display());
                let mut parsed: MultiLayer = serde_json::from_slice(&bytes(&layers)?).with_context(broken)?;
                if parsed.has_tensors() {
                    let tensors = bytes(&config.with_file_name(multi_layer::TENSORS))?;
                    parsed.read_tensors(&tensors, sae.dims()).with_context(wrong)?;
                }
                metadata.layers = Some(parsed);
            }
            Ok(SaeFile { sae, metadata })
        }
        Found::Npz(npz) => gemma_scope::read(open(&npz)?).with_context(wrong).map(only),
        Found::Params2(params) => {
            // Without a configuration of its own only the format that leaves nothing to guess can be read.
            let config = params.with_file_name(gemma_scope_2::CONFIG);
            let its_own = params.file_name().is_some_and(|name| name == gemma_scope_2::PARAMS);
            let config = if its_own && config.is_file() { Some(bytes(&config)?) } else { None };
            gemma_scope_2::read(config.as_deref(), &bytes(&params)?)
                .with_context(|| format!("{} (read without a cfg.json beside it)", wrong()))
                .map(both)
        }
        Found::Torch(weights) => {
            if openai::is_openai(open(&weights)?) {
                return openai::read(open(&weights)?).with_context(wrong).map(only);
            }
            let config = weights.with_file_name(dictionary_learning::CONFIG);
            let config = if config.is_file() { Some(bytes(&config)?) } else { None };
            dictionary_learning::read(config.as_deref(), open(&weights)?).with_context(wrong).map(both)
        }
        Found::Sparsify { config, weights } => {
            let folder = weights.parent().and_then(Path::file_name).and_then(|name| name.to_str());
            sparsify::read(&bytes(&config)?, &bytes(&weights)?, folder.unwrap_or_default())
                .with_context(wrong)
                .map(both)
        }
        Found::Mlsae { config, weights } => {
            let weights = part::tensors(&weights, mlsae::is_weight)?;
            mlsae::read(&bytes(&config)?, &weights).with_context(wrong).map(both)
        }
        Found::OpenMoss { config, weights } => {
            openmoss::read(&bytes(&config)?, &bytes(&weights)?).with_context(wrong).map(both)
        }
        Found::Nothing if path.exists() => {
            bail!("{} holds no autoencoder: wanted {}", path.display(), found::WANTED)
        }
        Found::Nothing => bail!("{} does not exist", path.display()),
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(BufReader::with_capacity(1 << 20, file))
}

/// Writes `file` at `path`: a folder, or for formats of a single file also a path with that file's extension (`.npz`,
/// `.pt`). Each file appears whole or not at all; a configuration comes last, so that a folder that has one is complete.
///
/// # Errors
/// If the format cannot hold the autoencoder or the disk refuses.
pub fn write(path: &Path, format: SaeFormat, file: &SaeFile) -> Result<()> {
    match format {
        SaeFormat::SaeLens => write_folder(path, &saelens::write(&file.sae, &file.metadata)?, &file.metadata),
        SaeFormat::GemmaScope => {
            single(path, "npz", gemma_scope::PARAMS, |target| gemma_scope::write(&file.sae, target))
        }
        SaeFormat::GemmaScope2 => {
            let (config, params) = gemma_scope_2::write(&file.sae, &file.metadata)?;
            files::write_bytes(&path.join(gemma_scope_2::PARAMS), &params)?;
            files::write_bytes(&path.join(gemma_scope_2::CONFIG), &config)
        }
        SaeFormat::DictionaryLearning => {
            let mut weights = Cursor::new(Vec::new());
            let config = dictionary_learning::write(&file.sae, &file.metadata, &mut weights)?;
            files::write_bytes(&path.join(dictionary_learning::WEIGHTS), weights.get_ref())?;
            files::write_bytes(&path.join(dictionary_learning::CONFIG), &config)
        }
        SaeFormat::Sparsify => {
            let (config, weights) = sparsify::write(&file.sae, &file.metadata)?;
            files::write_bytes(&path.join(sparsify::WEIGHTS), &weights)?;
            files::write_bytes(&path.join(sparsify::CONFIG), &config)
        }
        SaeFormat::OpenMoss => {
            let (config, weights) = openmoss::write(&file.sae, &file.metadata)?;
            files::write_bytes(&path.join(openmoss::WEIGHTS), &weights)?;
            files::write_bytes(&path.join(openmoss::CONFIG), &config)
        }
        SaeFormat::Mlsae => {
            let (config, weights) = mlsae::write(&file.sae, &file.metadata)?;
            files::write_bytes(&path.join(mlsae::WEIGHTS), &weights)?;
            files::write_bytes(&path.join(mlsae::CONFIG), &config)
        }
        SaeFormat::OpenAi => single(path, "pt", openai::WEIGHTS, |target| openai::write(&file.sae, target)),
    }
}

/// Writes what was trained as a SAELens folder at `path`. A top-k transcoder, which SAELens does not have, is written in the
/// same layout all the same, with a warning: this program reads it.
///
/// # Errors
/// If the disk refuses.
pub fn release(path: &Path, file: &SaeFile) -> Result<()> {
    let folder = saelens::write(&file.sae, &file.metadata).or_else(|error| {
        let own = saelens::write_own(&file.sae, &file.metadata)?;
        tracing::warn!("{} can be read by this program only: {error}", path.display());
        Ok::<_, FormatError>(own)
    })?;
    write_folder(path, &folder, &file.metadata)
}

/// Writes the files of a SAELens folder, with the layers of a multi-layer SAE beside them.
fn write_folder(path: &Path, folder: &saelens::Folder, metadata: &SaeMetadata) -> Result<()> {
    if let Some(layers) = &metadata.layers {
        if let Some(tensors) = layers.write_tensors()? {
            files::write_bytes(&path.join(multi_layer::TENSORS), &tensors)?;
        }
        files::write_bytes(&path.join(LAYERS), &serde_json::to_vec_pretty(layers)?)?;
    }
    files::write_bytes(&path.join(saelens::WEIGHTS), &folder.weights)?;
    files::write_bytes(&path.join(saelens::CONFIG), &folder.config)
}

/// What `path` says after a `#`: the layer of a multi-layer SAE, such as `runs/all#resid.14`.
fn layer_of(path: &Path) -> Option<(PathBuf, TapPoint)> {
    let (folder, tap) = path.to_str()?.rsplit_once('#')?;
    Some((PathBuf::from(folder), tap.parse().ok()?))
}

/// [`read`] of a single layer: of a multi-layer SAE as it is for raw activations there.
fn read_layer(folder: &Path, tap: TapPoint) -> Result<SaeFile> {
    let mut file = read_whole(folder)?;
    let layers = file.metadata.layers.take();
    let layers = layers.with_context(|| format!("{} is no multi-layer autoencoder", folder.display()))?;
    let number = layers.find(tap).with_context(|| {
        let names: Vec<String> = layers.layers.iter().map(|layer| layer.tap.to_string()).collect();
        format!("{} was not trained on {tap}, but on {}", folder.display(), names.join(", "))
    })?;
    file.sae = layers.at(&file.sae, number).with_context(|| folder.display().to_string())?;
    file.metadata.tap = Some(tap);
    // Behind a lens the limit is one of translated vectors, and says nothing about raw ones.
    let limit = layers.layers[number].max_input_norm.filter(|_| !layers.translated);
    let limit = serde_json::json!(limit);
    file.metadata.provenance.insert(crate::input_limit::PROVENANCE_KEY.to_owned(), limit);
    Ok(file)
}

/// Writes the one file of a format: at `path` if it ends in `extension`, else as `name` in the folder `path`.
fn single(
    path: &Path,
    extension: &str,
    name: &str,
    write: impl FnOnce(&mut Cursor<Vec<u8>>) -> Result<(), FormatError>,
) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    write(&mut bytes)?;
    let is_file = path.extension().is_some_and(|e| e == extension);
    let target = if is_file { path.to_path_buf() } else { path.join(name) };
    files::write_bytes(&target, bytes.get_ref())
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
    use shared::{Activation, RowScaling, SaeParts};

    fn file() -> SaeFile {
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, -1.0, 1.0],
            b_enc: vec![0.5, 0.0, 0.25],
            w_dec: vec![2.0, 0.0, 0.0, 3.0, 1.0, 1.0],
            b_dec: vec![0.125, -0.125],
            activation: Activation::JumpRelu { threshold: vec![1.0, 1.0, 0.125] },
            w_skip: None,
            rows: RowScaling::None,
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
