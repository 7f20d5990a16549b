//! The inference seam: what a backend must do to count as an implementation of a [`Sae`](crate::Sae).

use crate::codes::Codes;
use crate::rows::Rows;

/// The sizes of a sparse autoencoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Width of the vectors the encoder reads.
    pub d_in: usize,
    /// Width of the vectors the decoder writes.
    pub d_out: usize,
    /// Number of latents, the width of the dictionary.
    pub n_latents: usize,
}

/// Encode and decode on some device, host slices at the edge.
///
/// Asynchronous because a browser can only await a mapped buffer; native backends return ready
/// futures. Generic, never `dyn`. The conformance suite of the `conformance` crate judges every
/// implementation against [`crate::reference`].
#[expect(async_fn_in_trait, reason = "wasm futures are not Send, and the trait is never used as dyn")]
pub trait Forward {
    /// What can go wrong on this backend.
    type Error: std::error::Error + 'static;

    /// The sizes of the dictionary held.
    fn dims(&self) -> Dims;

    /// Activation vectors `[n_rows, d_in]` to sparse latent activations `[n_rows, n_latents]`.
    ///
    /// The active set is exactly that of the f64 reference; values agree to f32 rounding.
    async fn encode(&self, x: Rows<'_>) -> Result<Codes, Self::Error>;

    /// Sparse latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`, row-major.
    ///
    /// What a skip connection adds, and what undoes a scaling of rows, is read from `x`.
    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, Self::Error>;
}
