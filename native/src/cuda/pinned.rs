//! Memory of the host that stays in place: a second stream copies from it while the first computes, and much is downloaded through it.

#![expect(unsafe_code, reason = "calls into the driver, and memory that it gives")]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{result as driver, sys};
use rayon::prelude::*;

use super::device::HostMemory;
use super::step::Address;

/// Memory of the host that the driver keeps in place, and that the card reads at the host's own address.
#[derive(Debug)]
pub(super) struct Pinned {
    at: NonNull<u8>,
    bytes: usize,
    /// Holds the card's context, without which the memory would be gone.
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: the memory belongs to this value alone, which hands it out by the rules of borrowing.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` zeros. The context of `device` is current.
    pub(super) fn new(device: sys::CUdevice, bytes: usize) -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let bytes = bytes.max(1);
        // SAFETY: the context is current, and stays as long as this value, which retains it.
        let at = unsafe { driver::malloc_host(bytes, flags) };
        let at = at.with_context(|| format!("the host has no room for {bytes} bytes that stay in place"))?;
        let at = NonNull::new(at.cast::<u8>()).context("the driver gave no memory")?;
        // SAFETY: the device is one of the driver's.
        let context = match unsafe { driver::primary_ctx::retain(device) } {
            Ok(context) => context,
            Err(error) => {
                // SAFETY: the memory was just allocated, and nobody has it.
                let _ = unsafe { driver::free_host(at.as_ptr().cast()) };
                return Err(error.into());
            }
        };
        let memory = Self { at, bytes, device, context };
        // SAFETY: the memory is `bytes` long and nobody else's. Bytes that were never written must not be read as values.
        unsafe { at.as_ptr().write_bytes(0, bytes) };
        let mut seen = 0;
        // SAFETY: the memory was allocated to be mapped; the address is of a live integer.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut seen, at.as_ptr().cast::<c_void>(), 0) }
            .result()?;
        ensure!(seen == memory.at(), "the card sees the host's memory at another address");
        Ok(memory)
    }
}

impl HostMemory for Pinned {
    fn at(&self) -> Address {
        self.at.as_ptr() as Address
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated and written; a card only reads them.
        unsafe { slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the context is still retained, and the memory was allocated by `new`; whoever copied from it has waited. Failures at
        // the end change nothing.
        unsafe {
            let _ = driver::ctx::set_current(self.context);
            let _ = driver::free_host(self.at.as_ptr().cast());
            let _ = driver::primary_ctx::release(self.device);
        }
    }
}

/// Bytes of a step of a [`Staircase`].
const STEP: usize = 32 << 20;
/// Bytes that a thread copies at a time.
const PIECE: usize = 1 << 20;

/// Two pieces of memory that stay in place, through which much is downloaded: one is emptied while the other is filled.
pub(super) struct Staircase {
    steps: [Pinned; 2],
    filled: [sys::CUevent; 2],
}

impl Staircase {
    /// Less than this is downloaded without.
    pub(super) const LEAST: usize = STEP / 8;

    /// The context of `device` is current.
    pub(super) fn new(device: sys::CUdevice) -> Result<Self> {
        let steps = [Pinned::new(device, STEP)?, Pinned::new(device, STEP)?];
        let event = || driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self { steps, filled: [event()?, event()?] })
    }

    /// Copies from the card, after everything asked of `stream` before.
    pub(super) fn download(&mut self, stream: sys::CUstream, from: Address, into: &mut [u8]) -> Result<()> {
        let n = into.len().div_ceil(STEP);
        let length = into.len();
        for number in 0..=n {
            if number < n {
                let (start, side) = (number * STEP, number % 2);
                let bytes = STEP.min(length - start);
                let step = self.steps[side].bytes_mut().as_mut_ptr();
                // SAFETY: a step has room, and what was in it has been copied out, two rounds ago; there are as many bytes at `from`, by
                // the owner of the buffer. Stream, event and step live as long as the card.
                unsafe {
                    let from = from + start as u64;
                    sys::cuMemcpyDtoHAsync_v2(step.cast(), from, bytes, stream).result()?;
                    driver::event::record(self.filled[side], stream)?;
                }
            }
            if let Some(before) = number.checked_sub(1) {
                let side = before % 2;
                // SAFETY: the event was recorded a round ago.
                unsafe { driver::event::synchronize(self.filled[side]) }
                    .context("the card failed at something asked of it before")?;
                let into = into[before * STEP..].chunks_mut(STEP).next().unwrap_or_default();
                let step = &self.steps[side].bytes()[..into.len()];
                into.par_chunks_mut(PIECE)
                    .zip(step.par_chunks(PIECE))
                    .for_each(|(a, b)| a.copy_from_slice(b));
            }
        }
        Ok(())
    }
}

impl Drop for Staircase {
    fn drop(&mut self) {
        for event in self.filled {
            // SAFETY: the events are this value's own; the card waited for everything before.
            let _ = unsafe { driver::event::destroy(event) };
        }
    }
}

/// A stream of copies.
pub(super) struct Beside {
    stream: sys::CUstream,
    /// What the other stream has reached when a copy is asked for: one thread at a time.
    reached: Mutex<sys::CUevent>,
}

impl Beside {
    /// A stream of the current context.
    pub(super) fn new() -> Result<Self> {
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)?;
        let reached = driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Self { stream, reached: Mutex::new(reached) })
    }

    /// Begins to copy what the host has at `from`, once `main` is as far as it has been told to go: memory that it allocates, or that it
    /// used before, is then there to be written.
    pub(super) fn copy(&self, main: sys::CUstream, to: Address, from: Address, bytes: usize) -> Result<()> {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: both streams and the event live as long as the card. Nobody records the event between these calls. Both stretches of
        // memory are as long and stay until the copy was waited for, by the caller.
        unsafe {
            driver::event::record(*reached, main)?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            driver::stream::wait_event(self.stream, *reached, flags)?;
            sys::cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, self.stream).result()?;
        }
        Ok(())
    }

    /// Waits for all copies.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the stream lives as long as the card.
        unsafe { driver::stream::synchronize(self.stream) }.context("the card failed at copying")
    }

    /// Gives everything back, when the card is closed.
    pub(super) fn end(&self) {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody uses the card any more; failures at the end change nothing.
        unsafe {
            let _ = driver::stream::synchronize(self.stream);
            let _ = driver::event::destroy(*reached);
            let _ = driver::stream::destroy(self.stream);
        }
    }
}
