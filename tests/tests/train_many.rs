//! Many autoencoders from one stream: each ends as if it had been trained alone, whatever happens to the others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use native::stop::StopFlag;
use native::train::{ActivationSource, Job, VectorsFile, run, run_all};
use shared::config::{expand, resolve};
use support::{kill_after_lines, this_program, weights, write_vectors};

const VECTORS: &str = "STRATASCOPE_TEST_MANY_VECTORS";
const OUT: &str = "STRATASCOPE_TEST_MANY_OUT";

const KEYS: &str = "
width = 64
steps = 500
batch = 128
seed = 3
checkpoint_every = 29
log_every = 25
dead_window = 5000
[[sae]]
name = 'jumprelu'
target_l0 = 4.0
[[sae]]
name = 'gated'
activation = 'gated'
target_l0 = 4.0
p_end = 0.5
[[sae]]
name = 'topk'
activation = 'topk'
k = 4
aux_k = 16
steps = 300
[[sae]]
name = 'batchtopk'
activation = 'batchtopk'
k = 4
width = 96
prefixes = [0.25, 1.0]
[[sae]]
name = 'resampled'
target_l0 = 4.0
beta1 = 0.0
dead_window = 900
resample_every = 40
";

fn jobs(out: &Path) -> Vec<Job> {
    let job = |(name, text): (Option<String>, String)| {
        let name = name.unwrap();
        Job { out: out.join(&name), name, config: resolve(&text, &[]).unwrap() }
    };
    expand(KEYS, "sae").unwrap().into_iter().map(job).collect()
}

fn source(vectors: &Path) -> Arc<dyn ActivationSource> {
    Arc::new(VectorsFile::open(vectors).unwrap())
}

/// The killed process. Does nothing when run among the other tests.
#[test]
fn train_in_this_process() {
    let (Ok(vectors), Ok(out)) = (std::env::var(VECTORS), std::env::var(OUT)) else { return };
    let results = run_all(&source(vectors.as_ref()), &jobs(out.as_ref()), &StopFlag::default()).unwrap();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

fn start(vectors: &Path, out: &Path) -> Child {
    this_program("train_in_this_process").env(VECTORS, vectors).env(OUT, out).spawn().unwrap()
}

#[test]
fn each_ends_as_if_alone_even_when_killed() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("x.safetensors");
    write_vectors(&vectors);
    let (whole, killed, alone) =
        (folder.path().join("whole"), folder.path().join("killed"), folder.path().join("alone"));
    assert!(start(&vectors, &whole).wait().unwrap().success());
    for job in jobs(&alone) {
        let summary = run(&source(&vectors), &job.config, &job.out, &StopFlag::default()).unwrap();
        assert!((summary.l0 / 4.0 - 1.0).abs() < 0.15, "{}: {summary:?}", job.name);
        assert!(weights(&job.out) == weights(&whole.join(&job.name)), "{}", job.name);
    }
    let log = killed.join("gated").join("log.jsonl");
    let kills = [2, 5, 9, 12, 17].map(|lines| kill_after_lines(start(&vectors, &killed), &log, lines));
    assert!(kills.iter().filter(|killed| **killed).count() >= 2, "over before it could be killed: {kills:?}");
    // As if the disk had lost one: it begins again, and the others wait for it.
    let lost = killed.join("gated");
    if lost.exists() && !lost.join("run.json").exists() {
        fs::remove_dir_all(lost).unwrap();
    }
    assert!(start(&vectors, &killed).wait().unwrap().success());
    for job in jobs(&killed) {
        assert!(weights(&job.out) == weights(&whole.join(&job.name)), "{} after kills {kills:?}", job.name);
    }
}

#[test]
fn one_that_fails_stops_alone_and_jobs_that_disagree_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("x.safetensors");
    write_vectors(&vectors);
    let mut jobs = jobs(&folder.path().join("out"));
    jobs.iter_mut().for_each(|job| job.config.steps = Some(shared::config::Count(60)));
    // Another finished run lies in the folder of the second.
    fs::create_dir_all(&jobs[1].out).unwrap();
    fs::write(jobs[1].out.join("run.json"), "{}").unwrap();
    let results = run_all(&source(&vectors), &jobs, &StopFlag::default()).unwrap();
    let failed: Vec<bool> = results.iter().map(Result::is_err).collect();
    assert_eq!(failed, [false, true, false, false, false]);
    assert!(format!("{:#}", results[1].as_ref().unwrap_err()).contains("run.json"));

    jobs[2].config.seed = 64;
    let error = run_all(&source(&vectors), &jobs, &StopFlag::default()).unwrap_err().to_string();
    assert!(error.contains("topk") && error.contains("seed"), "{error}");
    assert!(run_all(&source(&vectors), &[], &StopFlag::default()).is_err());
}
