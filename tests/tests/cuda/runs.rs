//! Whole runs on a device: they end where those of the processor do, and go on after a stop as if there had been none.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use native::cuda::{Intercept, Kernel, Rates, Step, route};
use native::stop::{StopFlag, Stopped};
use native::train::{ActivationSource, Job, SharedDevice, VectorsFile, run_all_on};
use shared::Rows;
use shared::config::{expand, resolve};
use shared::format::tensors::serialize;

use crate::emulator::Emulator;
use native::selftest::cases::Noise;

const D: usize = 10;
const KEYS: &str = "\
width = 48
steps = 24
batch = 32
log_every = 4
checkpoint_every = 6
lr = 0.003
dead_window = 200
route = 'sparse'
[[sae]]
name = 'jumprelu'
route = 'dense'
target_l0 = 3.0
resample_every = 8
[[sae]]
name = 'annealed'
activation = 'relu'
target_l0 = 3.0
p_end = 0.5
p_updates = 3
beta1 = 0.0
[[sae]]
name = 'batchtopk'
activation = 'batchtopk'
k = 3
aux_k = 4
";

fn source(folder: &Path) -> Arc<dyn ActivationSource> {
    let (n, mut noise) = (600, Noise(5));
    // A few directions with sparse weights, so that there is something to learn.
    let directions = noise.vector(6 * D, 1.0);
    let x: Vec<f32> = (0..n)
        .flat_map(|_| {
            let weights: Vec<f32> = noise.vector(6, 2.0).into_iter().map(|w| (w - 1.0).max(0.0)).collect();
            let noise = noise.vector(D, 0.05);
            let value = |c: usize| (0..6).map(|i| weights[i] * directions[i * D + c]).sum::<f32>() + noise[c];
            (0..D).map(value).collect::<Vec<_>>()
        })
        .collect();
    let path = folder.join("vectors.safetensors");
    std::fs::write(&path, serialize("vectors", &[("x", &[n, D], &x)]).unwrap()).unwrap();
    Arc::new(VectorsFile::open(&path).unwrap())
}

fn jobs(out: &Path) -> Vec<Job> {
    let job = |(name, text): (Option<String>, String)| {
        let name = name.unwrap();
        Job { out: out.join(&name), name, config: resolve(&text, &[]).unwrap() }
    };
    expand(KEYS, "sae").unwrap().into_iter().map(job).collect()
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("sae_weights.safetensors")).unwrap()
}

/// `device`, on which `stop` is raised after so many updates.
fn stopping(device: &SharedDevice, updates: usize, stop: &StopFlag) -> SharedDevice {
    let (left, stop) = (AtomicUsize::new(updates), stop.clone());
    let count = move |kernel: Kernel, _: &mut Step| {
        if kernel == Kernel::Update && left.fetch_sub(1, Ordering::Relaxed) == 0 {
            stop.raise();
        }
    };
    Arc::new(Intercept::new(device.clone(), "stopped", count))
}

#[test]
fn a_run_ends_where_the_processors_does_and_goes_on_after_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let emulator: SharedDevice = Arc::new(Emulator::new(folder.path()));
    let [host, device, stopped] = ["host", "device", "stopped"].map(|name| jobs(&folder.path().join(name)));
    let go = StopFlag::default();
    let hosts = run_all_on(&source, &host, None, &go).unwrap();
    let devices = run_all_on(&source, &device, Some(&emulator), &go).unwrap();
    for ((job, host), device) in host.iter().zip(hosts).zip(devices) {
        let (host, device) = (host.unwrap(), device.unwrap());
        assert!((device.fvu - host.fvu).abs() < 0.01 * host.fvu, "{}: {device:?} {host:?}", job.name);
        assert!((device.l0 - host.l0).abs() < 0.02 * host.l0, "{}: {device:?} {host:?}", job.name);
    }

    let stop = StopFlag::default();
    let error = run_all_on(&source, &stopped, Some(&stopping(&emulator, 25, &stop)), &stop).unwrap_err();
    assert!(error.is::<Stopped>(), "{error:#}");
    assert!(!stopped[0].out.join("run.json").exists());
    for result in run_all_on(&source, &stopped, Some(&emulator), &go).unwrap() {
        result.unwrap();
    }
    for (whole, stopped) in device.iter().zip(&stopped) {
        assert!(weights(&whole.out) == weights(&stopped.out), "{}: other bits after a stop", whole.name);
    }
    // What a card began, the processor may end, and the other way round.
    let moved = jobs(&folder.path().join("moved"));
    let stop = StopFlag::default();
    assert!(run_all_on(&source, &moved, Some(&stopping(&emulator, 10, &stop)), &stop).is_err());
    for result in run_all_on(&source, &moved, None, &go).unwrap() {
        result.unwrap();
    }
    let x = Rows::new(&[0.5; D], D).unwrap();
    for job in &moved {
        let sae = native::sae_files::read(&job.out).unwrap().sae;
        assert!(shared::reference::encode(&sae, x).is_ok());
    }
}

/// A disk that refuses one run's checkpoints is that run's error, although they are written while it trains on.
#[test]
fn a_checkpoint_that_cannot_be_written_ends_its_run_alone() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let emulator: SharedDevice = Arc::new(Emulator::new(folder.path()));
    let jobs = jobs(&folder.path().join("runs"));
    // A file where the folder should be.
    std::fs::create_dir_all(&jobs[1].out).unwrap();
    std::fs::write(jobs[1].out.join("checkpoint"), "in the way").unwrap();
    let results = run_all_on(&source, &jobs, Some(&emulator), &StopFlag::default()).unwrap();
    let error = format!("{:#}", results[1].as_ref().unwrap_err());
    assert!(error.contains("cannot create folder") && error.contains("checkpoint"), "{error}");
    for at in [0, 2] {
        assert!(results[at].is_ok() && jobs[at].out.join("checkpoint/earlier.safetensors").exists(), "{at}");
    }
    assert!(!jobs[1].out.join("run.json").exists());
}

/// `auto` decides by what the device can do, remembers that, and says it; where it cannot choose it says so too.
#[test]
fn the_route_is_decided_by_rates_that_are_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let emulator: SharedDevice = Arc::new(Emulator::new(folder.path()));
    let rates = folder.path().join("rates");
    let from = |keys: &str| {
        let config = resolve(&format!("width = 512\nbatch = 16\n{keys}"), &[]).unwrap();
        route::dense_from(&config, [D, D], &emulator, Some(&rates)).unwrap()
    };
    let (first, why) = from("");
    let files = || std::fs::read_dir(&rates).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    assert!(first > 0.0 && first.is_finite() && why.contains("TFLOP/s"), "{first}: {why}");
    assert_eq!((from("").0, files().len()), (first, 1));
    // What is remembered decides.
    let known = |flops: f64| {
        let text = serde_json::to_vec(&Rates { bandwidth: 1e9, flops }).unwrap();
        std::fs::write(&files()[0], text).unwrap();
    };
    known(1e15);
    let (soon, why) = from("");
    assert!(soon < 512.0 && why.contains("dense route from"), "{soon}: {why}");
    known(1.0);
    let (never, why) = from("");
    assert!(never > 512.0 && why.contains("sparse route, however many"), "{never}: {why}");
    // Nonsense is measured anew.
    std::fs::write(&files()[0], b"nothing").unwrap();
    assert!(from("").0 != never);
    assert_eq!(from("route = 'dense'").0, 0.0);
    assert_eq!(from("route = 'sparse'").0, f64::INFINITY);
    for own in ["aux_k = 4", "activation = 'gated'", "prefixes = [0.5, 1.0]"] {
        for route in ["auto", "dense"] {
            let (from, why) = from(&format!("route = '{route}'\n{own}"));
            assert!(from == f64::INFINITY && why.contains("residuals of their own"), "{own}: {why}");
        }
    }
}
