//! `stratascope features`.

use anyhow::{Result, bail};

/// Arguments of `features`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<()> {
    bail!("not built yet")
}
