//! `stratascope eval`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use shared::Precision;
use shared::config::Count;

use crate::evaluate::{self, Options, plot, report};
use crate::stop::StopFlag;
use crate::store::Store;
use crate::{files, model, sae_files};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes eval.json, eval.md and density.svg into --out. L0 and FVU are measured on the store's held-out vectors. \
With --model, held-out text is run through the language model three times: untouched, with the tap replaced by \
its reconstruction, and with the tap set to zero. Special tokens and dropped positions keep their own activations.

Example:
  stratascope eval --sae runs/a --store store --model SmolLM2.gguf --out runs/a/eval")]
pub(crate) struct Args {
    /// The autoencoder: a folder or file of any format that can be read.
    #[arg(long, value_name = "PATH")]
    sae: PathBuf,
    /// The activation store made by `harvest`: a folder, or s3://bucket/prefix or gs://bucket/prefix.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The language model the store was harvested from; without it, delta loss is not measured.
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// The number format the language model runs in: f32, bf16 or q8_0 [default: as the store was harvested].
    #[arg(long, value_name = "FORMAT")]
    precision: Option<Precision>,
    /// Held-out sequences to run through the language model.
    #[arg(long, value_name = "N", default_value_t = 64)]
    sequences: usize,
    /// Vectors to encode for densities and the dead share (held-out first, then training).
    #[arg(long, value_name = "N", default_value = "1M")]
    density_tokens: Count,
    /// Folder for the results.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print eval.json to standard output instead of the table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let file = sae_files::read(&args.sae).context("cannot read the autoencoder")?;
    let store = Store::open(&args.store).context("cannot open the store")?;
    let precision = args.precision.unwrap_or(store.manifest().model.precision);
    let model = args.model.as_deref().map(|path| model::load_as(path, precision)).transpose();
    let model = model.context("cannot load the language model")?;
    let options = Options { sequences: args.sequences, density_tokens: args.density_tokens.0 };
    let result = evaluate::evaluate(&file, &store, model.as_ref(), &options, &StopFlag::from_signals()?)?;
    let measured = &result.reconstruction;
    let title = format!("{} {}", result.model, result.tap);
    let svg = plot::density_svg(&title, &measured.density_histogram, measured.dead_share)?;
    let markdown = report::markdown(&result);
    let mut json = serde_json::to_vec_pretty(&result)?;
    json.push(b'\n');
    files::write_bytes(&args.out.join("density.svg"), svg.as_bytes())?;
    files::write_bytes(&args.out.join("eval.md"), markdown.as_bytes())?;
    files::write_bytes(&args.out.join("eval.json"), &json)?;
    let mut out = std::io::stdout().lock();
    out.write_all(if args.json { &json } else { markdown.as_bytes() })?;
    Ok(())
}
