//! What a harvest did, in words and for machines.

use std::fmt;
use std::io;
use std::time::Duration;

use serde::Serialize;

use super::partial::Partial;
use crate::stop::Stopped;
use crate::store::Manifest;
use crate::store::describe::{bytes, grouped};

/// The result of a harvest.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Tokens in the store, both halves.
    pub tokens: u64,
    /// Sequences of both halves.
    pub sequences: u64,
    /// Stored vectors of each tap: training and held-out.
    pub vectors: [u64; 2],
    /// Each tap's name, width and C.
    pub taps: Vec<(String, usize, f64)>,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Seconds this run took; a resumed run counts only itself.
    pub seconds: f64,
    /// The share of them spent in the model.
    pub model_share: f64,
    /// The share of them spent writing and shuffling.
    pub disk_share: f64,
}

impl Summary {
    pub(super) fn new(manifest: &Manifest, total: Duration, model: Duration, disk: Duration) -> Self {
        let sequences = manifest.train.n_sequences + manifest.held_out.n_sequences;
        let seconds = total.as_secs_f64().max(1e-9);
        Self {
            tokens: sequences * manifest.sequence_length as u64,
            sequences,
            vectors: [manifest.train.n_vectors, manifest.held_out.n_vectors],
            taps: manifest.taps.iter().map(|t| (t.point.to_string(), t.width, t.scale)).collect(),
            bytes: manifest.shard_bytes(),
            seconds,
            model_share: model.as_secs_f64() / seconds,
            disk_share: disk.as_secs_f64() / seconds,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, held_out] = self.vectors.map(grouped);
        writeln!(f, "{} tokens in {} sequences", grouped(self.tokens), grouped(self.sequences))?;
        writeln!(f, "{train} training and {held_out} held-out vectors a tap, {}", bytes(self.bytes))?;
        for (name, width, scale) in &self.taps {
            writeln!(f, "{name}: width {width}, C {scale:.6}")?;
        }
        let (rate, model, disk) =
            (self.tokens as f64 / self.seconds, 100.0 * self.model_share, 100.0 * self.disk_share);
        write!(
            f,
            "{:.1} s, {rate:.0} tokens/s; model {model:.0} %, disk and shuffling {disk:.0} %",
            self.seconds
        )
    }
}

/// The running shares of model and disk, for the progress bar.
pub(super) fn shares(model: Duration, disk: Duration) -> String {
    let both = (model + disk).as_secs_f64().max(1e-9);
    format!("LM {:.0} % · IO {:.0} %", 100.0 * model.as_secs_f64() / both, 100.0 * disk.as_secs_f64() / both)
}

/// Says what a failed harvest kept, when freeing space would let it go on.
pub(super) fn explain(error: anyhow::Error, partial: &Partial) -> anyhow::Error {
    let full = |e: &io::Error| matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    if error.is::<Stopped>() || !error.chain().any(|e| e.downcast_ref().is_some_and(full)) {
        return error;
    }
    let buckets: usize = partial.halves.iter().map(|h| h.buckets.len()).sum();
    let vectors: u64 =
        partial.halves.iter().flat_map(|h| h.buckets.iter().flatten()).map(|s| s.n_vectors).sum();
    error.context(format!(
        "the disk is full; {} vectors a tap in {buckets} finished buckets are kept: free space and run the same command again",
        grouped(vectors)
    ))
}
