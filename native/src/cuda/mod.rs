//! Training on a CUDA card: one step of every objective, with the kernels of `kernels/`.
//!
//! [`device`] is the seam: memory, launches, products. [`trainer`] takes a step through it and knows nothing of cards. [`kernels`] has
//! the sources and what they are compiled for, [`step`] the structure that tells a kernel everything, [`geometry`] the sizes of
//! launches and buffers.

pub mod device;
pub mod geometry;
pub mod kernels;
pub mod step;
pub mod trainer;

pub use device::{Argument, Buffer, Device, MatrixAt, Product, ProductPrecision};
pub use kernels::{Kernel, PRELUDE, Shape};
pub use step::{Address, Step};
pub use trainer::{CudaForward, CudaTrainer};
