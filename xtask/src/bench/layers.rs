//! Multi-layer autoencoders: several kinds of one dictionary for all layers of a language model, measured layer by layer.
//!
//! `configs/layers.toml` says what is trained; the stages are those of the demo, and go on where they were stopped.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::demo::config::{self, Configs};
use crate::demo::stage::Stages;
use crate::inputs::{self, Input, Source};
use crate::lock::Lock;
use crate::places::Places;
use crate::report::Report;
use crate::run::Program;

/// The tables of `configs/layers.toml`.
const STAGES: [&str; 5] = ["harvest", "train", "eval", "lens", "behind"];

/// Arguments of `bench layers`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench layers
  cargo xtask bench layers --model gemma-3-270m")]
pub(crate) struct Args {
    /// The language model: a Hugging Face folder, a .gguf file, `hub`, `package`, `gemma-3-270m`, or `auto` (hub, else package).
    #[arg(long, value_name = "PATH|WORD", default_value = "auto")]
    model: Source,
    /// The text: a .txt, .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, or a folder of such [default: the demo's].
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
}

/// Runs the bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    inputs::check(&args.model, args.text.as_deref())?;
    let mut report = Report::new();
    let (model, text) = inputs::ensure(places, &mut report, &args.model, args.text.as_deref())?;
    Program::cargo()
        .args(["build", "--release", "--package", "native"])
        .current_dir(&places.root)
        .run()
        .context("the program could not be built")?;
    let name = model.path.file_stem().context("the model has no name")?;
    let work = places.target.join("layers").join(name);
    let lock = Lock::take(&work)?;
    let source = places.root.join("configs").join("layers.toml");
    let configs = config::split(&source, &STAGES, &work.join("config"))?;
    let bench = Bench { places, work, configs };
    let mut stages = Stages::new(&bench.work, &mut report);
    bench.harvest(&mut stages, &model, &text)?;
    let saes = bench.train(&mut stages)?;
    bench.eval(&mut stages, &saes, &model)?;
    bench.behind_lens(&mut stages, &model)?;
    for table in
        [bench.work.join("eval").join("compare.md"), bench.work.join("eval-behind").join("layers.md")]
    {
        println!(
            "{}",
            fs::read_to_string(&table).with_context(|| format!("cannot read {}", table.display()))?
        );
    }
    println!("tables and plots: {}", bench.work.display());
    drop(lock);
    Ok(())
}

struct Bench<'a> {
    places: &'a Places,
    /// `target/layers/MODEL`.
    work: PathBuf,
    configs: Configs,
}

impl Bench<'_> {
    fn native(&self, command: &str) -> Program {
        Program::new(self.places.binary("release")).arg(command)
    }

    fn store(&self) -> PathBuf {
        self.work.join("store")
    }

    fn harvest(&self, stages: &mut Stages<'_>, model: &Input, text: &Input) -> Result<()> {
        let harvest = self.native("harvest").arg("--config").arg(self.configs.path("harvest")?);
        let harvest = harvest.args(["--tap", "resid"]).arg("--model").arg(&model.path);
        let harvest = harvest.arg("--text").arg(&text.path).arg("--out").arg(self.store());
        let inputs = [model.identity.as_str(), &text.identity, self.configs.text("harvest")?];
        let why = "runs the language model and stores the activations of every layer";
        stages.run("harvest", why, &self.store(), false, &inputs, harvest)
    }

    /// Trains all from one stream; returns their folders.
    fn train(&self, stages: &mut Stages<'_>) -> Result<Vec<PathBuf>> {
        let out = self.work.join("runs");
        let train = self.native("train").arg("--config").arg(self.configs.path("train")?);
        let train = train.arg("--store").arg(self.store()).arg("--out").arg(&out);
        let inputs = [self.configs.text("train")?];
        stages.run("train", "fits every autoencoder from one pass", &out, false, &inputs, train)?;
        folders(&out)
    }

    fn eval(&self, stages: &mut Stages<'_>, saes: &[PathBuf], model: &Input) -> Result<()> {
        let out = self.work.join("eval");
        let why = "measures all on held-out text, layer by layer";
        let eval = self.measure(saes, model, &out)?;
        stages.run("eval", why, &out, false, &[self.configs.text("eval")?], eval)
    }

    fn measure(&self, saes: &[PathBuf], model: &Input, out: &Path) -> Result<Program> {
        let eval = self.native("eval").arg("--layers").args(self.configs.arguments("eval")?);
        let eval = eval.arg("--sae").args(saes).arg("--store").arg(self.store());
        Ok(eval.arg("--model").arg(&model.path).arg("--out").arg(out))
    }

    /// A lens, an autoencoder behind it, and its measures.
    fn behind_lens(&self, stages: &mut Stages<'_>, model: &Input) -> Result<()> {
        let [lens, out, figures] = ["lens", "behind", "eval-behind"].map(|name| self.work.join(name));
        let fit = self.native("lens").args(self.configs.arguments("lens")?);
        let fit = fit.arg("--store").arg(self.store()).arg("--out").arg(&lens);
        let why = "fits a linear map of every layer to the last";
        stages.run("lens", why, &lens, false, &[self.configs.text("lens")?], fit)?;
        let train = self.native("train").arg("--config").arg(self.configs.path("behind")?);
        let train = train.arg("--store").arg(self.store()).arg("--lens").arg(&lens).arg("--out").arg(&out);
        let why = "fits an autoencoder behind it";
        stages.run("behind", why, &out, false, &[self.configs.text("behind")?], train)?;
        let eval = self.measure(std::slice::from_ref(&out), model, &figures)?;
        let why = "measures that one too";
        stages.run("eval-behind", why, &figures, false, &[self.configs.text("eval")?], eval)
    }
}

/// The autoencoders in `out`, by name, controls of one layer each in a folder of their own.
fn folders(out: &Path) -> Result<Vec<PathBuf>> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let what = || format!("cannot list {}", folder.display());
        let entries = fs::read_dir(folder).with_context(what)?;
        let mut folders: Vec<PathBuf> =
            entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().with_context(what)?;
        folders.retain(|path| path.is_dir());
        folders.sort_unstable();
        Ok(folders)
    };
    let is_sae = |folder: &PathBuf| folder.join("cfg.json").is_file();
    let mut found = Vec::new();
    for folder in list(out)? {
        if is_sae(&folder) {
            found.push(folder);
        } else {
            found.extend(list(&folder)?.into_iter().filter(is_sae));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_configuration_has_every_stage() {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/layers.toml");
        let configs = config::split(&source, &STAGES, folder.path()).unwrap();
        let saes = configs.values("train").unwrap()["sae"].as_array().unwrap();
        assert!(saes.len() >= 4, "top-k as published and with a scalar, BatchTopK, JumpReLU");
        assert!(configs.arguments("eval").unwrap().contains(&"--sequences".to_owned()));
    }

    #[test]
    fn folders_of_autoencoders_are_found_by_name() {
        let out = tempfile::tempdir().unwrap();
        for name in ["b", "a", "no-autoencoder", "single/resid.1", "single/resid.0"] {
            fs::create_dir_all(out.path().join(name)).unwrap();
        }
        for name in ["a", "b", "single/resid.0", "single/resid.1"] {
            fs::write(out.path().join(name).join("cfg.json"), "{}").unwrap();
        }
        assert_eq!(
            folders(out.path()).unwrap(),
            ["a", "b", "single/resid.0", "single/resid.1"].map(|name| out.path().join(name))
        );
    }
}
