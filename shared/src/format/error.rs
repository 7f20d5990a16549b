//! What can be wrong with a weight file: which part, which field, what was wanted, what was found.

use crate::error::ShapeError;

/// A weight file that cannot be read, or an autoencoder a format cannot hold.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A container (zip, safetensors, JSON) that does not parse.
    #[error("{part}: not readable: {reason}")]
    Container {
        /// The part of the file or folder, such as `cfg.json` or `params.npz`.
        part: String,
        /// What the parser said.
        reason: String,
    },
    /// A field with the wrong value, shape or type.
    #[error("{part}: {field}: wanted {wanted}, found {found}")]
    Field {
        /// The part of the file or folder.
        part: String,
        /// The field, tensor or array.
        field: String,
        /// What would have been accepted.
        wanted: String,
        /// What was there.
        found: String,
    },
    /// Weights that parse but do not make an autoencoder (non-finite values, lengths that disagree).
    #[error("{part}: {source}")]
    Weights {
        /// The part of the file or folder.
        part: String,
        /// Which law was broken.
        source: ShapeError,
    },
    /// Reading or writing the bytes failed.
    #[error("{part}: {source}")]
    Io {
        /// The part of the file or folder.
        part: String,
        /// The underlying failure.
        source: std::io::Error,
    },
}

impl FormatError {
    pub(crate) fn container(part: &str, reason: impl ToString) -> Self {
        Self::Container { part: part.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn field(part: &str, field: &str, wanted: impl ToString, found: impl ToString) -> Self {
        Self::Field {
            part: part.to_owned(),
            field: field.to_owned(),
            wanted: wanted.to_string(),
            found: found.to_string(),
        }
    }

    pub(crate) fn weights(part: &str, source: ShapeError) -> Self {
        Self::Weights { part: part.to_owned(), source }
    }

    pub(crate) fn io(part: &str, source: std::io::Error) -> Self {
        Self::Io { part: part.to_owned(), source }
    }
}
