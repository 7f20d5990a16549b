//! Which format a path holds, by the names of its files, and for one name that others use too, by its configuration.

use std::path::{Path, PathBuf};

use shared::format::{
    dictionary_learning, gemma_scope, gemma_scope_2, mlsae, openai, openmoss, saelens, sparsify,
};

/// What would have been accepted, for messages.
pub(super) const WANTED: &str = "cfg.json with sae_weights.safetensors, params.npz, params.safetensors, ae.pt, \
    sae.safetensors or sae_weights.safetensors with a configuration, or a .pt file";

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
    /// sparsify.
    Sparsify { config: PathBuf, weights: PathBuf },
    /// mlsae.
    Mlsae { config: PathBuf, weights: PathBuf },
    /// OpenMOSS' Llamascopium.
    OpenMoss { config: PathBuf, weights: PathBuf },
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
    if let (Some(config), Some(weights)) = (within(sparsify::CONFIG), within(sparsify::WEIGHTS)) {
        return Found::Sparsify { config, weights };
    }
    if let (Some(config), Some(weights)) = (within(openmoss::CONFIG), within(openmoss::WEIGHTS)) {
        return Found::OpenMoss { config, weights };
    }
    if let (Some(config), Some(weights)) = (within(mlsae::CONFIG), within(mlsae::WEIGHTS)) {
        // A language model's folder has files of these names too; what the configuration says tells them apart.
        if std::fs::read(&config).is_ok_and(|bytes| mlsae::is_mlsae(&bytes)) {
            return Found::Mlsae { config, weights };
        }
    }
    if let Some(npz) = within(gemma_scope::PARAMS) {
        return Found::Npz(npz);
    }
    if let Some(params) = within(gemma_scope_2::PARAMS) {
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
            let named = |name: &str| path.file_name().is_some_and(|file| file == name);
            let beside = |name: &str| Some(path.with_file_name(name)).filter(|p| p.is_file());
            match (beside(saelens::CONFIG), beside(openmoss::CONFIG)) {
                (Some(config), _) if named(sparsify::WEIGHTS) => {
                    Found::Sparsify { config, weights: path.into() }
                }
                (Some(config), _) => Found::SaeLens { config, weights: path.into() },
                (_, Some(config)) if named(openmoss::WEIGHTS) => {
                    Found::OpenMoss { config, weights: path.into() }
                }
                (_, Some(config)) if named(mlsae::WEIGHTS) => Found::Mlsae { config, weights: path.into() },
                _ => Found::Params2(path.into()),
            }
        }
        _ => Found::Nothing,
    }
}
