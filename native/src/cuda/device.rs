//! The seam below the trainer: memory, launches and matrix products of a device.
//!
//! A card is one (`super::card`); the tests have another, which runs the same kernels on the processor. Addresses are numbers, so that a
//! launch is told them as the kernel sees them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use bytemuck::Pod;

use super::kernels::{Kernel, Shape};
use super::step::Address;

/// An argument of a kernel, in the size the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument<'a> {
    /// A structure, by value.
    Bytes(&'a [u8]),
    /// An address.
    Address(Address),
    /// A count.
    U32(u32),
    /// A large count.
    U64(u64),
    /// A factor.
    F32(f32),
}

/// A matrix in the device's memory, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixAt {
    /// Its first value.
    pub at: Address,
    /// Values from one row to the next.
    pub leading: usize,
    /// Whether it is used transposed.
    pub transposed: bool,
}

/// What the factors of a product are, and how they are multiplied; sums and result are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Factors {
    /// f32, all bits of it.
    F32,
    /// f32, of which tensor cores see 11 bits.
    Tf32,
    /// bf16.
    Bf16,
}

/// `c [m, n] = a [m, k] · b [k, n]`, or that added to `c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// The left factor.
    pub a: MatrixAt,
    /// The right factor.
    pub b: MatrixAt,
    /// The result, not transposed.
    pub c: MatrixAt,
    /// What the factors are.
    pub factors: Factors,
    /// Whether the result is added to what is there.
    pub adds: bool,
}

/// Memory of the host that a device reads by itself, at the same address. Given back when dropped.
pub trait HostMemory: fmt::Debug + Send + Sync {
    /// Its first byte, for the device.
    fn at(&self) -> Address;
    /// Its bytes, for the host.
    fn bytes(&self) -> &[u8];
    /// Its bytes, for the host to write.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// A device with memory of its own. What is asked of it happens in order; only `download` and `wait` wait.
pub trait Device: fmt::Debug {
    /// What it is, for people.
    fn name(&self) -> String;
    /// Bytes of memory free and in all.
    ///
    /// # Errors
    /// The device's own.
    fn memory(&self) -> Result<(u64, u64)>;
    /// Takes memory, of undefined content, aligned to 256 bytes.
    ///
    /// # Errors
    /// If there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Address>;
    /// Gives memory back.
    fn release(&self, at: Address);
    /// Copies to the device.
    ///
    /// # Errors
    /// The device's own.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Takes memory of the host, of undefined content, that the device reads by itself.
    ///
    /// # Errors
    /// If there is not enough, or it cannot be kept in place.
    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>>;
    /// Begins to copy from [`Device::host_memory`] to memory that was allocated before, beside what is asked of the device otherwise.
    /// Both must stay what they are until [`Device::wait_beside`].
    ///
    /// # Errors
    /// The device's own.
    fn upload_beside(&self, to: Address, from: Address, bytes: usize) -> Result<()>;
    /// Waits until everything that was copied beside has arrived.
    ///
    /// # Errors
    /// The device's own.
    fn wait_beside(&self) -> Result<()>;
    /// Copies from the device, after everything asked before.
    ///
    /// # Errors
    /// The device's own: also what went wrong in a launch before.
    fn download(&self, from: Address, into: &mut [u8]) -> Result<()>;
    /// Fills memory with one byte.
    ///
    /// # Errors
    /// The device's own.
    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()>;
    /// Copies within the device.
    ///
    /// # Errors
    /// The device's own.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;
    /// Runs a kernel, compiled for `shape`, in `blocks` blocks of the shape's threads.
    ///
    /// # Errors
    /// If the kernel does not compile, or the launch is refused.
    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()>;
    /// Multiplies matrices.
    ///
    /// # Errors
    /// If the library refuses.
    fn product(&self, product: &Product) -> Result<()>;
    /// Waits until everything asked has been done.
    ///
    /// # Errors
    /// What went wrong since.
    fn wait(&self) -> Result<()>;
}

/// `n` values of one type in a device's memory, given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<dyn Device + Send + Sync>,
    at: Address,
    bytes: usize,
    /// What [`Buffer::write_changed`] wrote.
    last: Mutex<Vec<u8>>,
}

impl Buffer {
    /// Room for `n` values, of undefined content.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new<T: Pod>(device: &Arc<dyn Device + Send + Sync>, n: usize) -> Result<Self> {
        let bytes = n * size_of::<T>();
        // A kernel's null pointer means "none", so that even nothing has an address.
        let at = device.allocate(bytes.max(4))?;
        Ok(Self { device: Arc::clone(device), at, bytes, last: Mutex::default() })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn of<T: Pod>(device: &Arc<dyn Device + Send + Sync>, values: &[T]) -> Result<Self> {
        let buffer = Self::new::<T>(device, values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// `n` zeros.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn zeros<T: Pod>(device: &Arc<dyn Device + Send + Sync>, n: usize) -> Result<Self> {
        let buffer = Self::new::<T>(device, n)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// Its first value.
    #[must_use]
    pub fn at(&self) -> Address {
        self.at
    }

    /// Overwrites its beginning.
    ///
    /// # Errors
    /// If it is too short, or the device refuses.
    pub fn write<T: Pod>(&self, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        ensure!(bytes.len() <= self.bytes, "{} bytes for a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() { Ok(()) } else { self.device.upload(self.at, bytes) }
    }

    /// [`Buffer::write`], unless these are the values that it was given last: for what seldom changes, and nobody else writes.
    ///
    /// # Errors
    /// As [`Buffer::write`].
    pub fn write_changed<T: Pod>(&self, values: &[T]) -> Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if *last != bytes {
            last.clear();
            self.write(values)?;
            last.extend(bytes);
        }
        Ok(())
    }

    /// Its first values.
    ///
    /// # Errors
    /// If it is too short, or the device refuses.
    pub fn read_into<T: Pod>(&self, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        ensure!(bytes.len() <= self.bytes, "{} bytes of a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() { Ok(()) } else { self.device.download(self.at, bytes) }
    }

    /// Values from number `first` on.
    ///
    /// # Errors
    /// As [`Buffer::read_into`].
    pub fn read_from<T: Pod>(&self, first: usize, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        let start = first * size_of::<T>();
        ensure!(start + bytes.len() <= self.bytes, "{} bytes from {start} of {}", bytes.len(), self.bytes);
        self.device.download(self.at + start as u64, bytes)
    }

    /// Its first `n` values.
    ///
    /// # Errors
    /// As [`Buffer::read_into`].
    pub fn read<T: Pod>(&self, n: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); n];
        self.read_into(&mut values)?;
        Ok(values)
    }

    /// Fills it with zeros.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn clear(&self) -> Result<()> {
        self.device.fill(self.at, 0, self.bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.release(self.at);
    }
}
