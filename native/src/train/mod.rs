//! Training JumpReLU autoencoders on the CPU, from a store of activations or straight from a language model.
//!
//! [`run`] is the loop; [`step`] the forward and backward pass, sparse after the encoder product; [`params`],
//! [`adam`], [`init`] and [`schedule`] are what a step changes and by how much; [`source`], [`vectors`], [`live`],
//! [`normalise`] and [`order`] say which vectors come when; [`guard`] keeps bad batches out; [`checkpoint`] and [`log`] are what a run leaves
//! on disk. The maths is defined, and judged, by [`shared::loss`].

pub mod adam;
pub mod checkpoint;
mod encode;
pub mod guard;
pub mod init;
pub mod live;
pub mod log;
pub mod normalise;
pub mod order;
pub mod params;
pub mod run;
pub mod schedule;
pub(crate) mod simd;
pub mod source;
pub mod step;
pub mod vectors;

pub use live::LiveTap;
pub use params::{Moments, Params};
pub use run::{Summary, run};
pub use source::{ActivationSource, Statistics, StoreTap};
pub use step::{Forward, Settings, Trainer};
pub use vectors::VectorsFile;
