//! Training straight from a language model: the buckets of a [`Live`] harvest as shards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use serde_json::Value;
use shared::format::SaeMetadata;
use sysinfo::System;

use super::source::{ActivationSource, Statistics};
use crate::harvest::Live;
use crate::progress;
use crate::store::Split;
use crate::store::describe::{bytes, grouped};

/// A tap of a language model as a source. A bucket is a shard; the next one is made while one is trained on, so that two
/// are in memory.
#[derive(Debug)]
pub struct LiveTap {
    live: Live,
    /// The first bucket, made for the statistics and soon asked for again.
    first: Mutex<Option<Arc<Vec<f32>>>>,
    /// Whether a progress bar was shown: training has its own from the first step on.
    shown: AtomicBool,
}

impl LiveTap {
    /// Checks that two buckets fit in memory.
    ///
    /// # Errors
    /// If they do not.
    pub fn new(live: Live) -> Result<Self> {
        let (buffer, memory) = (2 * live.bucket_bytes(), memory());
        ensure!(
            buffer < memory,
            "two shuffle buckets take {}, but the machine has {}: lower bucket_vectors",
            bytes(buffer),
            bytes(memory)
        );
        tracing::info!(
            "live: {} training vectors in {} buckets, two of which are held in memory ({})",
            grouped(live.n_vectors(Split::Train)),
            live.n_buckets(Split::Train),
            bytes(buffer)
        );
        Ok(Self { live, first: Mutex::default(), shown: AtomicBool::new(false) })
    }

    fn make(&self, split: Split, index: usize) -> Result<Vec<f32>> {
        let bar = if self.shown.swap(true, Ordering::Relaxed) {
            ProgressBar::hidden()
        } else {
            progress::bar(self.live.tokens(split, index)?, "fill", "tokens")
        };
        let vectors = self.live.vectors(split, index, &bar);
        bar.finish_and_clear();
        vectors
    }
}

/// Bytes of memory this process may use.
fn memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    system.cgroup_limits().map_or(system.total_memory(), |limits| limits.total_memory)
}

impl ActivationSource for LiveTap {
    fn width(&self) -> usize {
        self.live.width()
    }

    fn n_vectors(&self) -> u64 {
        self.live.n_vectors(Split::Train)
    }

    fn n_shards(&self) -> usize {
        self.live.n_buckets(Split::Train)
    }

    fn read(&self, shard: usize) -> Result<Arc<Vec<f32>>> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if shard != 0 {
            // Training is under way: what was kept for its beginning is not needed any more.
            first.take();
            drop(first);
            return Ok(Arc::new(self.make(Split::Train, shard)?));
        }
        if let Some(vectors) = &*first {
            return Ok(Arc::clone(vectors));
        }
        let vectors = Arc::new(self.make(Split::Train, 0)?);
        *first = Some(Arc::clone(&vectors));
        Ok(vectors)
    }

    /// Of the first bucket: the others do not exist yet.
    fn statistics(&self) -> Result<Statistics> {
        Statistics::of(&self.read(0)?, self.width(), |_| true)
    }

    fn held_out(&self, limit: usize) -> Result<Vec<f32>> {
        let (width, mut vectors) = (self.width(), Vec::new());
        for index in 0..self.live.n_buckets(Split::HeldOut) {
            if vectors.len() >= limit * width {
                break;
            }
            vectors.extend(self.make(Split::HeldOut, index)?);
        }
        vectors.truncate(limit * width);
        Ok(vectors)
    }

    fn provenance(&self) -> &Value {
        self.live.provenance()
    }

    fn metadata(&self) -> SaeMetadata {
        self.live.metadata()
    }
}
