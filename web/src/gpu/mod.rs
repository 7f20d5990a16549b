//! The WebGPU backend: an adapter, two pipelines, and [`shared::Forward`] over them.
//!
//! The same code runs natively on Vulkan, where ordinary tests judge it. It asks for no more than the
//! default limits of WebGPU, so one code path serves phones and desktops: dictionaries are cut into
//! blocks of latents, each in a buffer of its own.
//!
//! - [`device`]: finding an adapter and saying why there is none; [`pipeline`]: shaders, and the Rust
//!   side of their structs; [`forward`]: encode and decode, made exact on the host.

pub mod device;
pub mod forward;
pub mod pipeline;

pub use device::{Gpu, GpuError};
pub use forward::{Blocks, GpuBackend};
