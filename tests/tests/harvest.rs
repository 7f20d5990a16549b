//! A harvest with a real (tiny) transformer, in a process of its own that is killed at many moments: what is finished
//! afterwards is, byte for byte, what an undisturbed harvest writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Instant;

use native::harvest::{self, Inputs};
use native::model;
use native::stop::StopFlag;
use native::store::{MANIFEST, Split, Store};
use shared::config::harvest::HarvestConfig;
use shared::config::resolve;
use shared::lm::{LmError, Tap, TapAction, TapPoint, TokenBatch, Until};
use shared::{Rows, config};
use support::{files_of, prepare, this_program};

const CONFIG: &str = "STRATASCOPE_TEST_HARVEST_CONFIG";
const OUT: &str = "STRATASCOPE_TEST_HARVEST_OUT";

/// The killed process: one harvest, as the command does it. Does nothing when run among the other tests.
#[test]
fn harvest_in_this_process() {
    let (Ok(text), Ok(out)) = (std::env::var(CONFIG), std::env::var(OUT)) else { return };
    let settings: HarvestConfig = resolve(&text, &[]).unwrap();
    if harvest::finished(&settings, &out).unwrap().is_none() {
        let loaded = model::load(settings.model.as_ref()).unwrap();
        let inputs = Inputs::of(&loaded, &settings).unwrap();
        harvest::run(&settings, &out, &inputs, &StopFlag::default()).unwrap();
    }
}

fn start(settings: &HarvestConfig, out: &Path) -> Child {
    this_program("harvest_in_this_process")
        .env(CONFIG, config::to_toml(settings).unwrap())
        .env(OUT, out)
        .spawn()
        .unwrap()
}

#[test]
fn killed_at_any_moment_and_run_again_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let settings = prepare(folder.path());
    let whole = folder.path().join("whole");
    let started = Instant::now();
    assert!(start(&settings, &whole).wait().unwrap().success());
    let takes = started.elapsed();
    let expected = files_of(&whole);
    assert!(expected.contains_key(Path::new(MANIFEST)) && expected.len() > 20);

    let mut killed_unfinished = 0;
    for eighth in 1..8u32 {
        let out = folder.path().join(format!("killed-{eighth}"));
        // Killed again and again at the same age, it still gets on; after three kills it may end.
        for _ in 0..3 {
            let mut child = start(&settings, &out);
            std::thread::sleep(takes * eighth / 8);
            child.kill().unwrap();
            child.wait().unwrap();
            killed_unfinished += u32::from(!out.join(MANIFEST).exists());
        }
        assert!(start(&settings, &out).wait().unwrap().success());
        let found = files_of(&out);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{eighth}/8");
        assert!(found == expected, "killed after {eighth}/8 of {takes:?}");
    }
    assert!(killed_unfinished > 3, "no kill fell inside a harvest");
}

/// Keeps what it sees at one point.
struct Keep(TapPoint, Vec<f32>);

impl Tap for Keep {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.0
    }

    fn visit(&mut self, _point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.1 = value.data().to_vec();
        Ok(TapAction::Keep)
    }
}

#[test]
fn stored_vectors_are_those_of_the_full_forward_pass() {
    let folder = tempfile::tempdir().unwrap();
    let settings = prepare(folder.path());
    let out = folder.path().join("store");
    let loaded = model::load(settings.model.as_ref()).unwrap();
    harvest::run(&settings, &out, &Inputs::of(&loaded, &settings).unwrap(), &StopFlag::default()).unwrap();
    let store = Store::open(&out).unwrap();
    let manifest = store.manifest();
    assert_eq!((manifest.tokenizer.bos, manifest.tokenizer.separator), (Some(1), Some(2)));
    for split in [Split::Train, Split::HeldOut] {
        let tokens = store.tokens(split).unwrap();
        for tap in &manifest.taps {
            let shard = store.read_shard(tap.point, split, 0).unwrap();
            let sequence = shard.sequences[0];
            let mut kept = Keep(tap.point, Vec::new());
            let batch = TokenBatch::new(tokens.sequence(sequence as usize), 32).unwrap();
            loaded.model.forward(batch, &mut kept, Until::Logits).unwrap();
            let mut compared = 0;
            for (i, _) in shard.sequences.iter().enumerate().filter(|(_, s)| **s == sequence) {
                let at = shard.positions[i] as usize * tap.width;
                let (stored, full) =
                    (&shard.vectors[i * tap.width..(i + 1) * tap.width], &kept.1[at..at + tap.width]);
                let difference: f32 = stored.iter().zip(full).map(|(a, b)| (a - b) * (a - b)).sum();
                let norm: f32 = full.iter().map(|b| b * b).sum();
                assert!(difference <= 1e-10 * norm && norm > 0.0, "{} {difference} {norm}", tap.point);
                compared += 1;
            }
            assert!(compared > 2);
        }
    }
}

#[test]
fn the_committed_settings_are_understood() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
    let stages: BTreeMap<String, toml::Table> = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let settings: HarvestConfig = resolve(&stages["harvest"].to_string(), &[]).unwrap();
    assert!(settings.tokens.0 > 0 && settings.sequence_length > 1);
}
