//! The portable CPU backend: single-threaded, for the browser without WebGPU and for small batches.

use crate::codes::Codes;
use crate::error::ShapeError;
use crate::forward::{Dims, Forward};
use crate::reference;
use crate::rows::Rows;
use crate::sae::Sae;

/// A dictionary held for encoding and decoding on one thread.
#[derive(Debug, Clone)]
pub struct ScalarBackend {
    sae: Sae,
}

impl ScalarBackend {
    /// Takes `sae` and precomputes its margins.
    #[must_use]
    pub fn new(sae: Sae) -> Self {
        Self { sae }
    }

    /// The dictionary held.
    #[must_use]
    pub fn sae(&self) -> &Sae {
        &self.sae
    }

    /// Activation vectors `[n_rows, d_in]` to latent activations; exactly the reference's active set.
    ///
    /// # Errors
    /// If rows are not `d_in` wide.
    pub fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        reference::encode(&self.sae, x)
    }

    /// Latent activations to reconstructions `[n_rows, d_out]`.
    ///
    /// # Errors
    /// If the codes index another dictionary width.
    pub fn decode(&self, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        reference::decode(&self.sae, codes)
    }
}

impl Forward for ScalarBackend {
    type Error = ShapeError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        Self::encode(self, x)
    }

    async fn decode(&self, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        Self::decode(self, codes)
    }
}
