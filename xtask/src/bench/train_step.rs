//! A JumpReLU training step beside SAELens'.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

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
        let (ours, peer, peak) = take_turns(&mut pair, args.rounds)?;
        print_table(&pair, width, ours, peer, peak)?;
        lines.extend(ratio(width, ours, peer));
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

/// The first step of each is not counted. Returns the best of both, and of one large f32 product in GFLOP/s.
fn take_turns(pair: &mut Pair, rounds: u32) -> Result<(Best, Option<Best>, f64)> {
    let none = Best { seconds: f64::INFINITY, forward: f64::INFINITY, encoder: f64::INFINITY, l0: 0.0 };
    let (mut ours, mut peer, mut peak) = (none, pair.peer.as_ref().map(|_| none), 0.0f64);
    for round in 0..=rounds {
        ensure!(!run::was_stopped(), "stopped");
        let answer = pair.ours.ask("round")?;
        let beside = pair.peer.as_mut().map(|peer| peer.ask("round")).transpose()?;
        peak = peak.max(number(&pair.ours.ask("peak")?, "gflops")?);
        if round == 0 {
            continue;
        }
        ours.seconds = ours.seconds.min(number(&answer, "seconds")?);
        ours.forward = ours.forward.min(number(&answer, "forward_seconds")?);
        ours.encoder = ours.encoder.min(number(&answer, "encoder_seconds")?);
        ours.l0 = number(&answer, "l0")?;
        if let (Some(peer), Some(answer)) = (&mut peer, beside) {
            peer.seconds = peer.seconds.min(number(&answer, "seconds")?);
            peer.l0 = number(&answer, "l0")?;
        }
    }
    Ok((ours, peer, peak))
}

fn print_table(pair: &Pair, width: usize, ours: Best, peer: Option<Best>, peak: f64) -> Result<()> {
    let (tokens, flops) = (number(&pair.ours.ready, "tokens")?, number(&pair.ours.ready, "encoder_flops")?);
    println!("d {D}, width {width}, batch {BATCH}; one large f32 product: {peak:.0} GFLOP/s");
    let line = |name: &str, best: Best| {
        let (speed, ms) = (tokens / best.seconds, best.seconds * 1e3);
        println!("{name:<12} {speed:>7.0} tokens/s  {ms:>6.0} ms a step  L0 {:.1}", best.l0);
    };
    line("stratascope", ours);
    let gflops = flops / ours.encoder / 1e9;
    println!(
        "             encoder {:.0} ms, {gflops:.0} GFLOP/s, {:.0} % of it; forward {:.0} ms, backward and Adam {:.0} ms",
        ours.encoder * 1e3,
        100.0 * gflops / peak,
        ours.forward * 1e3,
        (ours.seconds - ours.forward) * 1e3
    );
    if let (Some(best), Some(worker)) = (peer, &pair.peer) {
        line("SAELens", best);
        let word = |key| worker.ready.get(key).and_then(serde_json::Value::as_str).unwrap_or("?");
        println!("             sae_lens {}, torch {}", word("sae_lens"), word("torch"));
        let apart = (best.l0 / ours.l0 - 1.0).abs();
        ensure!(
            apart < 0.01,
            "SAELens has {:.2} active latents, ours {:.2}: not the same step",
            best.l0,
            ours.l0
        );
    }
    Ok(())
}

/// `ratio NAME X.XX`: SAELens' time over ours.
fn ratio(width: usize, ours: Best, peer: Option<Best>) -> Option<String> {
    peer.map(|peer| format!("ratio train-step-{width} {:.2}", peer.seconds / ours.seconds))
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use super::*;

    #[cfg(unix)]
    fn fixed(seconds: &str, l0: &str) -> Worker {
        let round = format!(
            "{{\"seconds\": {seconds}, \"forward_seconds\": 0.1, \"encoder_seconds\": 0.05, \"l0\": {l0}, \"gflops\": 9}}"
        );
        let script = format!(
            "echo '{{\"tokens\": 100, \"encoder_flops\": 1e9, \"threads\": 2}}'; while read x; do echo '{round}'; done"
        );
        Worker::start("sh", Command::new("sh").args(["-c", &script])).unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn ratios_are_of_equal_work() {
        let mut pair = Pair { ours: fixed("0.25", "64.0"), peer: Some(fixed("2", "64.1")) };
        let (ours, peer, peak) = take_turns(&mut pair, 3).unwrap();
        assert_eq!(peak, 9.0);
        print_table(&pair, 8192, ours, peer, peak).unwrap();
        assert_eq!(ratio(8192, ours, peer).unwrap(), "ratio train-step-8192 8.00");
        assert!(ratio(8192, ours, None).is_none());
        let other = peer.map(|peer| Best { l0: 80.0, ..peer });
        assert!(
            print_table(&pair, 8192, ours, other, peak)
                .unwrap_err()
                .to_string()
                .contains("not the same step")
        );
    }
}
