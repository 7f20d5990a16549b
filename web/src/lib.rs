//! The explorer of Stratascope: a static page over packs of features.
//!
//! - [`gpu`]: the WebGPU backend, built natively too, where it is tested.
//! - [`state`]: what the page knows, in plain Rust: addresses, sorting, search, shading.
//! - `data`, `backend`, `ui` (browser only): fetching and checking pack files, choosing a backend, drawing.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")
)]

pub mod gpu;
pub mod state;

#[cfg(target_arch = "wasm32")]
mod backend;
#[cfg(target_arch = "wasm32")]
mod data;
#[cfg(target_arch = "wasm32")]
mod ui;

#[cfg(target_arch = "wasm32")]
pub use ui::mount;
