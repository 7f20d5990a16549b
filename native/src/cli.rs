//! The command line: one variant a command, each a thin file in `cmd/` over a library module.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{cmd, hub, stop};

/// Sparse autoencoders for language models: harvest, train, evaluate, look.
///
/// The commands follow the data: `harvest` runs a language model over text and stores activations,
/// `train` fits a sparse autoencoder to them, `eval` measures it, `features` collects what each latent
/// responds to, and `site` turns the result into a static web page.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
struct Cli {
    /// Never use the network: what models and texts of the hub need must be in the cache (as HF_HUB_OFFLINE=1).
    #[arg(long, global = true)]
    offline: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a language model over text and store the activations at chosen taps.
    Harvest(cmd::harvest::Args),
    /// Fit linear maps that bring the residual stream of every layer into one space.
    Lens(cmd::lens::Args),
    /// Train a sparse autoencoder from a store of activations.
    Train(cmd::train::Args),
    /// Measure a trained autoencoder: L0, FVU, delta loss, dead latents, density.
    Eval(cmd::eval::Args),
    /// Collect what each latent responds to, as a pack for the page.
    Features(cmd::features::Args),
    /// Put the built page and packs together as static files, and optionally serve them.
    Site(cmd::site::Args),
    /// Encode vectors of a safetensors file with an autoencoder.
    Encode(cmd::encode::Args),
    /// Convert an autoencoder between file formats.
    Convert(cmd::convert::Args),
    /// Explain what a model, a store, an autoencoder or a pack holds.
    Inspect(cmd::inspect::Args),
    /// Run the language model itself.
    Lm(cmd::lm::Args),
    /// Measure this program by itself; `cargo xtask bench` runs it beside others.
    #[command(hide = true)]
    Bench(cmd::bench::Args),
    /// Judge the training step of this machine, or of a card, by the reference.
    Selftest(cmd::selftest::Args),
    /// Report what this machine offers and what is missing.
    Doctor(cmd::doctor::Args),
}

/// Parses the arguments, runs the command, and reports a failure once, with its whole chain of causes.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("STRATASCOPE_LOG").unwrap_or_else(|_| EnvFilter::new("warn,native=info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    logs.with_ansi(io::stderr().is_terminal()).with_target(false).init();
    if cli.offline {
        hub::set_offline();
    }
    let result = match &cli.command {
        Command::Harvest(args) => cmd::harvest::run(args),
        Command::Lens(args) => cmd::lens::run(args),
        Command::Train(args) => cmd::train::run(args),
        Command::Eval(args) => cmd::eval::run(args),
        Command::Features(args) => cmd::features::run(args),
        Command::Site(args) => cmd::site::run(args),
        Command::Encode(args) => cmd::encode::run(args),
        Command::Convert(args) => cmd::convert::run(args),
        Command::Inspect(args) => cmd::inspect::run(args),
        Command::Lm(args) => cmd::lm::run(args),
        Command::Bench(args) => cmd::bench::run(args),
        Command::Selftest(args) => cmd::selftest::run(args),
        Command::Doctor(args) => cmd::doctor::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<stop::Stopped>() => {
            tracing::warn!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A reader that closed its end early (`stratascope inspect … | head`) is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
