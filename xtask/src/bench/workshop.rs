//! What benches that train have in common: a model, a text, a configuration of several stages, and a folder to work in, with the program
//! built.

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

/// What is looked at.
#[derive(Debug, clap::Args)]
pub(crate) struct Data {
    /// The language model: a Hugging Face folder, a .gguf file, `hub`, `package`, `gemma-3-270m`, or `auto` (hub, else package).
    #[arg(long, value_name = "PATH|WORD", default_value = "auto")]
    model: Source,
    /// The text: a .txt, .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, or a folder of such [default: the demo's].
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
}

impl Data {
    /// Brings model and text.
    pub(crate) fn ensure(&self, places: &Places, report: &mut Report) -> Result<(Input, Input)> {
        inputs::check(&self.model, self.text.as_deref())?;
        inputs::ensure(places, report, &self.model, self.text.as_deref())
    }
}

/// A folder that one bench works in.
pub(crate) struct Workshop<'a> {
    pub(crate) places: &'a Places,
    /// Where everything goes.
    pub(crate) work: PathBuf,
    /// A table a stage.
    pub(crate) configs: Configs,
    model: Input,
    text: Input,
    _lock: Lock,
}

impl<'a> Workshop<'a> {
    /// Builds the program and cuts `configs/CONFIG` into `stages`, in the folder `work`.
    pub(crate) fn open(
        places: &'a Places,
        (model, text): (Input, Input),
        config: &str,
        stages: &[&str],
        work: PathBuf,
    ) -> Result<Self> {
        Program::cargo()
            .args(["build", "--release", "--package", "native"])
            .current_dir(&places.root)
            .run()
            .context("the program could not be built")?;
        let lock = Lock::take(&work)?;
        let source = places.root.join("configs").join(config);
        let configs = config::split(&source, stages, &work.join("config"))?;
        Ok(Self { places, work, configs, model, text, _lock: lock })
    }

    /// A command of the program.
    pub(crate) fn native(&self, command: &str) -> Program {
        Program::new(self.places.binary("release")).arg(command)
    }

    /// Where the activations are.
    pub(crate) fn store(&self) -> PathBuf {
        self.work.join("store")
    }

    /// Harvests `tap` as `[harvest]` says.
    pub(crate) fn harvest(&self, stages: &mut Stages<'_>, tap: &str, why: &str) -> Result<()> {
        let harvest = self.native("harvest").arg("--config").arg(self.configs.path("harvest")?);
        let harvest = harvest.args(["--tap", tap]).arg("--model").arg(&self.model.path);
        let harvest = harvest.arg("--text").arg(&self.text.path).arg("--out").arg(self.store());
        let inputs = [self.model.identity.as_str(), &self.text.identity, self.configs.text("harvest")?];
        stages.run("harvest", why, &self.store(), false, &inputs, harvest)
    }

    /// Trains all of `[train]`, with `more` options, from one pass; returns the folder they are in.
    pub(crate) fn train(&self, stages: &mut Stages<'_>, more: &[&str]) -> Result<PathBuf> {
        let out = self.work.join("runs");
        let train = self.native("train").arg("--config").arg(self.configs.path("train")?).args(more);
        let train = train.arg("--store").arg(self.store()).arg("--out").arg(&out);
        let inputs = [self.configs.text("train")?];
        stages.run("train", "fits every autoencoder from one pass", &out, false, &inputs, train)?;
        Ok(out)
    }

    /// Measures `saes` as `[eval]` says, with `more` options, into `out`.
    pub(crate) fn eval(
        &self,
        stages: &mut Stages<'_>,
        (name, why): (&str, &str),
        more: &[&str],
        saes: &[PathBuf],
        out: &Path,
    ) -> Result<()> {
        let eval = self.native("eval").args(more).args(self.configs.arguments("eval")?);
        let eval = eval.arg("--sae").args(saes).arg("--store").arg(self.store());
        let eval = eval.arg("--model").arg(&self.model.path).arg("--out").arg(out);
        stages.run(name, why, out, false, &[self.configs.text("eval")?], eval)
    }
}

/// Prints a table that a command wrote.
pub(crate) fn show(table: &Path) -> Result<()> {
    println!("{}", fs::read_to_string(table).with_context(|| format!("cannot read {}", table.display()))?);
    Ok(())
}
