//! Which format a path holds, by the names of its files.

use std::path::{Path, PathBuf};

use shared::format::{dictionary_learning, gemma_scope, openai, saelens};

/// What would have been accepted, for messages.
pub(super) const WANTED: &str =
    "cfg.json with sae_weights.safetensors, params.npz, params.safetensors, ae.pt or a .pt file";

/// Where an autoencoder lies and how it is to be read.
pub(super) enum Found {
    /// A SAELens folder.
    SaeLens { config: PathBuf, weights: PathBuf },
    /// Gemma Scope.
    Npz(PathBuf),
    /// Gemma Scope 2.
    Params2(PathBuf),
    /// A file torch saved: dictionary_learning's or OpenAI's.
    Torch(PathBuf),
    /// None of them.
    Nothing,
}

pub(super) fn locate(path: &Path) -> Found {
    if path.is_dir() { in_folder(path) } else { file(path) }
}

fn in_folder(path: &Path) -> Found {
    let within = |name: &str| Some(path.join(name)).filter(|p| p.is_file());
    if let (Some(config), Some(weights)) = (within(saelens::CONFIG), within(saelens::WEIGHTS)) {
        return Found::SaeLens { config, weights };
    }
    if let Some(npz) = within(gemma_scope::PARAMS) {
        return Found::Npz(npz);
    }
    if let Some(params) = within(gemma_scope::PARAMS_2) {
        return Found::Params2(params);
    }
    let torch = within(dictionary_learning::WEIGHTS).or_else(|| within(openai::WEIGHTS));
    torch.map_or(Found::Nothing, Found::Torch)
}

fn file(path: &Path) -> Found {
    if !path.is_file() {
        return Found::Nothing;
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz") => Found::Npz(path.into()),
        Some("pt") => Found::Torch(path.into()),
        Some("safetensors") => {
            let config = path.with_file_name(saelens::CONFIG);
            if config.is_file() {
                Found::SaeLens { config, weights: path.into() }
            } else {
                Found::Params2(path.into())
            }
        }
        _ => Found::Nothing,
    }
}
