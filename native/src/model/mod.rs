//! Finding and loading language models and tokenizers.

use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shared::lm::{LanguageModel, Tokenizer};

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
    /// The path given, without the machine's folders: its last component.
    pub source: String,
    /// `huggingface` or `gguf`.
    pub format: String,
    /// SHA-256 of the GGUF, or of the weight files' SHA-256 in alphabetical order of their names.
    pub sha256: String,
    /// The architecture, as in [`shared::lm::Spec`].
    pub architecture: String,
}

/// Loads a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`), a GGUF file, or a folder holding
/// exactly one GGUF file.
///
/// # Errors
/// If the path holds none of these, or what it holds is broken or not supported.
pub fn load(_path: &Path) -> Result<LoadedModel> {
    bail!("not built yet")
}

/// [`load`] without a tokenizer: for folders that hold weights only.
///
/// # Errors
/// As [`load`].
pub fn load_weights(_path: &Path) -> Result<(LanguageModel, ModelProvenance)> {
    bail!("not built yet")
}
