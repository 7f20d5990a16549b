//! Which files of a model's repository are needed, and no others.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::{ModelId, Repo, Settings};

/// What of a model is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The weights.
    pub weights: bool,
    /// The tokenizer.
    pub tokenizer: bool,
}

/// Files taken when they are there.
const OPTIONAL: [&str; 3] = ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"];

/// Brings a model onto this machine: returns the folder or GGUF file it is in, and `org/name@commit` (with `:file.gguf`).
///
/// # Errors
/// If the repository cannot be had, or holds no model this program reads.
pub fn fetch_model(settings: &Arc<Settings>, id: &ModelId, need: Need) -> Result<(PathBuf, String)> {
    let repo = Repo::open(settings, &id.repo, "")?;
    if let Some(file) = &id.file {
        return gguf(&repo, file);
    }
    let has = |name: &str| repo.file(name).is_some();
    if !has("config.json") {
        let ggufs: Vec<&str> = repo
            .files
            .iter()
            .map(|file| file.path.as_str())
            .filter(|path| path.to_ascii_lowercase().ends_with(".gguf"))
            .collect();
        return match ggufs.as_slice() {
            [one] => gguf(&repo, one),
            [] => bail!("{} holds no model: it has neither config.json nor a .gguf file", repo.label()),
            several => bail!(
                "{} holds {} .gguf files; name one, as in {}@{}:{}",
                repo.label(),
                several.len(),
                id.repo.name,
                id.repo.revision,
                several[0]
            ),
        };
    }
    repo.fetch("config.json")?;
    for name in OPTIONAL.into_iter().filter(|name| has(name)) {
        repo.fetch(name)?;
    }
    if need.tokenizer {
        let other = if has("tokenizer.model") { "; it has a tokenizer.model, which is not read" } else { "" };
        ensure!(has("tokenizer.json"), "{} has no tokenizer.json{other}", repo.label());
        repo.fetch("tokenizer.json")?;
    }
    if need.weights {
        weights(&repo)?;
    }
    Ok((repo.snapshot(), repo.label()))
}

fn gguf(repo: &Repo, file: &str) -> Result<(PathBuf, String)> {
    Ok((repo.fetch(file)?, format!("{}:{file}", repo.label())))
}

/// Fetches `model.safetensors`, or the shards its index names.
fn weights(repo: &Repo) -> Result<()> {
    const INDEX: &str = "model.safetensors.index.json";
    if repo.file("model.safetensors").is_some() {
        return repo.fetch("model.safetensors").map(drop);
    }
    if repo.file(INDEX).is_none() {
        let pickled = repo.files.iter().any(|f| f.path.ends_with(".bin") || f.path.ends_with(".pt"));
        let hint = if pickled {
            ": its weights are pickles, which are never opened; a converted copy is often offered under refs/pr/…"
        } else {
            ""
        };
        bail!("{} has no model.safetensors and no {INDEX}{hint}", repo.label());
    }
    repo.fetch(INDEX)?;
    let snapshot = repo.snapshot();
    for name in crate::model::weight_file_names(&snapshot)? {
        repo.fetch(&name).with_context(|| format!("{INDEX} names {name}"))?;
    }
    Ok(())
}
