//! What encodes and decodes with a released autoencoder: the processor, or a card.

use std::sync::Arc;

use anyhow::Result;
use shared::{Codes, Rows, Sae};

use crate::cpu::CpuBackend;
use crate::cuda::{CudaBackend, Device};

/// A dictionary held where it is used. The active set is the same everywhere; values of a card are those of f32 sums.
#[derive(Debug)]
pub enum Backend {
    /// On all cores.
    Processor(Box<CpuBackend>),
    /// On a device with kernels.
    Device(Box<CudaBackend>),
}

impl Backend {
    /// Takes `sae` to `device`, or keeps it with the processor.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn new(sae: Sae, device: Option<&Arc<dyn Device + Send + Sync>>) -> Result<Self> {
        Ok(match device {
            None => Self::Processor(Box::new(CpuBackend::new(sae))),
            Some(device) => Self::Device(Box::new(CudaBackend::new(Arc::clone(device), sae)?)),
        })
    }

    /// The dictionary held.
    #[must_use]
    pub fn sae(&self) -> &Sae {
        match self {
            Self::Processor(backend) => backend.sae(),
            Self::Device(backend) => backend.sae(),
        }
    }

    /// Activation vectors `[n_rows, d_in]` to latent activations.
    ///
    /// # Errors
    /// If rows are not `d_in` wide, or the device fails.
    pub fn encode(&self, x: Rows<'_>) -> Result<Codes> {
        Ok(match self {
            Self::Processor(backend) => backend.encode(x)?,
            Self::Device(backend) => backend.encode(x)?,
        })
    }

    /// Latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`.
    ///
    /// # Errors
    /// If shapes do not fit, or the device fails.
    pub fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>> {
        Ok(match self {
            Self::Processor(backend) => backend.decode(x, codes)?,
            Self::Device(backend) => backend.decode(x, codes)?,
        })
    }
}
