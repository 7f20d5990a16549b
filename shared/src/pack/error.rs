//! What can be wrong with a pack.

use std::fmt::Display;

use crate::error::ShapeError;

/// A file of a pack that does not keep the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Not JSON, or not the JSON of this file.
    #[error("{file}: {reason}")]
    Json {
        /// Path inside the pack.
        file: String,
        /// The parser's message.
        reason: String,
    },
    /// Not a safetensors file.
    #[error("{file}: not a readable safetensors file: {reason}")]
    Tensors {
        /// Path inside the pack.
        file: String,
        /// The parser's message.
        reason: String,
    },
    /// A field that breaks a rule of the format.
    #[error("{file}: {field}: wanted {wanted}, found {found}")]
    Invalid {
        /// Path inside the pack.
        file: String,
        /// The field or tensor.
        field: String,
        /// What the format asks for.
        wanted: String,
        /// What the file holds.
        found: String,
    },
    /// Weights that make no autoencoder.
    #[error("weights: {0}")]
    Weights(#[from] ShapeError),
}

impl PackError {
    /// A broken rule, in one line.
    pub(super) fn invalid(
        file: &str,
        field: impl Into<String>,
        wanted: impl Into<String>,
        found: impl Display,
    ) -> Self {
        Self::Invalid {
            file: file.to_owned(),
            field: field.into(),
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }
}

/// `Ok` when `holds`; otherwise [`PackError::Invalid`].
pub(super) fn check(
    holds: bool,
    file: &str,
    field: &str,
    wanted: impl Into<String>,
    found: impl Display,
) -> Result<(), PackError> {
    if holds { Ok(()) } else { Err(PackError::invalid(file, field, wanted, &found)) }
}
