//! `cargo xtask`: what cargo cannot say. Set-up of a fresh machine, the demo from text to page, and every test.
//!
//! This file owns the command line; `setup` brings tools, `inputs` brings the model and the text,
//! `demo` runs the stages of the main job, `test` runs the checks, `bench` compares speeds, and `run` starts and stops other programs.

mod bench;
mod demo;
mod digest;
mod inputs;
mod lock;
mod places;
mod report;
mod run;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use inputs::Source;
use places::Places;
use report::Report;
use setup::Purpose;

/// Set-up, demo and tests of Stratascope.
///
/// Both `demo` and `test` first set up what they need: tools, model and text go into a per-user cache folder
/// (`$STRATASCOPE_CACHE`, or `stratascope` in the platform's cache folder), so a second clone finds them there.
/// Everything already done is skipped; an interrupted command goes on where it stopped when run again.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// From English text to a page in the browser: harvest, train, eval, features, site.
    ///
    /// Sets the machine up and then: fetches model and text; harvests the activations of one middle layer of
    /// SmolLM2-135M; trains a JumpReLU autoencoder of 4096 latents on them; evaluates it; collects what each
    /// latent responds to; builds the page; serves it on a loopback address and prints the URL.
    /// The settings are in configs/demo.toml. Work is kept in target/demo: finished stages are not run again
    /// while their inputs are the same, and an interrupted one goes on where it was.
    Demo(demo::Args),
    /// Every check: formatting, lints, unit and end-to-end tests, the page, the browser tests.
    ///
    /// Sets the machine up and then runs, in this order: rustfmt; cargo-deny, where it is installed; clippy for
    /// native and for wasm; all cargo tests; the build of the page; and the page in headless Chromium, with a
    /// WebGPU adapter and without. Stops at the first failure. This is what continuous integration runs.
    Test(test::Args),
    /// Speed beside other programs, on this machine.
    Bench(bench::Args),
    /// Only the set-up of `demo` (with its model and text) or `test`.
    ///
    /// Useful before going offline, and in the image of a build machine.
    Setup(setup::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if run::was_stopped() => {
            eprintln!("\nStopped; run the same command again to go on from here.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Command) -> Result<()> {
    run::watch_signals()?;
    let places = Places::find()?;
    match command {
        Command::Demo(args) => demo::run(&places, args),
        Command::Test(args) => test::run(&places, args),
        Command::Bench(args) => bench::run(&places, args),
        Command::Setup(args) => {
            let mut report = Report::new();
            setup::run(&places, args.purpose, &mut report)?;
            if args.purpose == Purpose::Demo {
                inputs::ensure(&places, &mut report, &Source::Auto, None)?;
            }
            eprintln!("\nEverything is ready in {}.", places.cache.display());
            Ok(())
        }
    }
}
