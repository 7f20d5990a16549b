//! Whether disk and memory can hold what a harvest will write and keep.

use anyhow::{Result, ensure};
use shared::config::harvest::HarvestConfig;
use shared::tap::TapPoint;
use sysinfo::{MemoryRefreshKind, System};

use super::bucket;
use super::output::Output;
use super::partial::Partial;
use super::plan::Bucket;
use crate::files;
use crate::store::describe::bytes;

/// Left free besides: manifests, file-system overhead.
const MARGIN: u64 = 64 << 20;

/// Bytes a harvest keeps in memory, besides the model and what it makes of a batch:
///
/// - 4 for each token, and 12 for each vector of a bucket (where it comes from, and the shuffled order);
/// - for each thread, the vectors it brings into order, however long a shard is;
/// - for each tap, two sums of its width, and the batch as it is written.
///
/// Neither shards nor the vectors of a bucket are held in memory, so taps and widths hardly count.
fn memory(config: &HarvestConfig, taps: &[(TapPoint, usize)], threads: usize) -> [(&'static str, u64); 3] {
    let widest = taps.iter().map(|tap| tap.1).max().unwrap_or(0) as u64;
    let row = widest * config.dtype.size() as u64;
    let sums: u64 = taps.iter().map(|tap| 2 * (tap.1 as u64 + 1) * 8).sum();
    let gathered = threads as u64 * (bucket::GATHERED as u64).max(row);
    let batch = (config.batch as u64).saturating_mul(config.sequence_length as u64).saturating_mul(row);
    let vectors = config.bucket_rows().min(config.tokens.0).max(config.sequence_length as u64);
    [
        ("tokens", config.tokens.0.saturating_mul(4)),
        ("bucket_vectors", vectors.saturating_mul(12).saturating_add(gathered + sums)),
        ("batch", batch),
    ]
}

/// # Errors
/// If less memory is free than the harvest keeps; names the key that takes most of it.
pub(super) fn check_memory(config: &HarvestConfig, taps: &[(TapPoint, usize)]) -> Result<()> {
    let mut system = System::new();
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    fits_memory(&memory(config, taps, rayon::current_num_threads()), system.available_memory())
}

fn fits_memory(parts: &[(&'static str, u64)], free: u64) -> Result<()> {
    let needed = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.1));
    let most = parts.iter().max_by_key(|part| part.1).map_or("", |part| part.0);
    // Where it cannot be told, 0 is said to be free.
    ensure!(
        free == 0 || needed <= free,
        "the harvest keeps {} in memory besides the model, and {} are free: lower `{most}`, which takes most of it",
        bytes(needed),
        bytes(free)
    );
    tracing::debug!("the harvest keeps up to {} in memory besides the model", bytes(needed));
    Ok(())
}

/// Bytes still to be written: the shards of unfinished buckets, and the spool of the largest of them. Where finished shards
/// are sent away, those of one bucket.
fn needed(partial: &Partial, plans: &[Vec<Bucket>; 2], sent_away: bool) -> u64 {
    let config = &partial.config;
    let values = partial.taps.iter().map(|tap| tap.1).sum();
    let per_shard = usize::try_from(config.shard_rows(values)).unwrap_or(usize::MAX);
    let (mut shards, mut largest, mut spool) = (0u64, 0u64, 0u64);
    for (plan, half) in plans.iter().zip(&partial.halves) {
        for bucket in plan.iter().skip(half.buckets.len()) {
            let (whole, rest) = (bucket.n_vectors / per_shard, bucket.n_vectors % per_shard);
            let (mut own, mut row_bytes) = (0u64, 0u64);
            for &(_, width) in &partial.taps {
                own +=
                    whole as u64 * bucket::shard_bytes(config.dtype, per_shard.min(bucket.n_vectors), width);
                own += if rest > 0 { bucket::shard_bytes(config.dtype, rest, width) } else { 0 };
                row_bytes += (width * config.dtype.size()) as u64;
            }
            shards += own;
            largest = largest.max(own);
            spool = spool.max(bucket.n_vectors as u64 * row_bytes);
        }
    }
    spool + if sent_away { largest } else { shards }
}

/// # Errors
/// If the file system of `out` has less free space than the harvest needs.
pub(super) fn check(out: &Output, partial: &Partial, plans: &[Vec<Bucket>; 2]) -> Result<()> {
    let needed = needed(partial, plans, out.is_remote());
    let folder = out.work();
    let Some(available) = files::free_space(folder) else { return Ok(()) };
    let advice = if out.is_remote() { "lower bucket_vectors" } else { "ask for fewer tokens or taps" };
    ensure!(
        needed + MARGIN <= available,
        "the store needs {} more in {}, but only {} are free: free space, {advice}, or set dtype to bf16",
        bytes(needed + MARGIN),
        folder.display(),
        bytes(available)
    );
    tracing::info!("{} needs {}; {} are free", folder.display(), bytes(needed), bytes(available));
    Ok(())
}

#[cfg(test)]
mod tests {
    use shared::config::Count;

    use super::*;

    #[test]
    fn memory_does_not_grow_with_taps_and_shards_and_its_largest_part_is_named() {
        let config = HarvestConfig {
            tokens: Count(100_000_000),
            shard_vectors: Some(Count(1_000_000)),
            ..HarvestConfig::default()
        };
        let tap: TapPoint = "resid.0".parse().unwrap();
        let total = |n: usize, threads| -> u64 {
            memory(&config, &vec![(tap, 3584); n], threads).iter().map(|part| part.1).sum()
        };
        // 42 layers at 3 sites of a 9B model on 16 threads: 400 MB of tokens, 12 MB of order, 1 GiB of vectors.
        assert!(total(126, 16) < 1_600 << 20, "{}", total(126, 16));
        assert!(total(126, 16) - total(1, 16) < 8 << 20);
        let many = HarvestConfig { tokens: Count(8_000_000_000), ..config.clone() };
        let error = fits_memory(&memory(&many, &[(tap, 3584)], 2), 8 << 30).unwrap_err().to_string();
        assert!(error.contains("`tokens`") && error.contains("8.00 GiB"), "{error}");
        let large = HarvestConfig {
            bucket_vectors: Some(Count(1_000_000_000)),
            tokens: Count(1_000_000_000),
            ..config
        };
        let error = fits_memory(&memory(&large, &[(tap, 3584)], 2), 8 << 30).unwrap_err().to_string();
        assert!(error.contains("`bucket_vectors`"), "{error}");
        fits_memory(&memory(&many, &[(tap, 3584)], 2), 0).unwrap();
    }
}
