//! Whole runs on a device: they end where those of the processor do, and go on after a stop as if there had been none.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use native::cuda::{Address, Argument, Device, Kernel, Product, Shape};
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
[[sae]]
name = 'jumprelu'
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

/// Raises the flag after so many updates.
#[derive(Debug)]
struct Stopping {
    device: SharedDevice,
    left: AtomicUsize,
    stop: StopFlag,
}

impl Device for Stopping {
    fn name(&self) -> String {
        self.device.name()
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.device.allocate(bytes)
    }

    fn release(&self, at: Address) {
        self.device.release(at);
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.device.upload(to, bytes)
    }

    fn download(&self, from: Address, into: &mut [u8]) -> Result<()> {
        self.device.download(from, into)
    }

    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        self.device.fill(at, byte, bytes)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device.copy(to, from, bytes)
    }

    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()> {
        if kernel == Kernel::Update && self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            self.stop.raise();
        }
        self.device.launch(kernel, shape, blocks, arguments)
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.device.product(product)
    }

    fn wait(&self) -> Result<()> {
        self.device.wait()
    }
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
    let left = AtomicUsize::new(25);
    let stopping: SharedDevice = Arc::new(Stopping { device: emulator.clone(), left, stop: stop.clone() });
    let error = run_all_on(&source, &stopped, Some(&stopping), &stop).unwrap_err();
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
    let left = AtomicUsize::new(10);
    let stopping: SharedDevice = Arc::new(Stopping { device: emulator.clone(), left, stop: stop.clone() });
    assert!(run_all_on(&source, &moved, Some(&stopping), &stop).is_err());
    for result in run_all_on(&source, &moved, None, &go).unwrap() {
        result.unwrap();
    }
    let x = Rows::new(&[0.5; D], D).unwrap();
    for job in &moved {
        let sae = native::sae_files::read(&job.out).unwrap().sae;
        assert!(shared::reference::encode(&sae, x).is_ok());
    }
}
