//! Training straight from a language model: the buckets of a [`Live`] harvest as shards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use serde_json::Value;
use shared::config::harvest::StoreDtype;
use shared::format::SaeMetadata;
use sysinfo::System;

use super::source::{ActivationSource, SourceTap, Statistics, Vectors};
use crate::harvest::Live;
use crate::progress;
use crate::store::Split;
use crate::store::describe::{bytes, grouped};

/// Taps of a language model as a source. A bucket is a shard; the next one is made while one is trained on, so that two
/// are in memory.
#[derive(Debug)]
pub struct LiveTaps {
    live: Live,
    taps: Vec<SourceTap>,
    /// The first bucket, made for the statistics and soon asked for again.
    first: Mutex<Option<Vec<Vectors>>>,
    /// Whether a progress bar was shown: training has its own from the first step on.
    shown: AtomicBool,
}

impl LiveTaps {
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
        let taps = live.taps().iter().map(|&(point, width)| SourceTap { point: Some(point), width });
        let taps = taps.collect();
        Ok(Self { live, taps, first: Mutex::default(), shown: AtomicBool::new(false) })
    }

    /// All taps of a bucket: the model runs once for them.
    fn make(&self, split: Split, index: usize) -> Result<Vec<Vec<f32>>> {
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

fn share(vectors: Vec<Vec<f32>>) -> Vec<Vectors> {
    vectors.into_iter().map(Arc::new).collect()
}

/// Bytes of memory this process may use.
fn memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    system.cgroup_limits().map_or(system.total_memory(), |limits| limits.total_memory)
}

impl ActivationSource for LiveTaps {
    fn maker(&self) -> &'static str {
        "LM"
    }

    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }

    fn n_vectors(&self) -> u64 {
        self.live.n_vectors(Split::Train)
    }

    fn n_shards(&self) -> usize {
        self.live.n_buckets(Split::Train)
    }

    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        let choose = |all: &[Vectors]| taps.iter().map(|&tap| Arc::clone(&all[tap])).collect();
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if shard != 0 {
            // Training is under way: what was kept for its beginning is not needed any more.
            first.take();
            drop(first);
            return Ok(choose(&share(self.make(Split::Train, shard)?)));
        }
        if first.is_none() {
            *first = Some(share(self.make(Split::Train, 0)?));
        }
        Ok(choose(first.as_deref().unwrap_or_default()))
    }

    fn element(&self) -> StoreDtype {
        self.live.dtype()
    }

    fn largest_shard(&self) -> u64 {
        let values: usize = self.taps.iter().map(|tap| tap.width).sum();
        self.live.bucket_bytes() / (size_of::<f32>() * values.max(1)) as u64
    }

    /// Of the first bucket: the others do not exist yet.
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        let vectors = self.read(0, &[tap])?;
        Statistics::of(&vectors[0], self.taps[tap].width, |_| true)
    }

    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
        let (mut chosen, mut n_rows) = (vec![Vec::new(); taps.len()], 0);
        for index in 0..self.live.n_buckets(Split::HeldOut) {
            if n_rows >= limit {
                break;
            }
            let made = self.make(Split::HeldOut, index)?;
            n_rows += made[0].len() / self.taps[0].width;
            for (vectors, &tap) in chosen.iter_mut().zip(taps) {
                vectors.extend(&made[tap]);
            }
        }
        for (vectors, &tap) in chosen.iter_mut().zip(taps) {
            vectors.truncate(limit * self.taps[tap].width);
        }
        Ok(chosen)
    }

    fn provenance(&self) -> &Value {
        self.live.provenance()
    }

    fn metadata(&self) -> SaeMetadata {
        self.live.metadata()
    }
}
