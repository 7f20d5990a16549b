//! A device whose launches somebody sees first, and may change: for impostors, and for tests that stop a run at a certain launch.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;

use super::device::{Argument, Device, HostMemory, Product};
use super::kernels::{Kernel, Shape};
use super::step::{Address, Step};

type Change = dyn Fn(Kernel, &mut Step) + Send + Sync;

/// A device, and what happens before each launch.
pub struct Intercept {
    device: Arc<dyn Device + Send + Sync>,
    what: &'static str,
    change: Box<Change>,
}

impl fmt::Debug for Intercept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intercept")
            .field("device", &self.device)
            .field("what", &self.what)
            .finish_non_exhaustive()
    }
}

impl Intercept {
    /// `device` with `change`, which `what` describes, before every launch of a kernel that is told a [`Step`].
    #[must_use]
    pub fn new(
        device: Arc<dyn Device + Send + Sync>,
        what: &'static str,
        change: impl Fn(Kernel, &mut Step) + Send + Sync + 'static,
    ) -> Self {
        Self { device, what, change: Box::new(change) }
    }
}

impl Device for Intercept {
    fn name(&self) -> String {
        format!("{}, {}", self.device.name(), self.what)
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

    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        self.device.host_memory(bytes)
    }

    fn upload_beside(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device.upload_beside(to, from, bytes)
    }

    fn wait_beside(&self) -> Result<()> {
        self.device.wait_beside()
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
        let mut arguments = arguments.to_vec();
        let mut told = Step::default();
        if let Some(Argument::Bytes(bytes)) = arguments.first_mut() {
            bytemuck::bytes_of_mut(&mut told).copy_from_slice(bytes);
            (self.change)(kernel, &mut told);
            *bytes = bytemuck::bytes_of(&told);
        }
        self.device.launch(kernel, shape, blocks, &arguments)
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.device.product(product)
    }

    fn wait(&self) -> Result<()> {
        self.device.wait()
    }
}
