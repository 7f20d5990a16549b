//! One pass over several taps trains autoencoders of each and transcoders between them, each as if alone; and a run whose
//! parameters go bad goes back to earlier ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use anyhow::Result;
use native::harvest::{self, Inputs, Live};
use native::model;
use native::sae_files::{SaeFormat, read, read_whole, write};
use native::stop::StopFlag;
use native::train::{
    ActivationSource, Job, LiveTaps, SourceTap, Statistics, StoreTaps, Vectors, run, run_all, spread,
};
use serde_json::{Value, json};
use shared::config::train::TrainConfig;
use shared::config::{expand, resolve};
use shared::format::SaeMetadata;
use shared::metrics::Fvu;
use shared::{Rows, reference};
use support::{kill_after_lines, prepare, this_program, weights};

const STORE: &str = "STRATASCOPE_TEST_TAPS_STORE";
const OUT: &str = "STRATASCOPE_TEST_TAPS_OUT";

/// Two sites, a transcoder with and one without a skip connection, and one that takes its data in other batches.
const KEYS: &str = "\
width = 64
steps = 150
batch = 128
checkpoint_every = 40
log_every = 10
[[sae]]
name = 'resid'
tap = 'resid.1'
target_l0 = 4.0
[[sae]]
name = 'attn'
tap = 'attn.0'
target_l0 = 4.0
[[sae]]
name = 'across'
tap = 'attn.0'
target = 'resid.1'
target_l0 = 4.0
[[sae]]
name = 'affine'
tap = 'attn.0'
target = 'resid.1'
skip = true
activation = 'batchtopk'
k = 4
[[sae]]
name = 'small-batches'
tap = 'resid.1'
target_l0 = 4.0
batch = 64
[[sae]]
name = 'layers'
layers = 'all'
target_l0 = 4.0
[[sae]]
name = 'standardised'
layers = [0, 1]
normalise = 'standardise'
activation = 'topk'
k = 4
[[sae]]
name = 'own-thresholds'
layers = 'all'
thresholds = 'per_layer'
target_l0 = 4.0
[[sae]]
name = 'published'
layers = [1, 0]
normalise = 'standardise'
loss = 'fvu'
activation = 'topk'
k = 4
aux_k = 8
aux_form = 'mlsae'
dead_window = 2000
encoder_bias = false
decoder_bias_init = 'geometric_median'
[[sae]]
name = 'controls'
layers = 'all'
each_layer = true
target_l0 = 4.0
";

fn jobs(source: &dyn ActivationSource, out: &Path) -> Vec<Job> {
    let job = |(name, text): (Option<String>, String)| {
        let name = name.unwrap();
        Job { out: out.join(&name), name, config: resolve(&text, &[]).unwrap() }
    };
    let jobs = spread(expand(KEYS, "sae").unwrap().into_iter().map(job).collect(), source).unwrap();
    let names: Vec<&str> = jobs.iter().map(|job| &*job.name).collect();
    assert_eq!(names[names.len() - 2..], ["controls/resid.0", "controls/resid.1"]);
    assert_eq!(jobs[jobs.len() - 1].out, out.join("controls").join("resid.1"));
    jobs
}

/// The killed process. Does nothing when run among the other tests.
#[test]
fn train_in_this_process() {
    let (Ok(store), Ok(out)) = (std::env::var(STORE), std::env::var(OUT)) else { return };
    let source: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(store.as_ref()).unwrap());
    let results = run_all(&source, &jobs(&*source, out.as_ref()), &StopFlag::default()).unwrap();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

fn start(store: &Path, out: &Path) -> Child {
    this_program("train_in_this_process").env(STORE, store).env(OUT, out).spawn().unwrap()
}

#[test]
fn each_ends_as_if_alone_even_when_killed() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = prepare(folder.path());
    settings.taps = ["resid.0", "resid.1", "attn.0"].map(str::to_owned).to_vec();
    // Where a bucket is a shard, the model itself gives the same order.
    settings.shard_vectors = settings.bucket_vectors;
    let (store, whole, killed) =
        (folder.path().join("store"), folder.path().join("whole"), folder.path().join("killed"));
    let loaded = model::load(settings.model.as_ref()).unwrap();
    harvest::run(&settings, &store, &Inputs::of(&loaded, &settings).unwrap(), &StopFlag::default()).unwrap();
    assert!(start(&store, &whole).wait().unwrap().success());

    let source: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(&store).unwrap());
    let live = LiveTaps::new(Live::new(&settings, loaded, &StopFlag::default()).unwrap()).unwrap();
    let live: Arc<dyn ActivationSource> = Arc::new(live);
    let streamed = jobs(&*live, &folder.path().join("streamed"));
    for result in run_all(&live, &streamed, &StopFlag::default()).unwrap() {
        result.unwrap();
    }
    for (job, streamed) in jobs(&*source, &folder.path().join("alone")).iter().zip(&streamed) {
        let summary = run(&source, &job.config, &job.out, &StopFlag::default()).unwrap();
        assert!(summary.held_out_fvu.unwrap() < 1.0, "{}: {summary:?}", job.name);
        assert!(weights(&job.out) == weights(&whole.join(&job.name)), "{} alone", job.name);
        assert!(weights(&job.out) == weights(&streamed.out), "{} from the model", job.name);
    }
    let log = killed.join("across").join("log.jsonl");
    let kills = [1, 6, 11].map(|lines| kill_after_lines(start(&store, &killed), &log, lines));
    assert!(kills.iter().any(|killed| *killed), "over before it could be killed");
    assert!(start(&store, &killed).wait().unwrap().success());
    for job in jobs(&*source, &killed) {
        assert!(weights(&job.out) == weights(&whole.join(&job.name)), "{} killed", job.name);
    }
    let cfg = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(whole.join(name).join("cfg.json")).unwrap()).unwrap()
    };
    assert_eq!(cfg("across")["metadata"]["hook_name_out"], json!("blocks.1.hook_resid_post"));
    assert_eq!(cfg("across")["metadata"]["hook_name"], json!("blocks.0.attn.hook_z"));
    assert_eq!(cfg("resid")["metadata"]["hook_name_out"], Value::Null);
    layers_speak_about_raw_vectors(&whole, &*source);
    let unknown =
        TrainConfig { tap: Some("mlp.3".parse().unwrap()), ..jobs(&*source, &killed)[0].config.clone() };
    let error = run(&source, &unknown, &folder.path().join("no"), &StopFlag::default()).unwrap_err();
    assert!(error.to_string().contains("no tap mlp.3; they hold resid.0, resid.1, attn.0"), "{error}");
}

/// Each layer of a multi-layer SAE is an autoencoder of that layer's raw activations.
fn layers_speak_about_raw_vectors(whole: &Path, source: &dyn ActivationSource) {
    for name in ["layers", "standardised", "own-thresholds"] {
        let folder = whole.join(name);
        let summary: Value = serde_json::from_slice(&fs::read(folder.join("run.json")).unwrap()).unwrap();
        let multi = read_whole(&folder).unwrap().metadata.layers.unwrap();
        assert_eq!(
            multi.layers.iter().map(|l| l.tap.to_string()).collect::<Vec<_>>(),
            ["resid.0", "resid.1"]
        );
        let (mut l0s, mut fvus) = (Vec::new(), Vec::new());
        for (tap, layer) in multi.layers.iter().enumerate() {
            let file = read(Path::new(&format!("{}#{}", folder.display(), layer.tap))).unwrap();
            assert_eq!((file.metadata.tap, &file.metadata.layers), (Some(layer.tap), &None));
            let width = source.taps()[tap].width;
            let x = source.held_out(&[tap], 10_000).unwrap().remove(0);
            let x = Rows::new(&x, width).unwrap();
            let codes = reference::encode(&file.sae, x).unwrap();
            let rebuilt = reference::decode(&file.sae, x, &codes).unwrap();
            l0s.push(codes.n_active() as f64 / codes.n_rows() as f64);
            let mut fvu = Fvu::new(width);
            fvu.update(x, Rows::new(&rebuilt, width).unwrap()).unwrap();
            fvus.push(fvu.value().unwrap());
        }
        let close = |key: &str, values: &[f64]| {
            let (found, wanted) = (summary["metrics"][key].as_f64().unwrap(), (values[0] + values[1]) / 2.0);
            assert!((found / wanted - 1.0).abs() < 1e-3, "{name}: {key} is {found}, by hand {wanted}");
        };
        close("held_out_l0", &l0s);
        close("held_out_fvu", &fvus);
        assert!(fvus.iter().all(|fvu| *fvu < 1.0), "{name}: {fvus:?}");
    }
    let error = format!("{:#}", read(&whole.join("layers")).unwrap_err());
    assert!(error.contains("2 layers") && error.contains("layers#resid.0"), "{error}");
    assert!(read(&whole.join("standardised")).is_ok(), "one autoencoder for all layers");
    let (whole_file, again) = (read_whole(&whole.join("standardised")).unwrap(), whole.join("again"));
    write(&again, SaeFormat::SaeLens, &whole_file).unwrap();
    assert_eq!(
        read_whole(&again).unwrap().metadata.layers,
        whole_file.metadata.layers,
        "converting keeps layers"
    );
    thresholds_are_the_layers_own(&whole.join("own-thresholds"));
    what_was_trained_as_published_is_an_mlsae(&whole.join("published"), source);
    let missing = format!("{}#resid.7", whole.join("layers").display());
    assert!(format!("{:#}", read(Path::new(&missing)).unwrap_err()).contains("resid.0, resid.1"));
    assert!(read(Path::new(&format!("{}#resid.1", whole.join("resid").display()))).is_err());
}

/// Every layer fires as often as was asked for, through thresholds that differ, and damaged ones are refused.
fn thresholds_are_the_layers_own(folder: &Path) {
    let whole = read_whole(folder).unwrap();
    let layers = whole.metadata.layers.unwrap();
    let n = whole.sae.dims().n_latents;
    assert_eq!(layers.thresholds.len(), 2 * n);
    let of = |tap: &str| read(Path::new(&format!("{}#{tap}", folder.display()))).unwrap().sae;
    for (number, layer) in layers.layers.iter().enumerate() {
        let sae = of(&layer.tap.to_string());
        let wanted = |i: usize| (f64::from(layers.thresholds[number * n + i]) * layer.scale) as f32;
        assert!((0..n).all(|i| sae.activation().threshold(i) == Some(wanted(i))), "{}", layer.tap);
        // The weights themselves have the mean.
        let mean = |i: usize| (layers.thresholds[i] + layers.thresholds[n + i]) / 2.0;
        assert!((0..n).all(|i| (whole.sae.activation().threshold(i).unwrap() - mean(i)).abs() < 1e-6));
    }
    assert!((0..n).any(|i| (layers.thresholds[i] / layers.thresholds[n + i] - 1.0).abs() > 0.05));
    let file = folder.join("multi_layer.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    assert!(read_whole(folder).is_err());
    fs::remove_file(&file).unwrap();
    assert!(format!("{:#}", read_whole(folder).unwrap_err()).contains("multi_layer.safetensors"));
    fs::write(&file, bytes).unwrap();
}

/// What is trained as published can be written as that program's files, and reads back the same.
fn what_was_trained_as_published_is_an_mlsae(folder: &Path, source: &dyn ActivationSource) {
    let (file, as_mlsae) = (read_whole(folder).unwrap(), folder.join("as-mlsae"));
    write(&as_mlsae, SaeFormat::Mlsae, &file).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(as_mlsae.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["layers"], &config["k"], &config["standardize"]),
        (&json!([0, 1]), &json!(4), &json!(true))
    );
    let again = read_whole(&as_mlsae).unwrap();
    assert_eq!(again.metadata.layers.unwrap().layers.len(), 2);
    let x = source.held_out(&[0], 200).unwrap().remove(0);
    let x = Rows::new(&x, source.taps()[0].width).unwrap();
    let rebuilt = |sae: &shared::Sae| {
        let codes = reference::encode(sae, x).unwrap();
        reference::decode(sae, x, &codes).unwrap()
    };
    let (ours, theirs) = (rebuilt(&file.sae), rebuilt(&again.sae));
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs())));
    // With an encoder bias it is none.
    let other = write(
        &folder.join("no"),
        SaeFormat::Mlsae,
        &read_whole(&folder.with_file_name("standardised")).unwrap(),
    );
    assert!(format!("{:#}", other.unwrap_err()).contains("encoder bias"));
}

/// Shards of 20 batches of 64 vectors; those from `bad` on, in the order of a first pass, are not finite.
struct Broken {
    bad: std::ops::Range<usize>,
    provenance: Value,
}

const WIDTH: usize = 8;
const ROWS: usize = 20 * 64;

impl ActivationSource for Broken {
    fn taps(&self) -> &[SourceTap] {
        &[SourceTap { point: None, width: WIDTH }]
    }
    fn n_vectors(&self) -> u64 {
        4 * ROWS as u64
    }
    fn n_shards(&self) -> usize {
        4
    }
    fn read(&self, shard: usize, _: &[usize]) -> Result<Vec<Vectors>> {
        let mut state = shard as u64 + 1;
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let vectors: Vec<f32> = (0..ROWS * WIDTH).map(|_| value()).collect();
        let broken = self.bad.contains(&shard);
        Ok(vec![Arc::new(vectors.into_iter().map(|v| if broken { f32::NAN } else { v }).collect())])
    }
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        Statistics::of(&self.read(0, &[tap])?[0], WIDTH, |_| true)
    }
    fn held_out(&self, _: &[usize], _: usize) -> Result<Vec<Vec<f32>>> {
        Ok(vec![Vec::new()])
    }
    fn provenance(&self) -> &Value {
        &self.provenance
    }
    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

#[test]
fn a_run_that_goes_bad_goes_back_and_on() {
    let folder = tempfile::tempdir().unwrap();
    let keys = "width = 16\ntarget_l0 = 3.0\nsteps = 70\nbatch = 64\ncheckpoint_every = 5\nlog_every = 1\n";
    let config: TrainConfig = resolve(keys, &[]).unwrap();
    let train = |bad, out: &str| {
        let source: Arc<dyn ActivationSource> = Arc::new(Broken { bad, provenance: json!({}) });
        let out = folder.path().join(out);
        (run(&source, &config, &out, &StopFlag::default()), out)
    };
    let (summary, out) = train(2..3, "one");
    let summary = summary.unwrap();
    assert_eq!((summary.steps, summary.rolled_back, summary.skipped), (70, 1, 20), "{summary:?}");
    let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<u64> = lines.map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");

    // Nothing but bad data after the first shard: tried three times more, then given up; what was good is still there.
    let (failed, out) = train(1..4, "all");
    let error = failed.unwrap_err().to_string();
    assert!(error.contains("3 times") && error.contains("lower lr"), "{error}");
    assert!(out.join("checkpoint/state.safetensors").is_file() && !out.join("run.json").exists());
    let (nothing, _) = train(0..4, "nothing");
    assert!(nothing.is_err());
}
