//! What a training step asks of a device besides its kernels: every copy to the host is waited for, and every call of the driver costs.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use native::cuda::{Address, Argument, CudaTrainer, Device, HostMemory, Kernel, Product, Resident, Shape};
use native::selftest::cases::{D, N_ROWS, Noise, cases};
use native::train::Moments;
use shared::Rows;
use shared::config::train::Products;

use crate::emulator::Emulator;

/// Calls so far.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    allocations: AtomicUsize,
    uploads: AtomicUsize,
    downloads: AtomicUsize,
    waits: AtomicUsize,
}

impl Calls {
    fn so_far(&self) -> [usize; 4] {
        let Self { allocations, uploads, downloads, waits } = self;
        [allocations, uploads, downloads, waits].map(|count| count.load(Ordering::Relaxed))
    }
}

/// A device that counts, and may make a mistake about the arguments of kernels, or about copies.
#[derive(Debug)]
pub(crate) struct Counting {
    pub(crate) device: Emulator,
    pub(crate) calls: Calls,
    pub(crate) change: fn(Kernel, &mut [Argument<'_>]),
    pub(crate) waits_for_copies: bool,
}

impl Counting {
    /// One that makes none.
    pub(crate) fn new(device: Emulator) -> Self {
        Self { device, calls: Calls::default(), change: |_, _| (), waits_for_copies: true }
    }
}

fn one_more(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Device for Counting {
    fn name(&self) -> String {
        self.device.name()
    }
    fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        one_more(&self.calls.allocations);
        self.device.allocate(bytes)
    }
    fn release(&self, at: Address) {
        self.device.release(at);
    }
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        one_more(&self.calls.uploads);
        self.device.upload(to, bytes)
    }
    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        self.device.host_memory(bytes)
    }
    fn upload_beside(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device.upload_beside(to, from, bytes)
    }
    fn wait_beside(&self) -> Result<()> {
        if self.waits_for_copies { self.device.wait_beside() } else { Ok(()) }
    }
    fn download(&self, from: Address, into: &mut [u8]) -> Result<()> {
        one_more(&self.calls.downloads);
        self.device.download(from, into)
    }
    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        self.device.fill(at, byte, bytes)
    }
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device.copy(to, from, bytes)
    }
    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()> {
        let mut arguments = arguments.to_vec();
        (self.change)(kernel, &mut arguments);
        self.device.launch(kernel, shape, blocks, &arguments)
    }
    fn product(&self, product: &Product) -> Result<()> {
        self.device.product(product)
    }
    fn wait(&self) -> Result<()> {
        one_more(&self.calls.waits);
        self.device.wait()
    }
}

/// Of a step once everything has its size: no memory is taken, what stays the same is not said again, and little is read back.
#[test]
fn steps_ask_little_besides_their_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let cases = cases();
    // Uploads: λ of the thresholds where it moves; of rows, their layers. Downloads: see `forward`.
    for (name, uploads, downloads) in [
        ("raw jumprelu", 0, 3),
        ("jumprelu", 1, 3),
        ("relu", 0, 3),
        ("topk", 0, 3),
        ("jumprelu, thresholds of layers", 2, 4),
        ("topk, multi and auxk", 0, 4),
        ("jumprelu, dead-latent loss", 1, 4),
    ] {
        let device = Arc::new(Counting::new(Emulator::new(folder.path())));
        let shared: Arc<dyn Device + Send + Sync> = device.clone();
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let (start, objective) = (case.start(), case.objective(N_ROWS));
        let moments = Moments::new(&start, case.momentum > 0.0);
        let mut trainer = CudaTrainer::new(shared.clone(), &start, &moments, 0, Products::F32).unwrap();
        for step in 0..4 {
            // The same batch: no list grows.
            let x = Noise(9).vector(N_ROWS * D, 0.35);
            let x = Rows::new(&x, D).unwrap();
            let batch = Resident::of(&shared, x, x).unwrap();
            let before = device.calls.so_far();
            let forward = trainer.forward(&batch, &objective).unwrap();
            trainer.update(&forward, &case.settings(&objective)).unwrap();
            let after = device.calls.so_far();
            let asked: [usize; 4] = std::array::from_fn(|i| after[i] - before[i]);
            if step > 0 {
                assert_eq!(asked, [0, uploads, downloads, 0], "{name}, step {step}");
            }
        }
    }
}
