//! Training autoencoders on the CPU, from a store of activations or straight from a language model.
//!
//! [`suite`] is the loop, over one autoencoder or many (`controls` makes those of each layer); [`step`] is one step, sparse after the encoder product: `encode` (through
//! `sieve` where it may) and `forward` find what is active and decode it, `latent` finds and applies the gradients of one latent;
//! [`params`], [`adam`], [`init`], [`schedule`], [`pressure`] and `resample` are what a step changes and by how much; [`source`],
//! [`vectors`], [`live`], [`translated`], [`normalise`] and [`order`] say which vectors come when; [`guard`] keeps bad batches out; [`checkpoint`],
//! [`log`], `events` and, at the end, `finish` are what a run leaves on disk. The maths is defined, and judged, by [`shared::loss`].

pub mod adam;
pub mod checkpoint;
mod controls;
pub(crate) mod encode;
mod engine;
mod events;
mod finish;
mod forward;
pub mod guard;
pub mod init;
mod interval;
mod latent;
pub mod live;
pub mod log;
mod losses;
pub mod normalise;
pub mod order;
pub mod params;
pub mod pressure;
mod resample;
pub mod room;
mod run;
pub mod schedule;
pub mod shards;
mod sieve;
pub(crate) mod simd;
pub mod source;
pub mod speed;
pub mod step;
pub mod suite;
pub mod translated;
pub mod vectors;
mod writer;

pub use adam::Betas;
pub use controls::spread;
pub use encode::Effort;
pub use engine::SharedDevice;
pub use finish::Summary;
pub use forward::Forward;
pub use live::LiveTaps;
pub use params::{Latents, Moments, Params, Tensors};
pub use resample::Rest;
pub use sieve::has_bf16;
pub use source::{ActivationSource, SourceTap, Statistics, StoreTaps, Vectors, Wiring};
pub use step::{Settings, Trainer};
pub use suite::{Job, run, run_all, run_all_on};
pub use translated::Translated;
pub use vectors::VectorsFile;
