//! `stratascope lens`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use shared::config::Count;
use shared::format::tuned_lens;

use crate::files;
use crate::lens::fit::{Options, fit};
use crate::stop::StopFlag;
use crate::store::Store;

/// Arguments of `lens`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes lens.safetensors: a map h + W h + b for each layer, which `train --lens` puts before a multi-layer autoencoder, so that what \
only drifts from layer to layer is not taken for another feature. Tuned lenses as their authors publish them (a folder with \
params.pt) are read just as well.

Example:
  stratascope lens --store store --out lens
  stratascope train --store store --lens lens --layers all --activation topk -k 32 --out runs/lens")]
pub(crate) struct Args {
    /// A store with every layer of the residual stream.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Training tokens to fit to, at most.
    #[arg(long, value_name = "N", default_value = "100k")]
    tokens: Count,
    /// How strongly maps are drawn to the identity, as a share of a layer's mean variance.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    ridge: f64,
    /// Folder of the result.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let store = Store::open(&args.store)?;
    let options = Options { tokens: args.tokens.0, ridge: args.ridge };
    let (lens, fits) = fit(&store, &options, &StopFlag::from_signals()?)?;
    files::write_bytes(&args.out.join(tuned_lens::LENS), &tuned_lens::write(&lens)?)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "| layer | of the last layer's variance unexplained | translated |\n|---|---:|---:|")?;
    for fit in fits {
        writeln!(out, "| {} | {:.4} | {:.4} |", fit.layer, fit.unexplained[0], fit.unexplained[1])?;
    }
    Ok(writeln!(out, "\nwritten to {}", args.out.display())?)
}
