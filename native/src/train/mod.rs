//! Training JumpReLU autoencoders on the CPU from a store of activations.

pub mod adam;
mod encode;
pub mod params;
mod simd;
pub mod step;

pub use params::{Moments, Params};
pub use step::{Forward, Settings, Trainer};
