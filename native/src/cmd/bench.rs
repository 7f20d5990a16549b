//! `stratascope bench`: measurements of this program by itself. Hidden from the list of commands: `cargo xtask bench`
//! is what people run.

use std::fs;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use shared::Precision;
use shared::config::Count;
use shared::config::train::{EncoderPrecision, Products};

use crate::bench::{CudaBench, HarvestBench, MlsaeStepBench, Shape, TrainStepBench, compare};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The forward pass of a harvest, one round for each line `round` on standard input.
    ///
    /// Prints one line of JSON when it is ready and one for each round. The line `peak` asks for the speed of one large
    /// f32 product instead. Ends with its input.
    Harvest(HarvestArgs),
    /// Activations and next-token losses in a number format beside those in f32.
    Precision(PrecisionArgs),
    /// A training step of a JumpReLU autoencoder on made-up vectors, driven as `harvest` is.
    TrainStep(TrainStepArgs),
    /// Batches and steps of multi-layer autoencoders beside one of a single layer, over as many made-up vectors, in turn.
    ///
    /// Prints the best round of each as JSON, then `ratio mlsae-over-single X.XX` and the like.
    MlsaeStep(MlsaeStepArgs),
    /// Training steps on a card, width by width, beside what the card can do at best: its copy bandwidth and the speed of a product.
    ///
    /// Prints a table; the floor of a step is its encoder product at that speed and the bytes that must move at that bandwidth. With
    /// `--routes`, a second table has both routes of a step, latent by latent and by matrix products, and which of them training takes.
    Cuda(CudaArgs),
}

#[derive(Debug, clap::Args)]
struct CudaArgs {
    /// The card, such as cuda:0.
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    device: crate::cuda::Choice,
    /// Width of the vectors.
    #[arg(long, value_name = "N", default_value_t = 2304)]
    d: usize,
    /// Latents, one line of the table each.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "16384,65536,131072,262144,1048576"
    )]
    widths: Vec<usize>,
    /// Rows of a batch.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    batch: usize,
    /// Mean active latents of a row.
    #[arg(long, value_name = "N", default_value_t = 64)]
    l0: usize,
    /// Mean active latents of a row at which both routes of a step are timed too, at each width.
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    routes: Vec<usize>,
    /// Steps timed of each, after two that are not.
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: usize,
    /// How products are computed: tf32, f32, bf16 or bf16x3.
    #[arg(long, value_name = "HOW", default_value = "tf32", value_parser = products)]
    products: Products,
}

#[derive(Debug, clap::Args)]
struct HarvestArgs {
    /// The model: a Hugging Face folder or a .gguf file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// A UTF-8 text file.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The number format: f32, bf16 or q8_0.
    #[arg(long, value_name = "FORMAT", default_value_t = Precision::F32)]
    precision: Precision,
    /// Sequences of a round.
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,
    /// Blocks to run; the residual stream after the last is read.
    #[arg(long, value_name = "N", default_value_t = 15)]
    layers: usize,
    /// Write the token ids as a JSON list of sequences, for another program.
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct PrecisionArgs {
    /// The model: a Hugging Face folder or a .gguf file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// A UTF-8 text file.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The number format: bf16 or q8_0.
    #[arg(long, value_name = "FORMAT")]
    precision: Precision,
    /// Tokens to run.
    #[arg(long, value_name = "N", default_value = "10240")]
    tokens: Count,
}

#[derive(Debug, clap::Args)]
struct MlsaeStepArgs {
    /// Layers.
    #[arg(long, value_name = "N", default_value_t = 30)]
    layers: usize,
    /// Rounds, of a step each.
    #[arg(long, value_name = "N", default_value_t = 8)]
    rounds: usize,
    #[command(flatten)]
    step: TrainStepArgs,
}

#[derive(Debug, clap::Args)]
struct TrainStepArgs {
    /// Width of the vectors.
    #[arg(long, value_name = "N", default_value_t = 576)]
    d: usize,
    /// Latents.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    width: usize,
    /// Rows of a batch.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    batch: usize,
    /// Mean active latents of a row.
    #[arg(long, value_name = "N", default_value_t = 64)]
    l0: usize,
    /// Write batch, directions and thresholds as safetensors, for another program.
    #[arg(long, value_name = "FILE")]
    vectors: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Harvest(args) => harvest(args),
        Command::Precision(args) => {
            let tokens = usize::try_from(args.tokens.0).context("too many tokens")?;
            let report = compare(&args.model, &args.text, args.precision, tokens)?;
            print(&report)
        }
        Command::TrainStep(args) => train_step(args),
        Command::MlsaeStep(args) => mlsae_step(args),
        Command::Cuda(args) => cuda(args),
    }
}

fn products(text: &str) -> Result<Products, String> {
    let word = toml::Value::String(text.to_owned());
    word.try_into().map_err(|_| format!("`{text}` is none of tf32, f32, bf16 and bf16x3"))
}

fn cuda(args: &CudaArgs) -> Result<()> {
    let device = crate::cuda::open(args.device)?
        .context("the processor has no kernels; name a card, such as cuda:0")?;
    let bench = CudaBench::new(device, args.products);
    let peaks = bench.peaks(args.d, args.batch, 1 << 28)?;
    writeln!(
        io::stdout(),
        "{}: copies {:.0} GB/s, products {:.0} TFLOP/s ({:?}, {} x {} x 8192)\n{}",
        peaks.device,
        peaks.bandwidth / 1e9,
        peaks.flops / 1e12,
        args.products,
        args.batch,
        args.d,
        crate::bench::CudaStep::HEAD
    )?;
    for &width in &args.widths {
        match bench.step(&peaks, args.d, width, args.batch, args.l0, args.steps) {
            Ok(step) => writeln!(io::stdout(), "{step}")?,
            // A width that does not fit is a line of the table, not the end of it.
            Err(error) => writeln!(io::stdout(), "{width:>9}  {error:#}")?,
        }
    }
    if !args.routes.is_empty() {
        writeln!(io::stdout(), "{}", crate::bench::CudaRoutes::HEAD)?;
    }
    for &width in &args.widths {
        for &l0 in args.routes.iter().filter(|&&l0| l0 < width) {
            let rates = bench.rates(args.d, width, args.batch)?;
            match bench.routes(&rates, [args.d, width, args.batch, l0, args.steps]) {
                Ok(routes) => writeln!(io::stdout(), "{routes}")?,
                Err(error) => writeln!(io::stdout(), "{width:>9} {l0:>6}  {error:#}")?,
            }
        }
    }
    Ok(())
}

fn harvest(args: &HarvestArgs) -> Result<()> {
    let shape = (args.batch, args.length);
    let bench = HarvestBench::load(&args.model, &args.text, args.precision, shape, args.layers)?;
    if let Some(path) = &args.ids {
        let sequences: Vec<&[u32]> = bench.ids().chunks(args.length).collect();
        fs::write(path, serde_json::to_vec(&sequences)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(&bench.ready())?;
    answer(|_| print(&bench.round()?))
}

fn train_step(args: &TrainStepArgs) -> Result<()> {
    let mut bench = TrainStepBench::new(args.d, args.width, args.batch, args.l0)?;
    if let Some(path) = &args.vectors {
        bench.write(path)?;
    }
    print(&bench.ready())?;
    answer(|bf16| print(&bench.round(if bf16 { EncoderPrecision::Bf16 } else { EncoderPrecision::F32 })?))
}

fn mlsae_step(args: &MlsaeStepArgs) -> Result<()> {
    let TrainStepArgs { d, width, batch, l0, .. } = args.step;
    let shape = Shape { d, n_latents: width, batch, l0 };
    let rounds = MlsaeStepBench::new(args.layers, shape)?.rounds(args.rounds)?;
    rounds.iter().try_for_each(print)?;
    for (multi, single) in [("mlsae", "single"), ("mlsae-per-layer", "single"), ("mlsae-topk", "single-topk")]
    {
        let seconds = |name| rounds.iter().find(|round| round.name == name).map_or(f64::NAN, |r| r.seconds);
        writeln!(io::stdout(), "ratio {multi}-over-{single} {:.2}", seconds(multi) / seconds(single))?;
    }
    Ok(())
}

/// Runs `round` for every line `round` of the input (with true for `round-bf16`), and one large product for every line `peak`.
fn answer(mut round: impl FnMut(bool) -> Result<()>) -> Result<()> {
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            "round" => round(false)?,
            "round-bf16" => round(true)?,
            "peak" => print(&serde_json::json!({ "gflops": HarvestBench::peak_gflops()? }))?,
            other => bail!("expected `round`, `round-bf16` or `peak`, found `{other}`"),
        }
    }
    Ok(())
}

/// One line, at once.
fn print(value: &impl serde::Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(out.flush()?)
}
