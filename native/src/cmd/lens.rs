//! `stratascope lens`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use shared::config::Count;
use shared::format::tuned_lens;

use crate::files;
use crate::lens::fit::{Form, Options, fit};
use crate::stop::StopFlag;
use crate::store::Store;

/// Arguments of `lens`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes lens.safetensors: a map h + W h + b for each layer, which `train --lens` puts before a multi-layer autoencoder, so that what \
only drifts from layer to layer is not taken for another feature. Tuned lenses as their authors publish them (a folder with \
params.pt) are read just as well. The table says how much of the last layer's variance each layer leaves unexplained, as it is and \
translated, and how much larger a share of variance an error becomes when the map is undone: a larger ridge makes that less.

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
    /// What maps may be: rotations, which lose nothing where they are undone, or any, by least squares.
    #[arg(long, value_enum, default_value_t = Form::Rotation)]
    form: Form,
    /// How strongly maps are drawn to the identity, as a share of a layer's mean variance.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    ridge: f64,
    /// Folder of the result.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let store = Store::open(&args.store)?;
    let options = Options { form: args.form, tokens: args.tokens.0, ridge: args.ridge };
    let (lens, fits) = fit(&store, &options, &StopFlag::from_signals()?)?;
    files::write_bytes(&args.out.join(tuned_lens::LENS), &tuned_lens::write(&lens)?)?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "| layer | of the last layer's variance unexplained | translated | growth of errors |\n|---|---:|---:|---:|"
    )?;
    for fit in fits {
        writeln!(
            out,
            "| {} | {:.4} | {:.4} | {:.3} |",
            fit.layer, fit.unexplained[0], fit.unexplained[1], fit.growth
        )?;
    }
    Ok(writeln!(out, "\nwritten to {}", args.out.display())?)
}
