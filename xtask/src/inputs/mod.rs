//! The demo's model and text: a local path if given, else fetched once into the cache and checked.

mod hub;
mod model;
mod text;

use std::path::PathBuf;

pub(crate) use model::{Source, ensure as ensure_model};
pub(crate) use text::ensure as ensure_text;

/// Something to read, and one string that changes when it does.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Name, version and checksum, or what stands for them in a local file.
    pub(crate) identity: String,
}
