//! How fast a store is read, beside a plain reading of the same bytes, in turn in one process.
//!
//! `cargo run --release -p native --example bench_store [FOLDER]` harvests from a model that is a formula, which also measures
//! how fast vectors are written, shuffled and checked; then it reads the shards. FOLDER must not exist, and is removed.
//! "Fresh" reads into memory that was never used, "used" into memory used before; "cold" empties the page cache of the
//! files first, where `dd` can do that. Figures are those of the best of seven rounds.

#![expect(clippy::cast_precision_loss, reason = "figures are shown with three digits")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use native::harvest::source::{ActivationModel, Encode};
use native::harvest::{self, Inputs};
use native::model::ModelProvenance;
use native::stop::StopFlag;
use native::store::manifest::TokenizerInfo;
use native::store::{Shard, Split, Store};
use shared::Rows;
use shared::config::harvest::{HarvestConfig, StoreDtype};
use shared::config::{Count, Portion};
use shared::tap::{Site, TapPoint};

const WIDTH: usize = 576;
const TOKENS: u64 = 300_000;
const ROUNDS: usize = 7;

/// A token a word: words are numbers. Vectors are the bits of a counter.
struct Formula;

impl Encode for Formula {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}

impl ActivationModel for Formula {
    fn n_layers(&self) -> usize {
        1
    }

    fn context_length(&self) -> usize {
        256
    }

    fn width(&self, _site: Site) -> usize {
        WIDTH
    }

    fn activations(
        &self,
        ids: &[u32],
        _sequence_length: usize,
        points: &[TapPoint],
        read: &mut dyn FnMut(TapPoint, Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        let value = |id: u32, j: usize| ((id as usize * 31 + j * 17) % 4093) as f32 / 1024.0 - 2.0;
        let values: Vec<f32> = ids.iter().flat_map(|&id| (0..WIDTH).map(move |j| value(id, j))).collect();
        points.iter().try_for_each(|&point| read(point, Rows::new(&values, WIDTH)?))
    }
}

fn make(folder: &Path, text: &Path, dtype: StoreDtype) -> Result<Store> {
    let config = HarvestConfig {
        model: "formula".to_owned(),
        text: vec![text.display().to_string()],
        taps: vec!["resid.0".to_owned()],
        max_document_bytes: Count(1 << 30),
        tokens: Count(TOKENS),
        held_out: Portion::Share(0.0),
        dtype,
        ..HarvestConfig::default()
    };
    let tokenizer = TokenizerInfo {
        vocab_size: 1 << 20,
        bos: None,
        separator: None,
        special_ids: Vec::new(),
        dropped_ids: Vec::new(),
    };
    let provenance = ModelProvenance {
        name: "formula".to_owned(),
        source: "formula".to_owned(),
        format: "none".to_owned(),
        sha256: "0".repeat(64),
        architecture: "formula".to_owned(),
        precision: shared::Precision::F32,
    };
    let inputs = Inputs { encode: &Formula, model: &Formula, tokenizer, provenance, d_model: WIDTH };
    let summary = harvest::run(&config, folder, &inputs, &StopFlag::default())?;
    let rate = summary.bytes as f64 / 1e9 / (summary.seconds * summary.disk_share);
    writeln!(std::io::stdout(), "written and shuffled: {rate:.2} GB/s of finished shards")?;
    Store::open(folder)
}

/// Seconds of the fastest of [`ROUNDS`] rounds of each of `works`, in turn.
fn best(works: &mut [&mut dyn FnMut() -> Result<()>], before: &dyn Fn() -> Result<()>) -> Result<Vec<f64>> {
    let mut best = vec![f64::INFINITY; works.len()];
    for _ in 0..ROUNDS {
        for (best, work) in best.iter_mut().zip(works.iter_mut()) {
            before()?;
            let started = Instant::now();
            work()?;
            *best = best.min(started.elapsed().as_secs_f64());
        }
    }
    Ok(best)
}

fn measure(store: &Store, folder: &Path, name: &str) -> Result<()> {
    let point = store.manifest().taps[0].point;
    let paths: Vec<PathBuf> = (0..store.n_shards(Split::Train))
        .map(|index| folder.join(format!("train/{point}/shard-{index:05}.safetensors")))
        .collect();
    let total = store.manifest().shard_bytes() as f64 / 1e9;
    let shards = 0..store.n_shards(Split::Train);
    let (mut used, mut shard) = (Vec::new(), Shard::default());
    let mut raw_fresh = || paths.iter().try_for_each(|path| fs::read(path).map(drop)).context("read");
    let mut raw_used = || {
        paths.iter().try_for_each(|path| {
            let mut file = File::open(path)?;
            used.resize(usize::try_from(file.metadata()?.len())?, 0);
            Ok(file.read_exact(&mut used)?)
        })
    };
    let mut ours_fresh =
        || shards.clone().try_for_each(|index| store.read_shard(point, Split::Train, index).map(drop));
    let mut ours_used =
        || shards.clone().try_for_each(|index| store.read_shard_into(point, Split::Train, index, &mut shard));
    let warm = best(&mut [&mut raw_fresh, &mut raw_used, &mut ours_fresh, &mut ours_used], &|| Ok(()))?;
    let drop_cache = || {
        paths.iter().try_for_each(|path| {
            let from = format!("if={}", path.display());
            let args = [from.as_str(), "iflag=nocache", "count=0"];
            let status = Command::new("dd").args(args).stderr(Stdio::null()).status()?;
            status.success().then_some(()).context("dd cannot empty the page cache")
        })
    };
    let mut out = std::io::stdout();
    let mut show = |what: &str, raw: f64, ours: f64| {
        let (raw_rate, rate) = (total / raw, total / ours);
        writeln!(out, "{name} {what}: raw {raw_rate:.2} GB/s, store {rate:.2} GB/s")?;
        writeln!(out, "ratio store-read-{name}-{what} {:.2}", raw / ours)
    };
    show("fresh", warm[0], warm[2])?;
    show("used", warm[1], warm[3])?;
    if drop_cache().is_ok() {
        let cold = best(&mut [&mut raw_fresh, &mut ours_fresh], &drop_cache)?;
        show("cold", cold[0], cold[1])?;
    }
    let started = Instant::now();
    store.verify(|_| ())?;
    let rate = total / started.elapsed().as_secs_f64();
    Ok(writeln!(out, "{name} verified with SHA-256 on all cores: {rate:.2} GB/s")?)
}

fn main() -> Result<()> {
    let folder =
        std::env::args_os().nth(1).map_or_else(|| std::env::temp_dir().join("bench-store"), PathBuf::from);
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let text = folder.join("numbers.txt");
    let words: Vec<String> = (0..2 * TOKENS).map(|i| (i % 1_000_003).to_string()).collect();
    fs::write(&text, words.join(" "))?;
    for (dtype, name) in [(StoreDtype::F32, "f32"), (StoreDtype::Bf16, "bf16"), (StoreDtype::F16, "f16")] {
        let place = folder.join(name);
        let store = make(&place, &text, dtype)?;
        measure(&store, &place, name)?;
        fs::remove_dir_all(&place)?;
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}
