//! The stages of Stratascope on a machine with files, threads and a clock, in the order data flows:
//! [`text`] → [`harvest`] → [`store`] → [`train`] → [`evaluate`] → [`features`] ([`flow`] for several layers) → [`site`].
//!
//! [`hub`] fetches models and texts by id; [`sae_files`] reads and writes autoencoders; [`model`] finds and loads language models; [`cpu`] is the
//! fast CPU backend; [`doctor`] looks at the machine; [`cli`] and `cmd` are the thin command line over them.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")
)]

pub mod backend;
pub mod bench;
pub mod cli;
mod cmd;
pub mod cpu;
pub mod cuda;
pub mod doctor;
pub mod evaluate;
pub mod features;
pub mod files;
pub mod flow;
pub mod harvest;
pub mod hub;
pub mod input_limit;
pub mod lens;
pub mod model;
pub mod places;
pub mod progress;
pub mod sae_files;
pub mod selftest;
pub mod site;
pub mod stop;
pub mod store;
pub mod text;
pub mod train;
