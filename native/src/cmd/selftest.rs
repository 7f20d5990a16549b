//! `stratascope selftest`.

use anyhow::{Result, bail};

use crate::cuda;
use crate::selftest::{STEPS, table};

/// Arguments of `selftest`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Twenty training steps of every variant are judged by a dense optimiser in double precision, tensor by tensor; the conformance suite \
judges encoding and decoding by committed vectors of other programs and by the double-precision reference, active sets exactly. \
Impostors, with one mistake each, must be found out. The table says how far losses, and the array that is furthest off, are off, and \
how much of the tolerance each kind of check used. Any failure makes the exit status 1.

Examples:
  stratascope selftest
  stratascope selftest --device cuda:0")]
pub(crate) struct Args {
    /// What is tested: cpu, or a card such as cuda:0.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: cuda::Choice,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut out = std::io::stdout();
    let failures = match cuda::open(args.device)? {
        None => table::on_processor(&mut out, STEPS)?,
        Some(card) => table::on_device(&mut out, &card, STEPS)?,
    };
    if failures > 0 {
        bail!("{failures} failed");
    }
    Ok(())
}
