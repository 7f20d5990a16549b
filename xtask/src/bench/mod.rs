//! Benches beside other programs: both run on this machine, round by round in turn, and what is printed at the end is ratios.
//!
//! This file owns the list of benches; one file holds one bench, `worker` talks to the programs that take turns.

mod harvest;
mod layers;
mod quality;
mod store;
mod train_step;
mod worker;
mod workshop;

use anyhow::Result;
use clap::Subcommand;

use crate::places::Places;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The forward pass of a harvest: SmolLM2-135M, its first fifteen blocks, in f32, bf16 and q8_0.
    ///
    /// Fetches the model and the text of the demo, builds the program, and runs 8 sequences of 256 tokens a round on all
    /// cores. With --peer-python also Hugging Face transformers on the same tokens, in turn with ours; the last lines are
    /// then `ratio NAME X.XX`, our tokens/s over its. A figure is that of the best round.
    Harvest(harvest::Args),
    /// Multi-layer autoencoders: one dictionary for every layer, of several kinds, measured layer by layer (configs/layers.toml).
    ///
    /// Harvests every layer's residual stream, trains all from one stream, and runs `eval --layers`; takes about an hour on two
    /// cores and 7 GB of disk.
    Layers(layers::Args),
    /// FVU and delta loss against L0: seven kinds of autoencoder at four sparsities on one store (configs/pareto.toml).
    ///
    /// Harvests, trains all from one stream, and measures them on held-out text; takes about two hours on two cores. With
    /// --peer-python also SAELens and dictionary_learning on the same vectors; the last lines are then
    /// `ratio fvu-NAME X.XX`, our FVU at that one's L0 over its FVU, to three digits.
    Quality(quality::Args),
    /// Reading the shards of a store, checksums included, beside a plain reading of the same bytes.
    ///
    /// The last lines are `ratio store-read-TYPE-HOW X.XX`, our speed over the plain one's.
    Store,
    /// A JumpReLU training step: width 576, batch 2048, 8192 and 32768 latents of which about 64 are active.
    ///
    /// With --peer-python also SAELens' step from the same weights on the same batch, in turn with ours; the last lines are
    /// then `ratio train-step-WIDTH X.XX`, its time over ours. A figure is that of the best round.
    TrainStep(train_step::Args),
}

/// Runs one bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    match &args.bench {
        Bench::Harvest(args) => harvest::run(places, args),
        Bench::Layers(args) => layers::run(places, args),
        Bench::Quality(args) => quality::run(places, args),
        Bench::Store => store::run(places),
        Bench::TrainStep(args) => train_step::run(places, args),
    }
}
