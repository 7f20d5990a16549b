//! `stratascope lm`.

use anyhow::{Result, bail};

/// Arguments of `lm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<()> {
    bail!("not built yet")
}
