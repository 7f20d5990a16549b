//! `stratascope train`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use shared::config::harvest::HarvestConfig;
use shared::config::train::{Layers, TrainConfig};
use shared::config::{Count, Override, expand, resolve};
use shared::tap::{Site, TapPoint};

use crate::cuda::{self, Placement};
use crate::harvest::Live;
use crate::lens;
use crate::model;
use crate::stop::StopFlag;
use crate::train::room::Room;
use crate::train::{
    ActivationSource, Job, LiveTaps, StoreTaps, Summary, Translated, VectorsFile, Wiring, run_all_on, spread,
};

/// Arguments of `train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The store to train on, as written by `harvest`: a folder, or s3://bucket/prefix or gs://bucket/prefix.
    #[arg(long, value_name = "DIR", group = "data")]
    store: Option<PathBuf>,
    /// A safetensors file to train on instead of a store: `x [n, width]` f32, and optionally `held_out`.
    #[arg(long, value_name = "FILE", group = "data", conflicts_with = "tap")]
    vectors: Option<PathBuf>,
    /// Train straight from a language model, without a store: a configuration as `harvest --config` takes it.
    ///
    /// Vectors are shuffled in buckets of `bucket_vectors`; the model fills one while the autoencoder is trained on
    /// another, so that two are in memory. Further passes over the data run the model again.
    #[arg(long, value_name = "FILE", group = "data")]
    harvest: Option<PathBuf>,
    /// Set a key of the harvest, such as model=PATH, text=PATH or bucket_vectors=200k; wins over its file.
    #[arg(long = "harvest-set", value_name = "KEY=VALUE", conflicts_with_all = ["store", "vectors"])]
    harvest_set: Vec<String>,
    /// Which tap, such as resid.14; may be left out when there is only one.
    #[arg(long)]
    tap: Option<TapPoint>,
    /// One dictionary for several layers of the residual stream (a multi-layer SAE): all, or numbers such as 0,7,14. Other sites
    /// are set with `sites`, thresholds of every layer with thresholds=per_layer (docs/training.md).
    #[arg(long, value_name = "LAYERS", conflicts_with_all = ["tap", "target", "vectors"], value_parser = layers)]
    layers: Option<toml::Value>,
    /// Instead of one dictionary for all layers one autoencoder of each, in a folder of its name: the controls of a multi-layer SAE.
    #[arg(long)]
    each_layer: bool,
    /// Put a lens before a dictionary of several layers: a folder made by `stratascope lens`, or a published tuned lens. Its maps
    /// become part of the result.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["vectors", "each_layer", "target"])]
    lens: Option<PathBuf>,
    /// Reconstruct this tap from the other, such as mlp.14 from mlp_in.14: a transcoder.
    #[arg(long, value_name = "TAP", conflicts_with = "vectors")]
    target: Option<TapPoint>,
    /// Where the autoencoder, log and checkpoints go; a run interrupted there goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A TOML file of any of the keys below and more; see configs/. With `[[sae]]` tables, each with a name and keys of its
    /// own, it trains many autoencoders from one stream, each in a folder of its name.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any key of the configuration, after the file and the flags.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Number of latents.
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// The latent function: jumprelu (default), topk, batchtopk, gated or relu.
    #[arg(long, value_name = "NAME")]
    activation: Option<String>,
    /// Active latents a vector, for topk and batchtopk.
    #[arg(short, value_name = "K", conflicts_with_all = ["target_l0", "lambda"])]
    k: Option<usize>,
    /// Mean number of active latents to reach and hold, for jumprelu, gated and relu.
    #[arg(long, value_name = "L0", conflicts_with = "lambda")]
    target_l0: Option<f64>,
    /// Weight of the sparsity term, instead of a target.
    #[arg(long)]
    lambda: Option<f64>,
    /// Training tokens in all, repeats counted, such as 6M.
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    tokens: Option<Count>,
    /// Steps in all, instead of tokens.
    #[arg(long, value_name = "N")]
    steps: Option<Count>,
    /// Vectors a step.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Seed of initialisation and data order.
    #[arg(long)]
    seed: Option<u64>,
    /// Write the log as a TensorBoard event file too, beside log.jsonl, under the names SAELens gives its metrics.
    #[arg(long)]
    tensorboard: bool,
    /// What trains: auto (a card where there is one), cpu, or a card such as cuda:0. A run may go on elsewhere than it began.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: cuda::Choice,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The autoencoders to train: one, or those of the file's `[[sae]]` tables.
    fn jobs(&self) -> Result<Vec<Job>> {
        let (text, named) = match &self.config {
            Some(path) => (
                fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
                path.display().to_string(),
            ),
            None => (String::new(), "options".to_owned()),
        };
        let texts = expand(&text, "sae").with_context(|| named.clone())?;
        let job = |(name, text): (Option<String>, String)| {
            let place = name.as_ref().map_or_else(|| named.clone(), |name| format!("{named}, {name}"));
            let out = name.as_ref().map_or_else(|| self.out.clone(), |name| self.out.join(name));
            Ok(Job { name: name.unwrap_or_default(), config: self.resolve(&text).context(place)?, out })
        };
        texts.into_iter().map(job).collect()
    }

    fn resolve(&self, text: &str) -> Result<TrainConfig> {
        let mut overrides = Vec::new();
        let mut put = |key: &str, value: Option<toml::Value>| {
            overrides.extend(value.map(|value| Override::new(key, value)));
        };
        let integer = |n: u64| toml::Value::Integer(i64::try_from(n).unwrap_or(i64::MAX));
        put("tap", self.tap.map(|tap| tap.to_string().into()));
        put("target", self.target.map(|tap| tap.to_string().into()));
        put("layers", self.layers.clone());
        put("each_layer", self.each_layer.then(|| true.into()));
        put("width", self.width.map(|n| integer(n as u64)));
        put("activation", self.activation.clone().map(Into::into));
        put("k", self.k.map(|k| integer(k as u64)));
        put("target_l0", self.target_l0.map(Into::into));
        put("lambda", self.lambda.map(Into::into));
        put("tokens", self.tokens.map(|n| integer(n.0)));
        put("steps", self.steps.map(|n| integer(n.0)));
        put("batch", self.batch.map(|n| integer(n as u64)));
        put("seed", self.seed.map(integer));
        put("tensorboard", self.tensorboard.then(|| true.into()));
        for text in &self.set {
            overrides.push(Override::parse(text)?);
        }
        let mut config: TrainConfig = resolve(text, &overrides)?;
        // A flag chooses between alternatives that the file may have chosen otherwise.
        if self.target_l0.is_some() {
            config.lambda = None;
        } else if self.lambda.is_some() {
            config.target_l0 = None;
        }
        if self.tokens.is_some() {
            config.steps = None;
        }
        config.check()?;
        Ok(config)
    }

    fn live(&self, jobs: &[Job], stop: &StopFlag) -> Result<LiveTaps> {
        let text = match &self.harvest {
            Some(path) => {
                fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
            }
            None if self.harvest_set.is_empty() => {
                bail!("nothing to train on: give --store, --vectors, --harvest or --harvest-set")
            }
            None => String::new(),
        };
        let mut overrides = Vec::new();
        for text in &self.harvest_set {
            overrides.push(Override::parse(text)?);
        }
        let named = self.harvest.as_ref().map_or("harvest settings".to_owned(), |p| p.display().to_string());
        let mut config: HarvestConfig = resolve(&text, &overrides).context(named)?;
        if config.taps.is_empty() {
            let wanted: BTreeSet<String> = jobs.iter().flat_map(|job| harvested(&job.config)).collect();
            config.taps.extend(wanted);
        }
        config.validate()?;
        config.token_cache.get_or_insert_with(|| "auto".to_owned());
        let loaded = model::load_as(config.model.as_ref(), config.precision)?;
        LiveTaps::new(Live::new(&config, loaded, stop)?)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let jobs = args.jobs()?;
    let stop = StopFlag::from_signals()?;
    let source: Arc<dyn ActivationSource> = match (&args.vectors, &args.store) {
        (Some(path), _) => Arc::new(VectorsFile::open(path)?),
        (None, Some(folder)) => Arc::new(StoreTaps::open(folder)?),
        (None, None) => Arc::new(args.live(&jobs, &stop)?),
    };
    let source = match &args.lens {
        Some(path) => behind(source, path, &jobs)?,
        None => source,
    };
    let jobs = spread(jobs, &*source)?;
    for Job { name, config, .. } in &jobs {
        let wiring = Wiring::of(config, &*source)?;
        let points = wiring.inputs.iter().filter_map(|&tap| source.taps()[tap].point);
        let points = match points.collect::<Vec<_>>()[..] {
            [] => String::new(),
            [one] => format!("{one}, "),
            [first, .., last] => format!("{} taps from {first} to {last}, ", wiring.inputs.len()),
        };
        tracing::info!(
            "{name}{}{points}{} latents over {} values, {} steps of {} vectors from {}, on {} threads",
            if name.is_empty() { "" } else { ": " },
            config.width,
            wiring.widths(&*source)[0],
            config.total_steps(),
            config.batch,
            source.n_vectors(),
            rayon::current_num_threads(),
        );
    }
    let device = cuda::open(args.device)?;
    if let Some(device) = &device {
        fits(&**device, &jobs, &*source)?;
    }
    let mut results = run_all_on(&source, &jobs, device.as_ref(), &stop)?;
    let mut stdout = std::io::stdout().lock();
    if jobs[0].name.is_empty()
        && let Some(result) = results.pop()
    {
        let summary = result?;
        if args.json {
            serde_json::to_writer(&mut stdout, &summary)?;
            writeln!(stdout)?;
        } else {
            write!(stdout, "{}", describe(&summary, &args.out))?;
        }
        return Ok(());
    }
    let mut failed = 0;
    for (job, result) in jobs.iter().zip(results) {
        match result {
            Ok(summary) if args.json => {
                writeln!(stdout, "{}", json!({ "name": job.name, "summary": summary }))?;
            }
            Ok(summary) => write!(stdout, "{}: {}", job.name, describe(&summary, &job.out))?,
            Err(error) => {
                failed += 1;
                tracing::error!("{}: {error:#}", job.name);
            }
        }
    }
    ensure!(
        failed == 0,
        "{failed} of {} autoencoders failed; run the same command again to resume",
        jobs.len()
    );
    Ok(())
}

/// `source` behind the lens at `path`.
fn behind(source: Arc<dyn ActivationSource>, path: &Path, jobs: &[Job]) -> Result<Arc<dyn ActivationSource>> {
    let several = |job: &Job| job.config.layers.is_some() && !job.config.each_layer;
    ensure!(jobs.iter().all(several), "a lens is for dictionaries of several layers: give --layers");
    Ok(Arc::new(Translated::new(source, &lens::read(path)?)?))
}

/// The taps that a harvest must read for a run.
fn harvested(config: &TrainConfig) -> Vec<String> {
    let layers = match &config.layers {
        None => Vec::new(),
        Some(Layers::All(_)) => config.sites.iter().map(Site::to_string).collect(),
        Some(Layers::Some(layers)) => {
            let of = |site: &Site| {
                layers.iter().map(|&layer| TapPoint::new(*site, layer).to_string()).collect::<Vec<_>>()
            };
            config.sites.iter().flat_map(of).collect()
        }
    };
    let taps = [config.tap, config.target].into_iter().flatten().map(|tap| tap.to_string());
    taps.chain(layers).collect()
}

/// `all`, or numbers with commas between them.
fn layers(text: &str) -> Result<toml::Value> {
    if text == "all" {
        return Ok(text.into());
    }
    let number = |part: &str| {
        let layer: u32 =
            part.trim().parse().with_context(|| format!("`{part}` is no layer: give all, or 0,7,14"))?;
        Ok(toml::Value::Integer(i64::from(layer)))
    };
    Ok(toml::Value::Array(text.split(',').map(number).collect::<Result<_>>()?))
}

fn describe(summary: &Summary, out: &Path) -> String {
    let mut text = format!(
        "trained {} tokens in {} steps at {:.0} tokens/s: L0 {:.1}, FVU {:.4}, dead {:.1} %\n",
        summary.tokens,
        summary.steps,
        summary.tokens_per_s,
        summary.l0,
        summary.fvu,
        100.0 * summary.dead,
    );
    if let (Some(l0), Some(fvu)) = (summary.held_out_l0, summary.held_out_fvu) {
        text += &format!("held out: L0 {l0:.1}, FVU {fvu:.4}\n");
    }
    if summary.skipped > 0 {
        text += &format!("{} batches were not learned from\n", summary.skipped);
    }
    text + &format!("written to {}\n", out.display())
}

/// Says what the runs take of the device, and refuses what cannot fit.
fn fits(device: &dyn cuda::Device, jobs: &[Job], source: &dyn ActivationSource) -> Result<()> {
    let room = Room::of(jobs, source);
    let (free, total) = device.memory()?;
    #[expect(clippy::cast_precision_loss, reason = "shown to one decimal")]
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let shards = match room.placement(free) {
        Placement::Device => "on the device",
        Placement::Host => "in the memory of the host, where the device reads them",
    };
    tracing::info!(
        "on {}: about {:.1} GB for training and {:.1} GB for batches, of {:.1} GB free of {:.1}; {:.1} GB of vectors wait {shards}",
        device.name(),
        gb(room.trainers),
        gb(room.batches),
        gb(free),
        gb(total),
        gb(room.shards)
    );
    ensure!(
        room.least() <= free,
        "training takes about {:.1} GB, and {:.1} GB of {} are free: train fewer autoencoders at once, a smaller width or batch, or \
         with beta1 = 0, which needs no first moments; --device cpu uses the memory of the machine",
        gb(room.least()),
        gb(free),
        device.name()
    );
    Ok(())
}
