//! What can go wrong in the transformer: its configuration, its tensors, its tokens, its taps.

use crate::ShapeError;
use crate::tap::TapPoint;

/// An error of the transformer, its loader or its tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum LmError {
    /// A field of the model's configuration that is missing, malformed or not supported.
    #[error("model configuration: {field}: {problem}")]
    Config {
        /// The field, spelled as in the file.
        field: String,
        /// What was wanted and what was found.
        problem: String,
    },
    /// A weight file whose structure is broken.
    #[error("{format} file: {problem}")]
    Format {
        /// `GGUF` or `safetensors`.
        format: &'static str,
        /// What was wanted and what was found.
        problem: String,
    },
    /// A tensor the architecture needs is not in the file.
    #[error("tensor {name} is missing (wanted shape {shape:?})")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor of another shape than the configuration says.
    #[error("tensor {name}: expected shape {expected:?}, found {found:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// Tensors in the file that this architecture has no place for: ignoring them would compute something else.
    #[error("{count} tensor(s) do not belong to this architecture, first {first}")]
    UnknownTensors {
        /// The first of them, in alphabetical order.
        first: String,
        /// How many there are.
        count: usize,
    },
    /// A tensor that holds a NaN or an infinity.
    #[error("tensor {name}: value at index {index} is {value}, expected a finite number")]
    NotFinite {
        /// Its name.
        name: String,
        /// The flat index of the first offending value.
        index: usize,
        /// The value, printed.
        value: String,
    },
    /// Tokens that do not form whole sequences.
    #[error("{ids} token ids do not form sequences of {seq}")]
    Tokens {
        /// The number of ids.
        ids: usize,
        /// The sequence length.
        seq: usize,
    },
    /// A token id outside the model's vocabulary.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Its index in the batch, sequence after sequence.
        position: usize,
        /// The number of ids the model knows.
        vocab_size: usize,
    },
    /// A sequence longer than the model has learned positions for.
    #[error("a sequence has {seq} tokens, but the model knows {context_length} positions")]
    TooLong {
        /// The length of the sequences.
        seq: usize,
        /// The number of positions.
        context_length: usize,
    },
    /// A layer the model does not have.
    #[error("layer {layer} does not exist: the model has layers 0..={last}", last = n_layers.saturating_sub(1))]
    Layer {
        /// The layer asked for.
        layer: usize,
        /// The number of layers.
        n_layers: usize,
    },
    /// A tap replaced a value by one of another size.
    #[error("tap {point}: the replacement has {found} values, expected {expected}")]
    Replacement {
        /// The tap.
        point: TapPoint,
        /// The number of values needed.
        expected: usize,
        /// The number of values given.
        found: usize,
    },
    /// A failure reported by the caller's own tap.
    #[error("tap {point}: {message}")]
    Tap {
        /// The tap.
        point: TapPoint,
        /// What the caller said.
        message: String,
    },
    /// Rows or values that do not fit.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The tokenizer could not be read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A weight source could not be read.
    #[error("cannot read tensor {name}: {message}")]
    Read {
        /// The tensor.
        name: String,
        /// What the source said.
        message: String,
    },
    /// The backend's own failure (out of memory, a refused layout).
    #[error("transformer backend: {0}")]
    Backend(String),
}

impl LmError {
    /// A [`LmError::Config`].
    pub(crate) fn config(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { field: field.into(), problem: problem.into() }
    }
}

impl From<candle_core::Error> for LmError {
    fn from(error: candle_core::Error) -> Self {
        Self::Backend(error.to_string())
    }
}
