//! `stratascope train` killed at any point and run again ends with the weights of an uninterrupted run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use native::stop::StopFlag;
use native::train::{ActivationSource, VectorsFile, run};
use shared::config::resolve;
use support::{kill_after_lines, this_program, write_vectors};

const CONFIG: &str = "STRATASCOPE_TEST_TRAIN_CONFIG";
const VECTORS: &str = "STRATASCOPE_TEST_TRAIN_VECTORS";
const OUT: &str = "STRATASCOPE_TEST_TRAIN_OUT";

/// The killed process: one run, as the command does it. Does nothing when run among the other tests.
#[test]
fn train_in_this_process() {
    let (Ok(text), Ok(vectors), Ok(out)) =
        (std::env::var(CONFIG), std::env::var(VECTORS), std::env::var(OUT))
    else {
        return;
    };
    let source: Arc<dyn ActivationSource> = Arc::new(VectorsFile::open(Path::new(&vectors)).unwrap());
    run(&source, &resolve(&text, &[]).unwrap(), Path::new(&out), &StopFlag::default()).unwrap();
}

const KEYS: &str = "width = 64\ntarget_l0 = 4.0\nsteps = 1200\nbatch = 128\nseed = 3\ncheckpoint_every = 37\nlog_every = 50\n";

fn train(vectors: &Path, out: &Path, more: &str) -> Command {
    let mut command = this_program("train_in_this_process");
    command.env(CONFIG, KEYS.to_owned() + more).env(VECTORS, vectors).env(OUT, out);
    command.stdout(Stdio::piped());
    command
}

fn summary(out: &Path) -> serde_json::Value {
    let file: serde_json::Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
    file["metrics"].clone()
}

#[test]
fn killed_anywhere_ends_with_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("x.safetensors");
    write_vectors(&vectors);
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));

    let output = train(&vectors, &whole, "").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let summary_of_whole = summary(&whole);
    let l0 = summary_of_whole["l0"].as_f64().unwrap();
    assert!((l0 / 4.0 - 1.0).abs() < 0.1, "asked for an L0 of 4, got {summary_of_whole}");
    assert!(summary_of_whole["held_out_fvu"].as_f64().unwrap() < 0.5, "{summary_of_whole}");

    let log = killed.join("log.jsonl");
    let kills = [1, 3, 8, 14, 20].map(|lines| {
        let child = train(&vectors, &killed, "").stdout(Stdio::null()).spawn().unwrap();
        kill_after_lines(child, &log, lines)
    });
    assert!(kills.iter().filter(|killed| **killed).count() >= 2, "over before it could be killed: {kills:?}");
    let output = train(&vectors, &killed, "").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    for file in ["sae_weights.safetensors", "cfg.json"] {
        let (want, got) = (fs::read(whole.join(file)).unwrap(), fs::read(killed.join(file)).unwrap());
        assert!(want == got, "{file} differs after kills {kills:?}");
    }
    let steps = |out: &Path| -> Vec<u64> {
        let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
        text.lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(steps(&whole), steps(&killed));
    assert_eq!(steps(&whole), (1..=24).map(|k| k * 50).collect::<Vec<_>>());

    // Finished: said so at once. Another configuration in the same folder: refused, nothing touched.
    let again = train(&vectors, &whole, "").output().unwrap();
    assert!(again.status.success());
    assert_eq!(summary(&whole), summary_of_whole);
    let other = train(&vectors, &whole, "lr = 1e-5").output().unwrap();
    assert!(!other.status.success());
    assert!(String::from_utf8_lossy(&other.stdout).contains("another"));
}
