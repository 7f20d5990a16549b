//! Whether the disk can hold what a harvest will write.

use std::path::Path;

use anyhow::{Result, ensure};
use sysinfo::Disks;

use super::bucket;
use super::partial::Partial;
use super::plan::Bucket;
use crate::store::describe::bytes;

/// Left free besides: manifests, file-system overhead.
const MARGIN: u64 = 64 << 20;

/// Bytes still to be written: the shards of unfinished buckets, and the spool of the largest of them.
fn needed(partial: &Partial, plans: &[Vec<Bucket>; 2]) -> u64 {
    let config = &partial.config;
    let per_shard = usize::try_from(config.shard_vectors.0).unwrap_or(usize::MAX);
    let (mut shards, mut spool) = (0u64, 0u64);
    for (plan, half) in plans.iter().zip(&partial.halves) {
        for bucket in plan.iter().skip(half.buckets.len()) {
            let (whole, rest) = (bucket.n_vectors / per_shard, bucket.n_vectors % per_shard);
            let mut row_bytes = 0;
            for &(_, width) in &partial.taps {
                shards +=
                    whole as u64 * bucket::shard_bytes(config.dtype, per_shard.min(bucket.n_vectors), width);
                shards += if rest > 0 { bucket::shard_bytes(config.dtype, rest, width) } else { 0 };
                row_bytes += (width * config.dtype.size()) as u64;
            }
            spool = spool.max(bucket.n_vectors as u64 * row_bytes);
        }
    }
    shards + spool
}

/// # Errors
/// If the file system of `folder` has less free space than the harvest needs.
pub(super) fn check(folder: &Path, partial: &Partial, plans: &[Vec<Bucket>; 2]) -> Result<()> {
    let needed = needed(partial, plans);
    let Some(available) = available(folder) else { return Ok(()) };
    ensure!(
        needed + MARGIN <= available,
        "the store {} needs {} more, but only {} are free: free space, ask for fewer tokens or taps, or set dtype to bf16",
        folder.display(),
        bytes(needed + MARGIN),
        bytes(available)
    );
    tracing::info!("the store needs {}; {} are free", bytes(needed), bytes(available));
    Ok(())
}

/// Free bytes of the file system that holds `folder`, where it can be told.
fn available(folder: &Path) -> Option<u64> {
    let folder = folder.canonicalize().ok()?;
    let disks = Disks::new_with_refreshed_list();
    let holding = disks.list().iter().filter(|d| folder.starts_with(d.mount_point()));
    holding.max_by_key(|d| d.mount_point().components().count()).map(sysinfo::Disk::available_space)
}
