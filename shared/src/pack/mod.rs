//! The pack: one autoencoder's features as a folder of plain files, read by the page and by anyone.
//!
//! Owns the format (version 1, described for other languages in `docs/pack.md`): strict structures and
//! both directions between them and bytes. Numbers travel as safetensors, words as JSON, and
//! `pack.json` names every file with its size and SHA-256. Readers treat bytes as hostile: every size,
//! offset and value is checked before use, and an error names file, field, what was wanted and found.
//!
//! - [`manifest`]: `pack.json`; [`weights`]: encoder and decoder; [`index`]: one row a latent for lists;
//! - [`features`]: shards of what each latent responds to; [`texts`]: bundled texts with activations;
//! - [`flow`]: texts across the layers of a multi-layer autoencoder;
//! - [`catalogue`]: `packs/index.json` of a site that holds several packs.

pub mod catalogue;
mod error;
pub mod features;
pub mod flow;
pub mod index;
pub mod manifest;
mod tensors;
pub mod texts;
pub mod weights;

pub use catalogue::{Catalogue, PackEntry};
pub use error::PackError;
pub use features::{Example, Feature, FeatureShard, Group};
pub use index::Index;
pub use manifest::{
    ActivationKind, CorpusInfo, DensityHistogram, FileEntry, Manifest, Metrics, ModelInfo, SaeInfo,
};
pub use texts::{Text, TextEntry};
pub use weights::{Decoder, Encoder};

/// Value of `format` in `pack.json`.
pub const FORMAT: &str = "stratascope-pack";
/// Value of `version` in `pack.json`.
pub const VERSION: u32 = 1;
/// Bins of a latent's activation histogram, uniform over `(0, max_activation]`.
pub const HISTOGRAM_BINS: usize = 40;
/// Most nearest latents, and most top or bottom logits, kept for a latent.
pub const TOP_K: usize = 10;
/// Most strings a latent has in each list of `index.json`.
pub const INDEX_WORDS: usize = 5;
/// Largest width of a dictionary that a pack may hold.
pub const MAX_LATENTS: usize = 1 << 24;
/// Largest width of an activation vector that a pack may hold.
pub const MAX_WIDTH: usize = 1 << 17;

/// Path of the manifest inside a pack.
pub const MANIFEST: &str = "pack.json";
/// Path of the encoder inside a pack.
pub const ENCODER: &str = "encoder.safetensors";
/// Path of the decoder inside a pack.
pub const DECODER: &str = "decoder.safetensors";
/// Path of the index's numbers inside a pack.
pub const INDEX_NUMBERS: &str = "index.safetensors";
/// Path of the index's words inside a pack.
pub const INDEX_WORDS_FILE: &str = "index.json";
/// Path of the list of texts inside a pack.
pub const TEXTS: &str = "texts.json";
/// Path of the list of packs, from the root of a site.
pub const CATALOGUE: &str = "packs/index.json";

/// Path of the numbers of feature shard `shard` inside a pack.
#[must_use]
pub fn shard_numbers(shard: usize) -> String {
    format!("features/{shard:05}.safetensors")
}

/// Path of the words of feature shard `shard` inside a pack.
#[must_use]
pub fn shard_words(shard: usize) -> String {
    format!("features/{shard:05}.json")
}

/// Path of the activations of text `text` inside a pack.
#[must_use]
pub fn text_numbers(text: usize) -> String {
    format!("texts/{text:02}.safetensors")
}

/// Whether `path` is a plain relative path of the characters packs use: it can leave no folder.
#[must_use]
pub fn is_safe_path(path: &str) -> bool {
    path.len() <= 255
        && path.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        })
}

/// Parses JSON strictly as `T`, naming `file` when it does not fit.
fn from_json<T: serde::de::DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T, PackError> {
    serde_json::from_slice(bytes)
        .map_err(|e| PackError::Json { file: file.to_owned(), reason: e.to_string() })
}

/// Pretty or compact JSON of `value`, with a final newline.
fn to_json<T: serde::Serialize>(file: &str, value: &T, pretty: bool) -> Result<Vec<u8>, PackError> {
    let written = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
    let mut bytes = written.map_err(|e| PackError::Json { file: file.to_owned(), reason: e.to_string() })?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::is_safe_path;

    #[test]
    fn only_plain_relative_paths_are_safe() {
        for good in ["pack.json", "features/00001.safetensors", "a-b_c/d.e"] {
            assert!(is_safe_path(good), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a\\b", "c:x", "a b", "ü"]
        {
            assert!(!is_safe_path(bad), "{bad}");
        }
    }
}
