//! Every check of the project, in the order in which a failure is cheapest to find.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::demo::build_page;
use crate::lock::Lock;
use crate::places::{Places, executable, on_path};
use crate::report::Report;
use crate::run::{self, Program};
use crate::setup::{self, Purpose, Tools};

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask test                    what continuous integration runs
  cargo xtask test --skip-browser     without Chromium
  cargo xtask test --keep-going       all failures at once, listed at the end")]
pub(crate) struct Args {
    /// Leave the browser tests out, and with them Chromium and the building of the page.
    #[arg(long)]
    skip_browser: bool,
    /// Go on after a failing step, and fail at the end.
    #[arg(long)]
    keep_going: bool,
}

/// Sets up, then runs every check.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    let purpose = if args.skip_browser { Purpose::TestWithoutBrowser } else { Purpose::Test };
    let mut report = Report::new();
    let tools = setup::run(places, purpose, &mut report)?;
    let work = places.target.join("test");
    let _lock = Lock::take(&work)?;
    let mut checks =
        Checks { places, tools, work, report, keep_going: args.keep_going, failures: Vec::new() };
    let ended = checks.all(args.skip_browser);
    eprintln!("\n== Summary\n{}", checks.report.summary());
    ended?;
    match checks.failures.as_slice() {
        [] => {
            eprintln!("\nEvery check passed.");
            Ok(())
        }
        failures => bail!("{} of the checks failed: {}", failures.len(), failures.join("; ")),
    }
}

struct Checks<'a> {
    places: &'a Places,
    tools: Tools,
    /// `target/test`.
    work: PathBuf,
    report: Report,
    keep_going: bool,
    failures: Vec<String>,
}

impl Checks<'_> {
    fn all(&mut self, skip_browser: bool) -> Result<()> {
        self.report.heading("Checks");
        self.cargo("formatting", "rustfmt changes nothing", &["fmt", "--all", "--check"])?;
        self.supply_chain()?;
        let strict = ["--", "-D", "warnings"];
        let native = ["clippy", "--workspace", "--all-targets"];
        self.cargo("lints", "clippy, all crates and tests", &[&native[..], &strict].concat())?;
        let wasm = ["clippy", "--package", "web", "--target", "wasm32-unknown-unknown"];
        self.cargo("lints for wasm", "clippy, as the browser runs it", &[&wasm[..], &strict].concat())?;
        // With `--all-targets` the program itself is built with the same features of its dependencies as the tests;
        // asking for it alone would compile them a second time.
        self.cargo("build", "programs and tests", &["build", "--workspace", "--all-targets"])?;
        self.cargo(
            "tests",
            "unit, golden, end-to-end and kill tests",
            &["test", "--workspace", "--no-fail-fast"],
        )?;
        if skip_browser {
            self.report.skip("browser tests", "on request");
            return Ok(());
        }
        self.browser()
    }

    fn cargo(&mut self, name: &str, why: &str, args: &[&str]) -> Result<()> {
        let mut program = Program::cargo().args(args).current_dir(&self.places.root);
        if let Some(nvrtc) = &self.tools.nvrtc {
            program = program.env("STRATASCOPE_CUDA_LIBS", nvrtc).env("STRATASCOPE_REQUIRE_NVRTC", "1");
        }
        let again = format!("cargo {}", args.join(" "));
        self.check(name, why, || {
            program.run().with_context(|| {
                format!("`{name}` failed, so read the lines above and repeat it alone with `{again}`")
            })?;
            Ok("passed".to_owned())
        })
    }

    /// Licences, bans and sources of dependencies, where `cargo-deny` is installed.
    fn supply_chain(&mut self) -> Result<()> {
        if on_path("cargo-deny").is_none() {
            self.report.skip(
                "dependencies",
                "cargo-deny is not installed; `cargo install cargo-deny` adds this check",
            );
            return Ok(());
        }
        self.cargo(
            "dependencies",
            "licences, bans and sources",
            &["deny", "check", "licenses", "bans", "sources"],
        )
    }

    /// The page with a small synthetic pack, in Chromium, with a WebGPU adapter and without.
    fn browser(&mut self) -> Result<()> {
        let (page, pack, site) = (self.work.join("page"), self.work.join("pack"), self.work.join("site"));
        let layers = self.work.join("pack-layers");
        let (places, tools) = (self.places, self.tools.clone());
        self.check("page", "compiles the explorer to WebAssembly", || build_page(places, &tools, &page))?;
        self.check("site", "the page with two synthetic packs", || {
            for folder in [&pack, &layers, &site] {
                crate::places::remove_folder(folder)?;
            }
            let fixture = places.binary("debug").with_file_name("examples").join(executable("fixture_pack"));
            let made = Program::new(&fixture).arg(&pack).run();
            let made = made.and_then(|()| Program::new(&fixture).arg("--layers").arg(&layers).run());
            made.context("the synthetic packs could not be made")?;
            let put = Program::new(places.binary("debug")).args(["site", "--web"]).arg(&page);
            let put = put.arg("--pack").arg(&pack).arg("--pack").arg(&layers).arg("--out").arg(&site);
            put.run().context("the site could not be put together")?;
            Ok(site.display().to_string())
        })?;
        self.check("browser tests", "Chromium, with WebGPU and without", || {
            let chromium = tools.chromium.as_ref().context("no browser was set up")?;
            let script = places.root.join("tests").join("browser").join("run.mjs");
            let tests = Program::new("node").arg(&script).arg("--site").arg(&site).env("CHROMIUM", chromium);
            tests.run().context("the browser tests failed, so read the lines above")?;
            Ok("passed".to_owned())
        })
    }

    fn check(&mut self, name: &str, why: &str, make: impl FnOnce() -> Result<String>) -> Result<()> {
        match self.report.step(name, why, make) {
            Err(error) if self.keep_going && !run::was_stopped() => {
                eprintln!("  FAILED   {error:#}");
                self.failures.push(name.to_owned());
                Ok(())
            }
            ended => ended,
        }
    }
}
