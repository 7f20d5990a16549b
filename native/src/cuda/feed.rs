//! Raw vectors of shards where a device reads them, and batches gathered from them.
//!
//! A shard lies in the device's own memory or, where that is too small, in memory of the host that the device reads by itself
//! ([`Placement`]). It gets there on the thread that reads it: values go into memory of the host that stays in place, and from there
//! to the device while the next tap is read. One launch then makes a batch of a training step: rows by number, as f32, on their scale,
//! with the bits that the host would make.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};
use shared::config::harvest::StoreDtype;

use super::batch::Resident;
use super::device::{Argument, Buffer, Device, HostMemory};
use super::kernels::{Kernel, Shape};
use super::step::Address;

type Shared = Arc<dyn Device + Send + Sync>;

/// Pieces of host memory that are copied from at the same time, at most: one is read into meanwhile.
const IN_FLIGHT: usize = 2;

/// Where raw vectors wait until batches are gathered from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// In the device's memory.
    Device,
    /// In the host's, where the device reads them.
    Host,
}

/// What shards and batches of all runs on a device share.
#[derive(Debug)]
pub struct Feed {
    device: Shared,
    placement: Placement,
    /// Memory of the host between two uses: keeping it in place takes long.
    spare: Arc<Mutex<Vec<Box<dyn HostMemory>>>>,
    /// Batches, most of them in use.
    batches: Mutex<Vec<Arc<Resident>>>,
}

impl Feed {
    /// A feed with shards at `placement`.
    #[must_use]
    pub fn new(device: &Shared, placement: Placement) -> Self {
        Self { device: Arc::clone(device), placement, spare: Arc::default(), batches: Mutex::default() }
    }

    /// Begins with a shard.
    #[must_use]
    pub fn filling(&self) -> Filling<'_> {
        Filling { feed: self, busy: Vec::new() }
    }

    /// Room for a batch that nobody uses; `targets` says whether rows have others than themselves.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn batch(&self, n_rows: usize, widths: [usize; 2], targets: bool) -> Result<Arc<Resident>> {
        let mut batches = lock(&self.batches);
        let fits = |batch: &Resident| {
            (batch.n_rows(), batch.widths(), batch.has_targets()) == (n_rows, widths, targets)
        };
        // What was asked of the device with it before happens before what will be.
        if let Some(free) = batches.iter().find(|batch| Arc::strong_count(batch) == 1 && fits(batch)) {
            return Ok(Arc::clone(free));
        }
        let batch = Arc::new(Resident::new(&self.device, n_rows, widths, targets)?);
        batches.push(Arc::clone(&batch));
        Ok(batch)
    }

    /// Host memory of at least `bytes`, but not of many more.
    fn room(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        let mut spare = lock(&self.spare);
        let length = |at: &usize| spare[*at].bytes().len();
        let fits = |at: &usize| (bytes..=2 * bytes).contains(&length(at));
        if let Some(at) = (0..spare.len()).filter(fits).min_by_key(length) {
            return Ok(spare.swap_remove(at));
        }
        // Shards of one store are of one size, but for the first that comes: what is too small will not be asked for again.
        if let Some(at) = (0..spare.len()).filter(|at| length(at) < bytes).max_by_key(length) {
            spare.swap_remove(at);
        }
        self.device.host_memory(bytes).or_else(|_| {
            spare.clear();
            self.device.host_memory(bytes)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A shard on its way to a device.
#[derive(Debug)]
pub struct Filling<'a> {
    feed: &'a Feed,
    /// What is being copied from.
    busy: Vec<Box<dyn HostMemory>>,
}

impl Filling<'_> {
    /// Memory for `bytes` bytes; there may be more.
    ///
    /// # Errors
    /// If the host has too little memory that stays in place, or a copy failed.
    pub fn room(&mut self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        if self.busy.len() >= IN_FLIGHT {
            self.arrive()?;
        }
        self.feed.room(bytes)
    }

    /// Brings the first `bytes` bytes of `memory` where the device reads them; `see` looks at them meanwhile.
    ///
    /// # Errors
    /// If the device has too little memory, or refuses.
    pub fn put<T>(
        &mut self,
        memory: Box<dyn HostMemory>,
        bytes: usize,
        see: impl FnOnce(&[u8]) -> T,
    ) -> Result<(Readable, T)> {
        let device = &self.feed.device;
        ensure!(bytes <= memory.bytes().len(), "{bytes} bytes of {}", memory.bytes().len());
        match self.feed.placement {
            Placement::Host => self.keep(memory, bytes, see),
            Placement::Device => {
                let buffer = match Buffer::new::<u8>(device, bytes) {
                    Ok(buffer) => buffer,
                    // Less was free than was thought: these stay where they are.
                    Err(error) => {
                        tracing::debug!("{error:#}");
                        return self.keep(memory, bytes, see);
                    }
                };
                // Kept from now on, whatever the call below says.
                self.busy.push(memory);
                let memory = &self.busy[self.busy.len() - 1];
                if bytes > 0 {
                    device.upload_beside(buffer.at(), memory.at(), bytes)?;
                }
                let seen = see(&memory.bytes()[..bytes]);
                Ok((Readable::Device(buffer), seen))
            }
        }
    }

    /// Leaves values in the host's memory.
    fn keep<T>(
        &self,
        memory: Box<dyn HostMemory>,
        bytes: usize,
        see: impl FnOnce(&[u8]) -> T,
    ) -> Result<(Readable, T)> {
        let seen = see(&memory.bytes()[..bytes]);
        let (device, spare) = (Arc::clone(&self.feed.device), Arc::clone(&self.feed.spare));
        Ok((Readable::Host { memory: Some(memory), device, spare }, seen))
    }

    /// Waits until everything has arrived.
    ///
    /// # Errors
    /// If the device failed.
    pub fn arrive(&mut self) -> Result<()> {
        if !self.busy.is_empty() {
            self.feed.device.wait_beside()?;
            lock(&self.feed.spare).append(&mut self.busy);
        }
        Ok(())
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        // After an error: nothing may go away while it is copied from.
        if let Err(error) = self.arrive() {
            tracing::debug!("vectors did not arrive: {error:#}");
        }
    }
}

/// Values that a device reads.
#[derive(Debug)]
pub enum Readable {
    /// In its memory.
    Device(Buffer),
    /// In the host's, which is kept for the next shard afterwards.
    Host {
        /// Always there until this is dropped.
        memory: Option<Box<dyn HostMemory>>,
        /// Who reads.
        device: Shared,
        /// Where the memory goes.
        spare: Arc<Mutex<Vec<Box<dyn HostMemory>>>>,
    },
}

impl Readable {
    /// The first of them.
    #[must_use]
    pub fn at(&self) -> Address {
        match self {
            Self::Device(buffer) => buffer.at(),
            Self::Host { memory, .. } => memory.as_ref().map_or(0, |memory| memory.at()),
        }
    }
}

impl Drop for Readable {
    fn drop(&mut self) {
        if let Self::Host { memory, device, spare } = self
            && let Some(memory) = memory.take()
        {
            // What still reads it was asked for before.
            match device.wait() {
                Ok(()) => lock(spare).push(memory),
                Err(error) => tracing::debug!("the device failed: {error:#}"),
            }
        }
    }
}

/// A tap of a shard: the mirror of `struct Tap` in `kernels/gather.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct TapAt {
    values: Address,
    own: Address,
    inverse: f32,
    unused: u32,
}

impl TapAt {
    /// Values at `values`, with each row's own scale and shift at `own` (0 where rows have none), multiplied by `inverse` in the end.
    #[must_use]
    pub fn new(values: Address, own: Address, inverse: f32) -> Self {
        Self { values, own, inverse, unused: 0 }
    }
}

/// What batches are gathered from: a shard, as one stream of batches sees it. The values it names must stay.
#[derive(Debug)]
pub struct Gathering {
    device: Shared,
    shape: Shape,
    inputs: Buffer,
    target: Option<Buffer>,
    examples: Buffer,
    n_examples: usize,
    n_rows: usize,
    element: StoreDtype,
    eps: f32,
}

impl Gathering {
    /// `inputs` and `target` of `n_rows` rows each, of values of type `element` and of `widths`; `examples` says which are asked for,
    /// `i · n_rows + r` for row `r` of input `i`. `eps` is added to rows' own scales.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn new(
        feed: &Feed,
        (inputs, target): (&[TapAt], Option<TapAt>),
        (n_rows, widths): (usize, [usize; 2]),
        (element, eps): (StoreDtype, f32),
        examples: &[u32],
    ) -> Result<Self> {
        let device = &feed.device;
        let all = n_rows.checked_mul(inputs.len());
        ensure!(
            all.is_some_and(|all| examples.iter().all(|&example| (example as usize) < all)),
            "an example that {} inputs of {n_rows} rows do not have",
            inputs.len()
        );
        ensure!(target.is_none() || inputs.len() == 1, "targets of several inputs");
        Ok(Self {
            shape: Shape::new(widths[0], widths[1]),
            inputs: Buffer::of(device, inputs)?,
            target: target.map(|target| Buffer::of(device, &[target])).transpose()?,
            examples: Buffer::of(device, examples)?,
            n_examples: examples.len(),
            device: Arc::clone(device),
            n_rows,
            element,
            eps,
        })
    }

    /// Makes the rows of `batch` from number `row` on of `n` examples from number `first` on.
    ///
    /// # Errors
    /// If there are not so many, or the device refuses.
    pub fn gather(&self, batch: &Resident, row: usize, first: usize, n: usize) -> Result<()> {
        ensure!(first + n <= self.n_examples && row + n <= batch.n_rows(), "{n} examples from {first}");
        if n == 0 {
            return Ok(());
        }
        let [d_in, d_out] = batch.widths();
        self.launch(&self.inputs, batch.x() + (4 * row * d_in) as u64, d_in, self.eps, first, n)?;
        match &self.target {
            Some(target) => self.launch(target, batch.y() + (4 * row * d_out) as u64, d_out, 0.0, first, n),
            None => Ok(()),
        }
    }

    fn launch(
        &self,
        taps: &Buffer,
        out: Address,
        width: usize,
        eps: f32,
        first: usize,
        n: usize,
    ) -> Result<()> {
        let element = match self.element {
            StoreDtype::F32 => 0,
            StoreDtype::Bf16 => 1,
            StoreDtype::F16 => 2,
        };
        let arguments = [
            Argument::Address(taps.at()),
            Argument::Address(self.examples.at() + 4 * first as u64),
            Argument::Address(out),
            Argument::U32(u32::try_from(self.n_rows)?),
            Argument::U32(u32::try_from(width)?),
            Argument::U32(element),
            Argument::F32(eps),
        ];
        self.device.launch(Kernel::Gather, self.shape, n, &arguments)
    }
}
