//! Training straight from a language model: the same weights as from a store of the same vectors, and the same weights
//! when it is killed at any moment and run again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use native::harvest::{self, Inputs, Live};
use native::model;
use native::stop::{StopFlag, Stopped};
use native::train::{ActivationSource, LiveTaps, StoreTaps, run};
use shared::config::harvest::{HarvestConfig, StoreDtype};
use shared::config::train::TrainConfig;
use shared::config::{self, Count, resolve};
use support::{kill_after_lines, prepare, this_program, weights};

const HARVEST: &str = "STRATASCOPE_TEST_LIVE_HARVEST";
const STEPS: &str = "STRATASCOPE_TEST_LIVE_STEPS";
const OUT: &str = "STRATASCOPE_TEST_LIVE_OUT";

fn live(settings: &HarvestConfig) -> Arc<dyn ActivationSource> {
    let loaded = model::load(settings.model.as_ref()).unwrap();
    Arc::new(LiveTaps::new(Live::new(settings, loaded, &StopFlag::default()).unwrap()).unwrap())
}

fn training(steps: u64) -> TrainConfig {
    let keys = format!(
        "tap = 'resid.1'\nwidth = 64\ntarget_l0 = 4.0\nsteps = {steps}\nbatch = 128\ncheckpoint_every = 7\nlog_every = 10\n"
    );
    resolve(&keys, &[]).unwrap()
}

/// The killed process: one run, as the command does it. Does nothing when run among the other tests.
#[test]
fn train_in_this_process() {
    let (Ok(settings), Ok(steps), Ok(out)) =
        (std::env::var(HARVEST), std::env::var(STEPS), std::env::var(OUT))
    else {
        return;
    };
    let source = live(&resolve(&settings, &[]).unwrap());
    run(&source, &training(steps.parse().unwrap()), Path::new(&out), &StopFlag::default()).unwrap();
}

fn start(settings: &HarvestConfig, steps: u64, out: &Path) -> Child {
    this_program("train_in_this_process")
        .env(HARVEST, config::to_toml(settings).unwrap())
        .env(STEPS, steps.to_string())
        .env(OUT, out)
        .spawn()
        .unwrap()
}

#[test]
fn a_store_and_the_model_itself_teach_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, bucket) in [(StoreDtype::F32, 100_000), (StoreDtype::Bf16, 1500)] {
        let mut settings = prepare(folder.path());
        (settings.dtype, settings.bucket_vectors) = (dtype, Some(Count(bucket)));
        // Where a bucket is a shard, even the order is the same.
        settings.shard_vectors = settings.bucket_vectors;
        let out = |name: &str| folder.path().join(format!("{name}-{bucket}"));
        let loaded = model::load(settings.model.as_ref()).unwrap();
        let inputs = Inputs::of(&loaded, &settings).unwrap();
        harvest::run(&settings, &out("store"), &inputs, &StopFlag::default()).unwrap();
        let store: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(&out("store")).unwrap());
        // About two passes over the data.
        let config = training(120);
        let from_store = run(&store, &config, &out("from-store"), &StopFlag::default()).unwrap();
        let source = live(&settings);
        assert_eq!((source.n_shards(), source.n_vectors()), (store.n_shards(), store.n_vectors()));
        let from_model = run(&source, &config, &out("from-model"), &StopFlag::default()).unwrap();
        assert!(weights(&out("from-store")) == weights(&out("from-model")), "buckets of {bucket}");
        assert_eq!((from_store.l0, from_store.fvu), (from_model.l0, from_model.fvu));
        assert!(from_model.held_out_fvu.is_some());
    }
}

#[test]
fn killed_at_any_moment_and_run_again_gives_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let settings = prepare(folder.path());
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    assert!(start(&settings, 250, &whole).wait().unwrap().success());
    let log = killed.join("log.jsonl");
    let kills = [2, 7, 11, 16].map(|lines| kill_after_lines(start(&settings, 250, &killed), &log, lines));
    assert!(kills.iter().filter(|killed| **killed).count() >= 2, "over before it could be killed: {kills:?}");
    assert!(start(&settings, 250, &killed).wait().unwrap().success());
    assert!(weights(&whole) == weights(&killed), "the weights differ after kills {kills:?}");
}

#[test]
fn a_stop_while_the_model_runs_leaves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    // Two buckets: what initialisation looks at lies in the first.
    let settings = HarvestConfig { bucket_vectors: Some(Count(5000)), ..prepare(folder.path()) };
    let (config, stop) = (training(60), StopFlag::default());
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let taps = LiveTaps::new(Live::new(&settings, loaded, &stop).unwrap()).unwrap();
    let source: Arc<dyn ActivationSource> = Arc::new(taps);
    source.read(0, &[0]).unwrap();
    stop.raise();
    let (stopped, whole) = (folder.path().join("stopped"), folder.path().join("whole"));
    // Training itself does not look at this flag: the data stops first.
    let error = run(&source, &config, &stopped, &StopFlag::default()).unwrap_err();
    assert!(error.is::<Stopped>(), "{error:#}");
    assert!(stopped.join("checkpoint/state.safetensors").is_file());
    for out in [&stopped, &whole] {
        run(&live(&settings), &config, out, &StopFlag::default()).unwrap();
    }
    assert!(weights(&stopped) == weights(&whole));
}

#[test]
fn what_cannot_be_streamed_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let settings = prepare(folder.path());
    let make = |settings: &HarvestConfig| {
        let loaded = model::load(settings.model.as_ref()).unwrap();
        format!("{:#}", Live::new(settings, loaded, &StopFlag::default()).unwrap_err())
    };
    let long = HarvestConfig { sequence_length: 1 << 19, ..settings.clone() };
    assert!(make(&long).contains("sequence_length"));
    let none = HarvestConfig { drop_positions: (0..32).collect(), ..settings };
    assert!(make(&none).contains("drop_positions"));
}
