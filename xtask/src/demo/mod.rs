//! The demo: the whole path from English text to a page, one stage after the other, each resumable.
//!
//! This file owns the order of the stages and what is printed; `stage` decides whether one is finished,
//! `config` cuts `configs/demo.toml` into one file a stage.

pub(crate) mod config;
pub(crate) mod stage;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::inputs::{self, Input, Source};
use crate::lock::Lock;
use crate::places::Places;
use crate::report::Report;
use crate::run::{self, Program};
use crate::setup::{self, Purpose, Tools};
use stage::Stages;

/// The tables of `configs/demo.toml`.
const STAGES: [&str; 4] = ["harvest", "train", "eval", "features"];
/// The layer whose residual stream the demo looks at: the middle of SmolLM2's thirty blocks.
const TAP: &str = "resid.14";
/// The folder of the demo's pack, and its name in the page's addresses.
const PACK: &str = "smollm2-135m-resid-14";

/// What the page calls the pack.
const TITLE: &str = "SmolLM2-135M, residual stream after block 14";
/// What the page calls the fetched text.
const CORPUS: &str = "State of the Union addresses and Moby-Dick";

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask demo                                  everything, and the page at the end
  cargo xtask demo --no-serve --out site            a static site for any web server
  cargo xtask demo --model ~/models/SmolLM2-135M    with SmolLM2-135M as you already have it
  cargo xtask demo --from features                  the later stages again, after changing their code")]
pub(crate) struct Args {
    /// Stop when the site is built, without serving it.
    #[arg(long)]
    no_serve: bool,
    /// Where to put the finished static site [default: target/demo/site].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The language model: a Hugging Face folder, a .gguf file, `hub`, `package`, or `auto` (hub, else package).
    #[arg(long, value_name = "PATH|WORD", default_value = "auto")]
    model: Source,
    /// The text: a .txt, .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, or a folder of such [default: fetched].
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
    /// How many tokens to harvest, held-out ones included, such as 330k [default: as in configs/demo.toml].
    #[arg(long, value_name = "N")]
    tokens: Option<String>,
    /// Do this stage and all after it again, finished or not.
    #[arg(long, value_enum, value_name = "STAGE")]
    from: Option<From>,
}

/// A stage that can be asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum From {
    /// Run the language model and store activations.
    Harvest,
    /// Train the autoencoder.
    Train,
    /// Measure it.
    Eval,
    /// Collect what each latent responds to.
    Features,
}

/// Runs the demo.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    inputs::check(&args.model, args.text.as_deref())?;
    let mut report = Report::new();
    let tools = setup::run(places, Purpose::Demo, &mut report)?;
    let (model, text) = inputs::ensure(places, &mut report, &args.model, args.text.as_deref())?;

    let work = places.target.join("demo");
    let lock = Lock::take(&work)?;
    let demo = Demo { places, binary: places.binary("release"), work, tools };
    demo.build(&mut report)?;
    demo.data_stages(args, &model, &text, &mut report)?;
    let site = demo.site(args, &mut report)?;
    drop(lock);

    eprintln!("\n== Times\n{}", report.summary());
    demo.print_metrics()?;
    eprintln!("\nThe site is in {}: plain files for any web server.", site.display());
    if args.no_serve {
        return Ok(());
    }
    demo.serve(&site)
}

struct Demo<'a> {
    places: &'a Places,
    binary: PathBuf,
    /// `target/demo`.
    work: PathBuf,
    tools: Tools,
}

impl Demo<'_> {
    fn native(&self, command: &str) -> Program {
        Program::new(&self.binary).arg(command)
    }

    fn store(&self) -> PathBuf {
        self.work.join("store")
    }

    fn sae(&self) -> PathBuf {
        self.work.join("sae")
    }

    fn eval(&self) -> PathBuf {
        self.work.join("eval")
    }

    fn pack(&self) -> PathBuf {
        self.work.join("packs").join(PACK)
    }

    fn build(&self, report: &mut Report) -> Result<()> {
        report.heading("Build");
        report.step("stratascope", "the native program, optimised", || {
            Program::cargo()
                .args(["build", "--release", "--package", "native", "--bin", "stratascope"])
                .current_dir(&self.places.root)
                .run()
                .context("the native program did not compile, so see the compiler's message above")?;
            Ok(self.binary.display().to_string())
        })
    }

    /// Harvest, train, eval, features: each depends on the one before and on its part of the configuration.
    fn data_stages(&self, args: &Args, model: &Input, text: &Input, report: &mut Report) -> Result<()> {
        report.heading("From text to features");
        let source = self.places.root.join("configs").join("demo.toml");
        let configs = config::split(&source, &STAGES, &self.work.join("config"))?;
        let mut stages = Stages::new(&self.work, report);
        let redo = |stage: From| args.from.is_some_and(|from| stage >= from);

        let mut harvest = self.native("harvest").arg("--config").arg(configs.path("harvest")?);
        harvest = harvest.args(["--tap", TAP]).arg("--model").arg(&model.path).arg("--text").arg(&text.path);
        harvest = harvest.arg("--out").arg(self.store());
        if let Some(tokens) = &args.tokens {
            harvest = harvest.args(["--tokens", tokens]);
        }
        let inputs = [model.identity.as_str(), &text.identity, configs.text("harvest")?];
        stages.run(
            "harvest",
            "runs the language model and stores the activations of one layer",
            &self.store(),
            redo(From::Harvest),
            &inputs,
            harvest,
        )?;

        let train = self.native("train").arg("--config").arg(configs.path("train")?).args(["--tap", TAP]);
        let train = train.arg("--store").arg(self.store()).arg("--out").arg(self.sae());
        stages.run(
            "train",
            "fits the sparse autoencoder",
            &self.sae(),
            redo(From::Train),
            &[configs.text("train")?],
            train,
        )?;

        let eval = self.native("eval").args(configs.arguments("eval")?).arg("--sae").arg(self.sae());
        let eval = eval
            .arg("--store")
            .arg(self.store())
            .arg("--model")
            .arg(&model.path)
            .arg("--out")
            .arg(self.eval());
        stages.run(
            "eval",
            "measures it on held-out text, inside the language model too",
            &self.eval(),
            redo(From::Eval),
            &[configs.text("eval")?],
            eval,
        )?;

        let texts = self.places.root.join("configs").join("demo-texts.toml");
        let sentences =
            fs::read_to_string(&texts).with_context(|| format!("cannot read {}", texts.display()))?;
        let features =
            self.native("features").args(configs.arguments("features")?).arg("--sae").arg(self.sae());
        let features = features
            .arg("--store")
            .arg(self.store())
            .arg("--model")
            .arg(&model.path)
            .arg("--texts")
            .arg(&texts);
        let mut features =
            features.arg("--eval").arg(self.eval().join("eval.json")).arg("--out").arg(self.pack());
        // What was fetched has a name people know; a model or a text given by hand speaks for itself.
        if !matches!(args.model, Source::Local(_)) {
            features = features.args(["--name", PACK, "--title", TITLE]);
        }
        if args.text.is_none() {
            features = features.args(["--corpus", CORPUS]);
        }
        let inputs = [configs.text("features")?, &sentences];
        stages.run(
            "features",
            "collects what each latent responds to",
            &self.pack(),
            redo(From::Features),
            &inputs,
            features,
        )
    }

    /// Builds the page and puts it together with the pack.
    fn site(&self, args: &Args, report: &mut Report) -> Result<PathBuf> {
        report.heading("Page");
        let page = self.work.join("page");
        report.step("page", "compiles the explorer to WebAssembly", || {
            build_page(self.places, &self.tools, &page)
        })?;
        let site = match &args.out {
            Some(out) => std::path::absolute(out).context("--out is not a usable path")?,
            None => self.work.join("site"),
        };
        report.step("site", "puts page and pack together as static files", || {
            let put = self.native("site").arg("--web").arg(&page).arg("--pack").arg(self.pack());
            put.arg("--out")
                .arg(&site)
                .run()
                .context("the site could not be put together, so see the message above")?;
            Ok(site.display().to_string())
        })?;
        Ok(site)
    }

    fn print_metrics(&self) -> Result<()> {
        let path = self.eval().join("eval.md");
        let table = fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}, so run the demo again with `--from eval`", path.display())
        })?;
        println!("\n{}", table.trim());
        Ok(())
    }

    fn serve(&self, site: &Path) -> Result<()> {
        eprintln!("Serving it now; Ctrl-C ends that.");
        let served = self.native("site").arg("--out").arg(site).args(["--serve", "127.0.0.1:8080"]).run();
        // Ending the server is the ordinary end of the demo.
        if run::was_stopped() { Ok(()) } else { served.context("the site could not be served") }
    }
}

/// Builds the page with Trunk into `out`; returns its path and size.
pub(crate) fn build_page(places: &Places, tools: &Tools, out: &Path) -> Result<String> {
    Program::new("trunk")
        .args(["build", "--release", "--offline", "--dist"])
        .arg(out)
        .with_path(&tools.path)?
        .current_dir(&places.root)
        .run()
        .context("the page did not build, so see the message above")?;
    let mut bytes = 0;
    for entry in fs::read_dir(out).with_context(|| format!("cannot list {}", out.display()))? {
        let about =
            entry.and_then(|e| e.metadata()).with_context(|| format!("cannot list {}", out.display()))?;
        bytes += if about.is_file() { about.len() } else { 0 };
    }
    if bytes == 0 {
        bail!("Trunk left nothing in {}, so look at Trunk.toml", out.display());
    }
    Ok(format!("{} ({:.2} MB before compression)", out.display(), bytes as f64 / 1e6))
}
