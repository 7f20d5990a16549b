//! A JumpReLU training step beside SAELens', with the encoder product in f32 and through bf16.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::worker::{Worker, number};
use crate::places::Places;
use crate::run::{self, Program};

/// Width of the vectors: SmolLM2-135M's.
const D: usize = 576;
/// Rows of a batch.
const BATCH: usize = 2048;
/// Mean active latents of a row.
const L0: usize = 64;
/// Widths of the autoencoders.
const WIDTHS: [usize; 2] = [8192, 32768];

/// Arguments of `bench train-step`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench train-step
  cargo xtask bench train-step --peer-python ~/venv/bin/python     beside SAELens")]
pub(crate) struct Args {
    /// A Python that can import sae_lens.
    #[arg(long, value_name = "PATH")]
    peer_python: Option<PathBuf>,
    /// Timed steps of each program, after one that is not.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(3..=1000))]
    rounds: u32,
}

/// The best round of a program, each figure by itself.
#[derive(Debug, Clone, Copy)]
struct Best {
    seconds: f64,
    forward: f64,
    encoder: f64,
    l0: f64,
    /// Pre-activations of a row computed once more.
    again: f64,
}

impl Best {
    const NONE: Self =
        Self { seconds: f64::INFINITY, forward: f64::INFINITY, encoder: f64::INFINITY, l0: 0.0, again: 0.0 };

    /// Takes a round of ours into account.
    fn take(&mut self, answer: &Value) -> Result<()> {
        self.seconds = self.seconds.min(number(answer, "seconds")?);
        self.forward = self.forward.min(number(answer, "forward_seconds")?);
        self.encoder = self.encoder.min(number(answer, "encoder_seconds")?);
        (self.l0, self.again) = (number(answer, "l0")?, number(answer, "again")?);
        Ok(())
    }
}

/// All that was measured at a width.
#[derive(Debug, Clone, Copy)]
struct Measured {
    ours: Best,
    /// With the encoder product through bf16.
    bf16: Best,
    peer: Option<Best>,
    /// GFLOP/s of one large f32 product.
    product: f64,
    /// The most memory of the first step, in MiB, where the system says.
    peak_mib: Option<f64>,
}

/// Ours, and SAELens where it is asked for.
struct Pair {
    ours: Worker,
    peer: Option<Worker>,
}

/// Runs the bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    Program::cargo()
        .args(["build", "--release", "--package", "native"])
        .current_dir(&places.root)
        .run()
        .context("the program could not be built")?;
    let work = places.target.join("bench");
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let mut lines = Vec::new();
    for width in WIDTHS {
        let vectors = work.join(format!("train-step-{width}.safetensors"));
        let mut pair = start(places, args.peer_python.as_deref(), width, &vectors)?;
        let measured = take_turns(&mut pair, args.rounds)?;
        print_table(&pair, width, &measured)?;
        lines.extend(ratios(width, &measured));
        pair.ours.end()?;
        pair.peer.map_or(Ok(()), Worker::end)?;
        fs::remove_file(&vectors).with_context(|| format!("cannot remove {}", vectors.display()))?;
    }
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn start(places: &Places, python: Option<&Path>, width: usize, vectors: &Path) -> Result<Pair> {
    let mut command = Command::new(places.binary("release"));
    command.args(["bench", "train-step", "--d", &D.to_string(), "--batch", &BATCH.to_string()]);
    command.args(["--l0", &L0.to_string(), "--width", &width.to_string()]);
    command.arg("--vectors").arg(vectors);
    let ours = Worker::start("stratascope", &mut command)?;
    let threads = number(&ours.ready, "threads")?;
    let peer = python.map(|python| {
        let mut command = Command::new(python);
        command.arg(places.root.join("tests").join("peers").join("bench_train_step.py")).arg(vectors);
        command.args(["--threads", &format!("{threads:.0}")]);
        Worker::start("SAELens", &mut command)
    });
    Ok(Pair { ours, peer: peer.transpose()? })
}

/// The first step of each is not counted, but for its memory.
fn take_turns(pair: &mut Pair, rounds: u32) -> Result<Measured> {
    let (none, peer) = (Best::NONE, pair.peer.as_ref().map(|_| Best::NONE));
    let mut measured = Measured { ours: none, bf16: none, peer, product: 0.0, peak_mib: None };
    for round in 0..=rounds {
        ensure!(!run::was_stopped(), "stopped");
        let ours = pair.ours.ask("round")?;
        let beside = pair.peer.as_mut().map(|peer| peer.ask("round")).transpose()?;
        let bf16 = pair.ours.ask("round-bf16")?;
        measured.product = measured.product.max(number(&pair.ours.ask("peak")?, "gflops")?);
        if round == 0 {
            measured.peak_mib = bf16.get("peak_mib").and_then(Value::as_f64);
            continue;
        }
        measured.ours.take(&ours)?;
        measured.bf16.take(&bf16)?;
        if let (Some(peer), Some(answer)) = (&mut measured.peer, beside) {
            peer.seconds = peer.seconds.min(number(&answer, "seconds")?);
            peer.l0 = number(&answer, "l0")?;
        }
    }
    Ok(measured)
}

fn print_table(pair: &Pair, width: usize, measured: &Measured) -> Result<()> {
    let ready = &pair.ours.ready;
    let tokens = number(ready, "tokens")?;
    let product = measured.product;
    println!("d {D}, width {width}, batch {BATCH}; one large f32 product: {product:.0} GFLOP/s");
    let line = |name: &str, best: Best| {
        let (speed, ms) = (tokens / best.seconds, best.seconds * 1e3);
        println!("{name:<17} {speed:>7.0} tokens/s  {ms:>6.0} ms a step  L0 {:.1}", best.l0);
    };
    for (name, best, key) in
        [("stratascope", measured.ours, "f32_ceiling"), ("stratascope bf16", measured.bf16, "bf16_ceiling")]
    {
        line(name, best);
        let gflops = number(ready, "encoder_flops")? / best.encoder / 1e9;
        let ceiling = ready.get(key).and_then(Value::as_f64);
        let of_ceiling = ceiling.map_or_else(String::new, |ceiling| {
            format!(", {:.0} % of {ceiling:.0} GFLOP/s in registers", 100.0 * gflops / ceiling)
        });
        println!(
            "                  encoder {:.0} ms, {gflops:.0} GFLOP/s: {:.0} % of the large product{of_ceiling}",
            best.encoder * 1e3,
            100.0 * gflops / product,
        );
        let (forward, rest) = (best.forward * 1e3, (best.seconds - best.forward) * 1e3);
        let again = best.again;
        println!(
            "                  forward {forward:.0} ms, backward and Adam {rest:.0} ms; {again:.1} a row computed again"
        );
    }
    if let Some(peak) = measured.peak_mib {
        let (batch, state) = (number(ready, "batch_mib")?, number(ready, "state_mib")?);
        println!(
            "memory            {:.0} MiB at most without the batch, of which {state:.0} parameters and moments; the batch {batch:.1}",
            peak - batch
        );
    }
    if let (Some(best), Some(worker)) = (measured.peer, &pair.peer) {
        line("SAELens", best);
        let word = |key| worker.ready.get(key).and_then(Value::as_str).unwrap_or("?");
        println!("                  sae_lens {}, torch {}", word("sae_lens"), word("torch"));
        for l0 in [measured.ours.l0, measured.bf16.l0] {
            ensure!(
                (best.l0 / l0 - 1.0).abs() < 0.01,
                "SAELens has {:.2} active latents, ours {l0:.2}: not the same step",
                best.l0
            );
        }
    }
    Ok(())
}

/// `ratio NAME X.XX`: SAELens' time over ours.
fn ratios(width: usize, measured: &Measured) -> Vec<String> {
    let of = |name: &str, ours: Best, peer: Best| {
        format!("ratio train-step{name}-{width} {:.2}", peer.seconds / ours.seconds)
    };
    measured
        .peer
        .map_or_else(Vec::new, |peer| vec![of("", measured.ours, peer), of("-bf16", measured.bf16, peer)])
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use super::*;

    #[cfg(unix)]
    fn fixed(seconds: &str, l0: &str) -> Worker {
        let round = format!(
            "{{\"seconds\": {seconds}, \"forward_seconds\": 0.1, \"encoder_seconds\": 0.05, \"l0\": {l0}, \"again\": 80.5, \"peak_mib\": 50, \"gflops\": 9}}"
        );
        let script = format!(
            "echo '{{\"tokens\": 100, \"encoder_flops\": 1e9, \"f32_ceiling\": 20, \"batch_mib\": 4, \"state_mib\": 40, \"threads\": 2}}'; while read x; do echo '{round}'; done"
        );
        Worker::start("sh", Command::new("sh").args(["-c", &script])).unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn ratios_are_of_equal_work() {
        let mut pair = Pair { ours: fixed("0.25", "64.0"), peer: Some(fixed("2", "64.1")) };
        let measured = take_turns(&mut pair, 3).unwrap();
        assert_eq!((measured.product, measured.peak_mib, measured.bf16.again), (9.0, Some(50.0), 80.5));
        print_table(&pair, 8192, &measured).unwrap();
        assert_eq!(
            ratios(8192, &measured),
            ["ratio train-step-8192 8.00", "ratio train-step-bf16-8192 8.00"]
        );
        assert!(ratios(8192, &Measured { peer: None, ..measured }).is_empty());
        let other = measured.peer.map(|peer| Best { l0: 80.0, ..peer });
        let refused = print_table(&pair, 8192, &Measured { peer: other, ..measured }).unwrap_err();
        assert!(refused.to_string().contains("not the same step"));
    }
}
