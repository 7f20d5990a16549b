//! What several test targets share, and what the page tests itself with.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")
)]

pub mod compare;
pub mod fixture_flow;
pub mod fixture_pack;
pub mod golden;
pub mod impostor;
mod impostor_rows;
pub mod suite;
