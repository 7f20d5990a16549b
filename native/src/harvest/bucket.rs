//! Finishing a bucket: the spooled vectors are written as shards in shuffled order, the same order for every tap.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use safetensors::SafeTensors;
use shared::config::harvest::{HarvestConfig, StoreDtype};
use shared::tap::TapPoint;

use super::plan::Layout;
use super::spool;
use crate::store::manifest::{FileInfo, ShardInfo};
use crate::store::tensors::{self, TensorHeader};
use crate::store::{self, Split};

/// Bytes of vectors brought into order at a time, for each thread: what keeps memory bounded however long a shard is.
pub(super) const GATHERED: usize = 64 << 20;

/// The sum of stored vectors and of their squared norms, in f64.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moments {
    pub(super) sum: Vec<f64>,
    pub(super) squares: f64,
}

/// The folders of a harvest.
#[derive(Debug, Clone)]
pub(super) struct Folders {
    /// The store.
    pub(super) store: PathBuf,
    /// Its folder of unfinished work.
    pub(super) partial: PathBuf,
}

/// Writes the bucket's shards from number `first` on, every tap; returns them with the moments of each tap.
pub(super) fn write(
    folders: &Folders,
    config: &HarvestConfig,
    taps: &[(TapPoint, usize)],
    layout: &Layout,
    split: Split,
    first: usize,
) -> Result<(Vec<ShardInfo>, Vec<Moments>)> {
    let per_shard = usize::try_from(config.shard_rows(taps.iter().map(|tap| tap.1).sum()))?;
    let columns: Vec<_> = taps
        .par_iter()
        .map(|&tap| write_tap(folders, config.dtype, tap, layout, split, (first, per_shard)))
        .collect::<Result<_>>()?;
    let sizes = layout.order.chunks(per_shard).map(<[u32]>::len);
    let shards = sizes.enumerate().map(|(i, n)| ShardInfo {
        n_vectors: n as u64,
        files: columns.iter().map(|(files, _)| files[i].clone()).collect(),
    });
    Ok((shards.collect(), columns.iter().map(|(_, moments)| moments.clone()).collect()))
}

fn write_tap(
    folders: &Folders,
    dtype: StoreDtype,
    (point, width): (TapPoint, usize),
    layout: &Layout,
    split: Split,
    (first, per_shard): (usize, usize),
) -> Result<(Vec<FileInfo>, Moments)> {
    let row_bytes = width * dtype.size();
    let mut moments = Moments { sum: vec![0.0; width], squares: 0.0 };
    let (mut files, mut rows, mut vector) = (Vec::new(), Vec::new(), vec![0.0; width]);
    let spooled = spool::path(&folders.partial, point);
    let at_once = (GATHERED / row_bytes).max(1);
    for (i, wanted) in layout.order.chunks(per_shard).enumerate() {
        let origin =
            |of: &[u32]| -> Vec<u8> { wanted.iter().flat_map(|&w| of[w as usize].to_le_bytes()).collect() };
        let (sequences, positions) = (origin(&layout.sequences), origin(&layout.positions));
        let path = store::shard_path(&folders.store, point, split, first + i);
        let (shape, origin_shape) = ([wanted.len(), width], [wanted.len()]);
        let headers = shard_headers(dtype, &shape, &origin_shape);
        files.push(tensors::write(&path, &headers, |out| {
            for wanted in wanted.chunks(at_once) {
                spool::gather(&spooled, row_bytes, wanted, &mut rows)?;
                for row in rows.chunks_exact(row_bytes) {
                    store::decode(dtype, row, &mut vector);
                    for (sum, &value) in moments.sum.iter_mut().zip(&vector) {
                        *sum += f64::from(value);
                        moments.squares += f64::from(value) * f64::from(value);
                    }
                }
                out.write_all(&rows)?;
            }
            out.write_all(&sequences)?;
            out.write_all(&positions)
        })?);
    }
    Ok((files, moments))
}

fn shard_headers<'a>(
    dtype: StoreDtype,
    shape: &'a [usize; 2],
    origin: &'a [usize; 1],
) -> [TensorHeader<'a>; 3] {
    let u32s = origin[0] as u64 * 4;
    let bytes = shape[0] as u64 * shape[1] as u64 * dtype.size() as u64;
    [
        TensorHeader { name: "x", dtype: dtype.safetensors_name(), shape, bytes },
        TensorHeader { name: "sequence", dtype: "U32", shape: origin, bytes: u32s },
        TensorHeader { name: "position", dtype: "U32", shape: origin, bytes: u32s },
    ]
}

/// Bytes of a shard file of `n` vectors.
pub(super) fn shard_bytes(dtype: StoreDtype, n: usize, width: usize) -> u64 {
    tensors::file_bytes(&shard_headers(dtype, &[n, width], &[n]))
}

fn moments_path(partial: &Path, bucket: usize) -> PathBuf {
    partial.join(format!("moments-{bucket:05}.safetensors"))
}

/// Keeps the moments of training bucket `bucket` until the harvest is finished. Each bucket has its own file, so that
/// finishing a bucket twice counts it once.
pub(super) fn save_moments(
    partial: &Path,
    bucket: usize,
    taps: &[(TapPoint, usize)],
    moments: &[Moments],
) -> Result<()> {
    let names: Vec<_> = taps.iter().map(|(point, _)| point.to_string()).collect();
    // Sum and mean square of a tap in one row: width + 1 values.
    let shapes: Vec<_> = moments.iter().map(|m| [m.sum.len() + 1]).collect();
    let headers = names.iter().zip(&shapes).map(|(name, shape)| TensorHeader {
        name,
        dtype: "F64",
        shape,
        bytes: shape[0] as u64 * 8,
    });
    let headers: Vec<_> = headers.collect();
    tensors::write(&moments_path(partial, bucket), &headers, |out| {
        moments
            .iter()
            .flat_map(|m| m.sum.iter().chain([&m.squares]))
            .try_for_each(|v| out.write_all(&v.to_le_bytes()))
    })?;
    Ok(())
}

/// The moments of each tap over training buckets `0..n_buckets`, added in order.
pub(super) fn total_moments(
    partial: &Path,
    n_buckets: usize,
    taps: &[(TapPoint, usize)],
) -> Result<Vec<Moments>> {
    let mut totals: Vec<_> =
        taps.iter().map(|&(_, width)| Moments { sum: vec![0.0; width], squares: 0.0 }).collect();
    for path in (0..n_buckets).map(|bucket| moments_path(partial, bucket)) {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let context =
            || format!("{} is broken; remove the unfinished store and harvest again", path.display());
        let file = SafeTensors::deserialize(&bytes).with_context(context)?;
        for (total, (point, width)) in totals.iter_mut().zip(taps) {
            let tensor = file.tensor(&point.to_string()).with_context(context)?;
            ensure!(
                tensor.data().len() == (width + 1) * 8,
                "{}: {point} has another width than {width}",
                path.display()
            );
            let mut values = tensor.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b));
            total.sum.iter_mut().zip(&mut values).for_each(|(sum, value)| *sum += value);
            total.squares += values.sum::<f64>();
        }
    }
    Ok(totals)
}
