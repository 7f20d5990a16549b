//! Finding and loading language models and tokenizers: Hugging Face folders and GGUF files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use shared::Precision;
use shared::lm::{Blueprint, BosHints, CandleOps, LanguageModel, Tokenizer};

use crate::files::{sha256, sha256_file};
use crate::hub::{self, ModelId, Need};

mod files;
mod products;
mod threads;

use files::{GgufFile, Shards, read_small, weight_files};
use products::CpuProducts;
pub use threads::Rayon;

/// A model with its tokenizer and where both came from.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model, ready to run.
    pub model: LanguageModel,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Where it came from.
    pub provenance: ModelProvenance,
}

/// Where a model came from, as written into stores, runs and packs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelProvenance {
    /// The model's own name for itself, else the name of its folder or file.
    pub name: String,
    /// The path given, without the machine's folders: its last component. Of the hub: `org/name@commit`.
    pub source: String,
    /// `huggingface` or `gguf`.
    pub format: String,
    /// SHA-256 of the GGUF or of `model.safetensors`; of the list of the shards' SHA-256 when there are several.
    pub sha256: String,
    /// The architecture, as in [`shared::lm::Spec`].
    pub architecture: String,
    /// The number format its matrices were run in.
    #[serde(default)]
    pub precision: Precision,
}

/// Loads a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`), a GGUF file, a folder holding
/// exactly one GGUF file, or a model of the Hugging Face hub (`org/name@revision`), which is fetched if need be. It
/// runs in f32.
///
/// # Errors
/// If the path holds none of these, or what it holds is broken or not supported.
pub fn load(path: &Path) -> Result<LoadedModel> {
    load_as(path, Precision::F32)
}

/// [`load`], to run in `precision`.
///
/// # Errors
/// As [`load`].
pub fn load_as(path: &Path, precision: Precision) -> Result<LoadedModel> {
    let (found, source) = find(path, Need { weights: true, tokenizer: true })?;
    let tokenizer = found.tokenizer()?;
    let (model, provenance) = found.weights(source, precision)?;
    let (ids, rows) = (tokenizer.base_vocab_size(), model.spec().vocab_size);
    if ids > rows {
        bail!(
            "the tokenizer at {} has {ids} tokens, but the model's embedding only {rows}: they do not belong together",
            found.path().display()
        );
    }
    Ok(LoadedModel { model, tokenizer, provenance })
}

/// [`load`] without a tokenizer: for folders that hold weights only.
///
/// # Errors
/// As [`load`].
pub fn load_weights(path: &Path) -> Result<(LanguageModel, ModelProvenance)> {
    load_weights_as(path, Precision::F32)
}

/// [`load_weights`], to run in `precision`.
///
/// # Errors
/// As [`load`].
pub fn load_weights_as(path: &Path, precision: Precision) -> Result<(LanguageModel, ModelProvenance)> {
    let (found, source) = find(path, Need { weights: true, tokenizer: false })?;
    found.weights(source, precision)
}

/// Only the tokenizer of what [`load`] would load.
///
/// # Errors
/// As [`load`].
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    find(path, Need { weights: false, tokenizer: true })?.0.tokenizer()
}

/// What a path turned out to be.
#[derive(Debug)]
enum Found {
    Folder(PathBuf),
    Gguf(PathBuf),
}

const ACCEPTED: &str = "expected a Hugging Face folder (config.json, model.safetensors or shards with their index, \
                        tokenizer.json), a .gguf file, a folder holding exactly one .gguf file, or a model of the Hugging Face hub \
                        (org/name, org/name@revision, org/name@revision:file.gguf)";

/// What `path` means, and what to record as its source. A path that exists is that; else it may be an id of the hub,
/// from where `need` is fetched.
fn find(path: &Path, need: Need) -> Result<(Found, String)> {
    if !path.exists()
        && let Some(id) = path.to_str().map(ModelId::parse).transpose()?.flatten()
    {
        let fetched = hub::fetch_model(&hub::Settings::from_env()?, &id, need);
        let (path, source) = fetched.with_context(|| format!("no model at {}", path.display()))?;
        let found = if path.is_dir() { Found::Folder(path) } else { Found::Gguf(path) };
        return Ok((found, source));
    }
    Ok((find_local(path)?, last_component(path)))
}

fn find_local(path: &Path) -> Result<Found> {
    if path.is_file() {
        return Ok(Found::Gguf(path.to_owned()));
    }
    if !path.is_dir() {
        bail!("no model at {}: {ACCEPTED}", path.display());
    }
    if path.join("config.json").is_file() {
        return Ok(Found::Folder(path.to_owned()));
    }
    let entries = path.read_dir().with_context(|| format!("cannot list {}", path.display()))?;
    let ggufs: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && file.is_file())
        .collect();
    match ggufs.as_slice() {
        [one] => Ok(Found::Gguf(one.clone())),
        [] => bail!("no model in {}: {ACCEPTED}", path.display()),
        several => bail!("{} holds {} .gguf files; name one of them", path.display(), several.len()),
    }
}

impl Found {
    fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Gguf(path) => path,
        }
    }

    fn weights(&self, source: String, precision: Precision) -> Result<(LanguageModel, ModelProvenance)> {
        let ops = CandleOps::with_products(Arc::new(Rayon), Arc::new(CpuProducts::new(precision)));
        let read = || format!("cannot load the model at {}", self.path().display());
        let (model, name, format, sha256) = match self {
            Self::Folder(folder) => {
                let config = read_small(&folder.join("config.json"))?;
                let blueprint = Blueprint::from_config(&config).with_context(read)?;
                let model =
                    LanguageModel::build(ops, &blueprint, &mut Shards::open(folder)?).with_context(read)?;
                (
                    model,
                    folder_name(&config).unwrap_or_else(|| source.clone()),
                    "huggingface",
                    folder_hash(folder)?,
                )
            }
            Self::Gguf(path) => {
                let mut file = GgufFile::open(path)?;
                let header = file.header.clone();
                let blueprint = header.blueprint(&mut file).with_context(read)?;
                let model = LanguageModel::build(ops, &blueprint, &mut file).with_context(read)?;
                let name = header.text("general.name").map_or_else(|| source.clone(), str::to_owned);
                (model, name, "gguf", sha256_file(path)?)
            }
        };
        let architecture = model.spec().architecture.clone();
        Ok((
            model,
            ModelProvenance { name, source, format: format.to_owned(), sha256, architecture, precision },
        ))
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        match self {
            Self::Gguf(path) => Tokenizer::from_gguf(&GgufFile::open(path)?.header)
                .with_context(|| format!("cannot load the tokenizer of {}", path.display())),
            Self::Folder(folder) => {
                let path = folder.join("tokenizer.json");
                let json = read_small(&path)?;
                Tokenizer::from_json(&json, &bos_hints(folder)?)
                    .with_context(|| format!("cannot load {}", path.display()))
            }
        }
    }
}

/// The names of the weight files of a folder, from its index if it has one.
///
/// # Errors
/// If it has neither weights nor an index, or the index is broken.
pub(crate) fn weight_file_names(folder: &Path) -> Result<Vec<String>> {
    Ok(weight_files(folder)?.into_keys().collect())
}

fn last_component(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The name a configuration gives its model, unless it is somebody's folder.
fn folder_name(config: &[u8]) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(config).ok()?;
    let name = config.get("_name_or_path")?.as_str()?;
    (!name.is_empty() && !name.starts_with(['/', '.', '~']) && !name.contains('\\')).then(|| name.to_owned())
}

fn folder_hash(folder: &Path) -> Result<String> {
    let names = weight_files(folder)?;
    let hashes = names.keys().map(|name| sha256_file(&folder.join(name))).collect::<Result<Vec<_>>>()?;
    match hashes.as_slice() {
        [one] => Ok(one.clone()),
        several => Ok(sha256(several.join("\n").as_bytes())),
    }
}

/// What `tokenizer_config.json` and `config.json` say about the beginning of a sequence.
fn bos_hints(folder: &Path) -> Result<BosHints> {
    let json = |name: &str| -> Result<serde_json::Value> {
        let path = folder.join(name);
        if !path.is_file() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_slice(&read_small(&path)?).with_context(|| format!("cannot read {}", path.display()))
    };
    let (tokenizer, config) = (json("tokenizer_config.json")?, json("config.json")?);
    let token = &tokenizer["bos_token"];
    Ok(BosHints {
        token: token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned),
        id: config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok()),
        prepend: tokenizer["add_bos_token"].as_bool(),
    })
}
