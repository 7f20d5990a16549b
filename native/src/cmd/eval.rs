//! `stratascope eval`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shared::Precision;
use shared::config::Count;
use shared::tap::TapPoint;

use crate::evaluate::compare::{self, Named};
use crate::evaluate::layers;
use crate::evaluate::{self, EvalReport, Options, plot, report};
use crate::stop::StopFlag;
use crate::store::Store;
use crate::{files, model, sae_files};

mod by_layer;

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes eval.json, eval.md and density.svg into --out. L0 and FVU are measured on the store's held-out vectors. \
With --model, held-out text is run through the language model three times: untouched, with the tap replaced by \
its reconstruction, and with the tap set to zero. Special tokens and dropped positions keep their own activations. \
A transcoder is measured on, and put in the place of, the tap it reconstructs.

Of several autoencoders each gets a folder in --out, named by the last part of its path; compare.md and pareto.svg show all. \
Those that read the same tap are measured on the same vectors: what one leaves out as too long, all do. \
Those whose names differ only in a number at the end (topk-20, topk-40) are one line of the plot.

With --layers, a multi-layer autoencoder is measured at every layer it was trained on, and its latents across layers: layers.json, \
layers.md, layer_use.safetensors (summed activations and counts, latents x layers), and plots of latents over layers (latents.svg; \
prompt.svg for one text), of their spread (spread.svg), of neighbouring layers (cosine.svg) and of figures by layer (layers.svg). \
Autoencoders of one layer may stand beside them as controls: those whose names differ only in a number at the end are a line of layers.svg.

Examples:
  stratascope eval --sae runs/a --store store --model SmolLM2.gguf --out runs/a/eval
  stratascope eval --sae runs/* --store store --model SmolLM2.gguf --out evals
  stratascope eval --layers --sae runs/mlsae-topk runs/mlsae-jumprelu runs/single-* --store store --model SmolLM2.gguf --out evals")]
pub(crate) struct Args {
    /// The autoencoder: a folder or file of any format that can be read. Several are measured together, which costs one
    /// reading of the store and one run of the untouched model, and compared.
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    sae: Vec<PathBuf>,
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
    /// Measure multi-layer autoencoders layer by layer, and their latents across layers.
    #[arg(long)]
    layers: bool,
    /// With --layers, the lens before dictionaries that name one and do not hold it (mlsae's small files): a folder made by
    /// `stratascope lens`, or a published tuned lens.
    #[arg(long, value_name = "DIR", requires = "layers")]
    lens: Option<PathBuf>,
    /// The text whose latents prompt.svg shows.
    #[arg(long, value_name = "TEXT", default_value = layers::prompt::PUBLISHED, requires = "layers")]
    prompt: String,
    /// Print eval.json (with --layers, layers.json) to standard output instead of the table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let names = names(&args.sae)?;
    let read = |path: &PathBuf| {
        let file = if args.layers { sae_files::read_whole(path) } else { sae_files::read(path) };
        file.with_context(|| format!("cannot read the autoencoder {}", path.display()))
    };
    let files = args.sae.iter().map(read).collect::<Result<Vec<_>>>()?;
    let store = Store::open(&args.store).context("cannot open the store")?;
    let precision = args.precision.unwrap_or(store.manifest().model.precision);
    let model = args.model.as_deref().map(|path| model::load_as(path, precision)).transpose();
    let model = model.context("cannot load the language model")?;
    let options = Options { sequences: args.sequences, density_tokens: args.density_tokens.0 };
    let stop = StopFlag::from_signals()?;
    if args.layers {
        return by_layer::run(args, names, &files, &store, model.as_ref(), &options, &stop);
    }
    let reports = evaluate::evaluate_all(&files, &store, model.as_ref(), &options, &stop)?;
    let mut out = std::io::stdout().lock();
    if let ([_], [report]) = (&names[..], &reports[..]) {
        write_one(report, &args.out)?;
        if args.json {
            return Ok(out.write_all(&pretty(report)?)?);
        }
        return Ok(out.write_all(report::markdown(report).as_bytes())?);
    }
    let all: Vec<Named> =
        names.into_iter().zip(reports).map(|(name, report)| Named { name, report }).collect();
    for Named { name, report } in &all {
        write_one(report, &args.out.join(name))?;
    }
    let table = compare::markdown(&all);
    files::write_bytes(&args.out.join("pareto.svg"), compare::pareto_svg(&all)?.as_bytes())?;
    files::write_bytes(&args.out.join("compare.md"), table.as_bytes())?;
    if !args.json {
        return Ok(out.write_all(table.as_bytes())?);
    }
    for Named { name, report } in &all {
        writeln!(out, "{}", json!({ "name": name, "report": report }))?;
    }
    Ok(())
}

/// What each autoencoder is called: the last part of its path, with the one before it where that is only a tap.
fn names(paths: &[PathBuf]) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let last = path.canonicalize().unwrap_or_else(|_| path.clone());
        let part = |path: Option<&Path>| Some(path?.file_name()?.to_string_lossy().into_owned());
        let mut name = part(Some(&last)).unwrap_or_else(|| "sae".to_owned());
        if name.parse::<TapPoint>().is_ok()
            && let Some(before) = part(last.parent())
        {
            name = format!("{before}-{name}");
        }
        ensure!(
            !names.contains(&name),
            "two autoencoders are called {name}; results are kept by the last part of a path, so those must differ"
        );
        names.push(name);
    }
    Ok(names)
}

fn pretty(report: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    Ok(json)
}

fn write_one(report: &EvalReport, folder: &Path) -> Result<()> {
    let measured = &report.reconstruction;
    let title = format!("{} {}", report.model, report.tap);
    let svg = plot::density_svg(&title, &measured.density_histogram, measured.dead_share)?;
    files::write_bytes(&folder.join("density.svg"), svg.as_bytes())?;
    files::write_bytes(&folder.join("eval.md"), report::markdown(report).as_bytes())?;
    files::write_bytes(&folder.join("eval.json"), &pretty(report)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_kept_by_name() {
        let paths = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(paths(&["single/resid.0", "other/resid.0"]).unwrap(), ["single-resid.0", "other-resid.0"]);
        assert_eq!(paths(&["runs/a", "b/average_l0_71"]).unwrap(), ["a", "average_l0_71"]);
        assert!(paths(&["x/a", "y/a"]).unwrap_err().to_string().contains("called a;"));
    }
}
