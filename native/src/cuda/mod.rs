//! Training and encoding on a CUDA card: one step of every objective, and released autoencoders, with the kernels of `kernels/`.
//!
//! [`device`] is the seam: memory, launches, products; `card` is a card behind it, with [`libraries`] found and kernels compiled (`nvrtc`) at
//! run time. [`trainer`] takes a step through it and knows nothing of cards, and neither does [`backend`], which encodes and decodes. [`kernels`] has
//! the sources and what they are compiled for, [`step`] the structure that tells a kernel everything, [`geometry`] the sizes of
//! launches and buffers.

pub mod backend;
pub mod batch;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod card;
pub mod choice;
pub mod device;
pub mod feed;
pub mod found;
pub mod geometry;
pub mod intercept;
pub mod kernels;
pub mod libraries;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod nvrtc;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod pinned;
pub mod route;
pub mod step;
pub mod trainer;

pub use backend::{CudaBackend, CudaError};
pub use batch::Resident;
pub use choice::Choice;
pub use device::{Argument, Buffer, Device, Factors, HostMemory, MatrixAt, Product};
pub use feed::{Feed, Gathering, Placement, Readable, TapAt};
pub use intercept::Intercept;
pub use kernels::{Kernel, PRELUDE, Shape};
pub use route::{Rates, Work};
pub use step::{Address, Step};
pub use trainer::{CudaForward, CudaOptions, CudaTrainer};

use std::sync::Arc;

use anyhow::Result;

/// Opens what is asked for; `None` for the processor. What `auto` came to, and why, is logged.
///
/// # Errors
/// If there is no such card, or it cannot be used.
pub fn open(choice: Choice) -> Result<Option<Arc<dyn Device + Send + Sync>>> {
    match choice {
        Choice::Cpu => Ok(None),
        Choice::Auto => {
            let found = found::look();
            let problem = found.problem.clone().or_else(|| found.libraries.missing());
            match problem.or_else(|| found.cards.is_empty().then(|| "the driver knows no card".to_owned())) {
                Some(problem) => {
                    tracing::info!("on the processor: {problem}");
                    Ok(None)
                }
                None => open(Choice::Cuda(0)),
            }
        }
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        Choice::Cuda(number) => Ok(Some(Arc::new(card::Card::open(number)?))),
        #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
        Choice::Cuda(_) => anyhow::bail!("cards are used on Linux on x86-64 only"),
    }
}
