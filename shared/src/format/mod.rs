//! Weight files of sparse autoencoders: bytes to [`Sae`](crate::Sae) and back.
//!
//! Outside names, transposes and pre-encoder biases exist only here. Every reader treats its input as
//! hostile: sizes are checked before anything is allocated, and an error names the part, the field,
//! what was wanted and what was found.

pub mod dictionary_learning;
mod error;
mod fold;
pub mod gemma_scope;
pub mod gemma_scope_2;
mod metadata;
pub mod mlsae;
mod npy;
pub mod openai;
pub mod openmoss;
pub mod saelens;
mod saelens_config;
pub mod sparsify;
pub mod tensors;
mod torch;
pub mod tuned_lens;

pub use error::FormatError;
pub use metadata::{SaeMetadata, hook_name, tap_of_hook};
