//! `stratascope convert`.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::sae_files::{self, SaeFormat};

/// Arguments of `convert`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Pre-encoder biases, gates and decoder-norm scaling are folded into the weights on reading, so what is written \
reads raw activations; skip connections and vectors normalised one by one are kept. A format that cannot hold \
the autoencoder is refused, and nothing is written. \
docs/formats.md says what each format holds; Gemma Scope and OpenAI files have no place for metadata.

Examples:
  stratascope convert layer_20/width_16k/average_l0_71/params.npz --to saelens out/layer_20
  stratascope convert trainer_0 --to gemma-scope out/params.npz")]
pub(crate) struct Args {
    /// The autoencoder: a folder or file of any format in docs/formats.md, or its name on the hub.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The format to write.
    #[arg(long, value_name = "FORMAT")]
    to: SaeFormat,
    /// The folder to write (for gemma-scope also a path ending in .npz, for openai in .pt).
    #[arg(value_name = "DST")]
    target: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let file = sae_files::read(&args.source)?;
    sae_files::write(&args.target, args.to, &file)
        .with_context(|| format!("cannot write {}", args.target.display()))?;
    tracing::info!("wrote {}", args.target.display());
    Ok(())
}
