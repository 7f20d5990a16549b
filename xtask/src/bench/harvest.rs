//! The forward pass of a harvest beside Hugging Face transformers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::worker::{Worker, number};
use crate::inputs::{self, Source};
use crate::places::Places;
use crate::report::Report;
use crate::run::{self, Program};

/// Blocks that run: half of SmolLM2's thirty.
const LAYERS: usize = 15;
/// Our number formats.
const PRECISIONS: [&str; 3] = ["f32", "bf16", "q8_0"];
/// transformers' number formats, by our names for them.
const PEER_DTYPES: [(&str, &str); 2] = [("f32", "float32"), ("bf16", "bfloat16")];
/// Memory beyond the model's own, in MiB, that a process may take.
const MEMORY_MARGIN: f64 = 1024.0;

/// Arguments of `bench harvest`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench harvest
  cargo xtask bench harvest --peer-python ~/venv/bin/python     beside transformers
  cargo xtask bench harvest --rounds 20                         on a busy machine")]
pub(crate) struct Args {
    /// A Python that can import torch and transformers (and gguf, to read the fetched model).
    #[arg(long, value_name = "PATH")]
    peer_python: Option<PathBuf>,
    /// Timed rounds of each program, after one that is not.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(3..=1000))]
    rounds: u32,
    /// The language model: a Hugging Face folder, a .gguf file, `hub`, `package`, or `auto` (hub, else package).
    #[arg(long, value_name = "PATH|WORD", default_value = "auto")]
    model: Source,
    /// A UTF-8 text file of at least 2048 tokens [default: the demo's].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

/// One of the programs, and its best round so far.
struct Contender {
    name: String,
    worker: Worker,
    seconds: f64,
    peak_mib: Option<f64>,
}

impl Contender {
    fn tokens_per_second(&self) -> Result<f64> {
        Ok(number(&self.worker.ready, "tokens")? / self.seconds)
    }
}

/// Runs the bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    inputs::check(&args.model, args.text.as_deref())?;
    let mut report = Report::new();
    let (model, text) = inputs::ensure(places, &mut report, &args.model, args.text.as_deref())?;
    let text = first_text(&text.path)?;
    Program::cargo()
        .args(["build", "--release", "--package", "native"])
        .current_dir(&places.root)
        .run()
        .context("the program could not be built")?;
    let work = places.target.join("bench");
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let ids = work.join("ids.json");
    let mut contenders = ours(places, &model.path, &text, &ids)?;
    if let Some(python) = &args.peer_python {
        contenders.extend(peers(places, python, &weights(&model.path)?, &ids)?);
    }
    let peak = take_turns(&mut contenders, args.rounds)?;
    print_table(&contenders, peak)?;
    let lines = ratios(&contenders)?;
    for contender in contenders {
        contender.worker.end()?;
    }
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn ours(places: &Places, model: &Path, text: &Path, ids: &Path) -> Result<Vec<Contender>> {
    let start = |precision: &str| {
        let mut command = Command::new(places.binary("release"));
        command.args(["bench", "harvest", "--precision", precision, "--layers", &LAYERS.to_string()]);
        command.arg("--model").arg(model).arg("--text").arg(text).arg("--ids").arg(ids);
        contender(format!("stratascope {precision}"), &mut command)
    };
    PRECISIONS.into_iter().map(start).collect()
}

fn peers(places: &Places, python: &Path, model: &Path, ids: &Path) -> Result<Vec<Contender>> {
    let script = places.root.join("tests").join("peers").join("bench_harvest.py");
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let start = |(name, dtype): (&str, &str)| {
        let mut command = Command::new(python);
        command.arg(&script).arg(model).arg(ids).args(["--dtype", dtype]);
        command.args(["--layers", &LAYERS.to_string(), "--threads", &threads.to_string()]);
        contender(format!("transformers {name}"), &mut command)
    };
    PEER_DTYPES.into_iter().map(start).collect()
}

fn contender(name: String, command: &mut Command) -> Result<Contender> {
    eprintln!("starting {name}");
    let worker = Worker::start(&name, command)?;
    Ok(Contender { name, worker, seconds: f64::INFINITY, peak_mib: None })
}

/// The first round of each is not counted. Returns the best speed of one large f32 product, GFLOP/s.
fn take_turns(contenders: &mut [Contender], rounds: u32) -> Result<f64> {
    let mut peak: f64 = 0.0;
    for round in 0..=rounds {
        for contender in contenders.iter_mut() {
            ensure!(!run::was_stopped(), "stopped");
            let answer = contender.worker.ask("round")?;
            let seconds = number(&answer, "seconds")?;
            contender.peak_mib = answer.get("peak_mib").and_then(serde_json::Value::as_f64);
            if round > 0 {
                contender.seconds = contender.seconds.min(seconds);
            }
        }
        if let Some(first) = contenders.first_mut() {
            peak = peak.max(number(&first.worker.ask("peak")?, "gflops")?);
        }
    }
    Ok(peak)
}

fn print_table(contenders: &[Contender], peak: f64) -> Result<()> {
    println!("one large f32 product: {peak:.0} GFLOP/s");
    let flops = contenders.first().map(|first| number(&first.worker.ready, "flops")).transpose()?;
    for contender in contenders {
        let gflops = flops.unwrap_or(0.0) / contender.seconds / 1e9;
        let speed = contender.tokens_per_second()?;
        let share = 100.0 * gflops / peak;
        print!("{:<20} {speed:>6.0} tokens/s  {gflops:>5.0} GFLOP/s  {share:>3.0} % of it", contender.name);
        let model = contender.worker.ready.get("model_mib").and_then(serde_json::Value::as_f64);
        match (model, contender.peak_mib) {
            (Some(model), Some(peak)) => {
                println!("  {peak:.0} MiB at most, {:.0} beyond the model", peak - model);
                ensure!(
                    peak <= model + MEMORY_MARGIN,
                    "{} took {peak:.0} MiB, wanted at most the model's {model:.0} and {MEMORY_MARGIN:.0} more",
                    contender.name
                );
            }
            _ => println!("  {}", about(&contender.worker.ready)),
        }
    }
    Ok(())
}

/// What transformers says of itself.
fn about(ready: &serde_json::Value) -> String {
    let word = |key| ready.get(key).and_then(serde_json::Value::as_str).unwrap_or("?");
    format!("transformers {}, torch {}, {} attention", word("transformers"), word("torch"), word("attention"))
}

/// `ratio NAME X.XX`: ours in every precision over transformers in f32, and in bf16 over transformers in bf16.
fn ratios(contenders: &[Contender]) -> Result<Vec<String>> {
    let find = |name: String| contenders.iter().find(|c| c.name == name);
    let ratio = |name: &str, ours: &str, theirs: &str| -> Result<Option<String>> {
        let pair = find(format!("stratascope {ours}")).zip(find(format!("transformers {theirs}")));
        let Some((ours, theirs)) = pair else { return Ok(None) };
        Ok(Some(format!("ratio {name} {:.2}", ours.tokens_per_second()? / theirs.tokens_per_second()?)))
    };
    let mut lines = vec![ratio("harvest-bf16-vs-bf16", "bf16", "bf16")?];
    for precision in PRECISIONS {
        lines.push(ratio(&format!("harvest-{precision}"), precision, "f32")?);
    }
    Ok(lines.into_iter().flatten().collect())
}

/// The first .txt file of a folder, or the file itself.
fn first_text(path: &Path) -> Result<PathBuf> {
    first_with(path, "txt").with_context(|| format!("no .txt file in {}", path.display()))
}

/// What transformers loads: the one .gguf file of a folder without a config.json, else the path itself.
fn weights(path: &Path) -> Result<PathBuf> {
    if path.is_dir() && !path.join("config.json").is_file() {
        return first_with(path, "gguf").with_context(|| format!("no model in {}", path.display()));
    }
    Ok(path.to_owned())
}

fn first_with(path: &Path, extension: &str) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_owned());
    }
    let entries = fs::read_dir(path).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> =
        entries.filter(|file| file.is_file() && file.extension().is_some_and(|e| e == extension)).collect();
    found.sort();
    found.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    fn fixed(name: &str, seconds: &str) -> Contender {
        let script = format!(
            "echo '{{\"tokens\": 100, \"flops\": 1e9, \"model_mib\": 10}}'; \
             while read x; do echo '{{\"seconds\": {seconds}, \"gflops\": 4, \"peak_mib\": 20}}'; done"
        );
        contender(name.to_owned(), Command::new("sh").args(["-c", &script])).unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn ratios_are_of_the_best_rounds() {
        let mut all = vec![fixed("stratascope f32", "0.5"), fixed("transformers f32", "0.75")];
        assert_eq!(take_turns(&mut all, 3).unwrap(), 4.0);
        assert_eq!(ratios(&all).unwrap(), ["ratio harvest-f32 1.50"]);
        print_table(&all, 4.0).unwrap();
        assert!(ratios(&all[..1]).unwrap().is_empty());
        all[0].peak_mib = Some(2000.0);
        assert!(print_table(&all, 4.0).unwrap_err().to_string().contains("wanted at most the model's 10"));
    }

    #[test]
    fn texts_and_weights_are_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(first_text(folder.path()).is_err() && weights(folder.path()).is_err());
        for name in ["b.txt", "a.txt", "a.gguf"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        assert_eq!(first_text(folder.path()).unwrap(), folder.path().join("a.txt"));
        assert_eq!(weights(folder.path()).unwrap(), folder.path().join("a.gguf"));
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(weights(folder.path()).unwrap(), folder.path());
    }
}
