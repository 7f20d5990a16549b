//! The store: activation vectors on disk, shuffled when written so that training reads straight through.
//!
//! [`manifest`] is what `manifest.json` says; `tensors` streams the files; this file opens and reads a store.
//! [`crate::harvest`] writes it. The format is described in `docs/store.md`.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use shared::config::harvest::StoreDtype;
use shared::tap::TapPoint;

pub(crate) mod describe;
pub mod manifest;
pub(crate) mod tensors;
#[cfg(test)]
mod tests;

use manifest::FileInfo;
pub use manifest::{Manifest, Split, TapInfo};
use tensors::Reader;

/// The file whose presence makes a folder a finished store.
pub const MANIFEST: &str = "manifest.json";
/// The longest manifest read.
const LONGEST_MANIFEST: u64 = 1 << 30;

/// A finished store, opened for reading. Cheap to share between threads.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    manifest: Manifest,
    /// Files whose hash was compared once in this process.
    verified: Mutex<HashSet<PathBuf>>,
}

/// The vectors of one shard at one tap: raw (unnormalised), in shuffled order, with where each came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Shard {
    /// Values of a vector.
    pub width: usize,
    /// `[n, width]`, row-major.
    pub vectors: Vec<f32>,
    /// `[n]`: the index of each vector's sequence in [`Tokens`].
    pub sequences: Vec<u32>,
    /// `[n]`: its position in that sequence.
    pub positions: Vec<u32>,
}

/// The token sequences of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// `[n_sequences, sequence_length]`, row-major.
    pub ids: Vec<u32>,
}

impl Tokens {
    /// The number of sequences.
    #[must_use]
    pub fn n_sequences(&self) -> usize {
        self.ids.len() / self.sequence_length
    }

    /// Sequence `i`. Panics when `i` is not below [`Tokens::n_sequences`], as slice indexing does.
    #[must_use]
    pub fn sequence(&self, i: usize) -> &[u32] {
        &self.ids[i * self.sequence_length..(i + 1) * self.sequence_length]
    }
}

/// Where shard `index` of `split` at `point` lies inside a store.
pub(crate) fn shard_path(folder: &Path, point: TapPoint, split: Split, index: usize) -> PathBuf {
    folder.join(split.folder()).join(point.to_string()).join(format!("shard-{index:05}.safetensors"))
}

/// Where the tokens of `split` lie.
pub(crate) fn tokens_path(folder: &Path, split: Split) -> PathBuf {
    folder.join(split.folder()).join("tokens.safetensors")
}

/// Where the mean training vector of `point` lies.
pub(crate) fn mean_path(folder: &Path, point: TapPoint) -> PathBuf {
    folder.join(Split::Train.folder()).join(point.to_string()).join("mean.safetensors")
}

/// Reads a manifest strictly and checks it against itself.
pub(crate) fn read_manifest(path: &Path) -> Result<Manifest> {
    let context = || format!("cannot read {}", path.display());
    let bytes = fs::metadata(path).with_context(context)?.len();
    ensure!(bytes <= LONGEST_MANIFEST, "{} has {bytes} bytes: that is no manifest", path.display());
    let text = fs::read(path).with_context(context)?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a store manifest", path.display()))?;
    manifest.check().with_context(|| path.display().to_string())?;
    Ok(manifest)
}

impl Store {
    /// Opens the finished store in `folder`. Checks the manifest; files are checked as they are read.
    ///
    /// # Errors
    /// If there is no finished store, or the manifest is broken; names file and field.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        if !path.exists() {
            let unfinished = folder.join(crate::harvest::PARTIAL_MANIFEST).exists();
            let hint = if unfinished {
                "its harvest was stopped before the end; run the same harvest again to finish it"
            } else {
                "there is no manifest.json"
            };
            anyhow::bail!("{} is not a finished store: {hint}", folder.display());
        }
        let manifest = read_manifest(&path)?;
        Ok(Self { folder: folder.to_owned(), manifest, verified: Mutex::default() })
    }

    /// What the store says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What the store says about the tap `point`.
    ///
    /// # Errors
    /// If the store does not hold it; lists those it holds.
    pub fn tap(&self, point: TapPoint) -> Result<&TapInfo> {
        Ok(&self.manifest.taps[self.tap_index(point)?])
    }

    fn tap_index(&self, point: TapPoint) -> Result<usize> {
        self.manifest.taps.iter().position(|t| t.point == point).with_context(|| {
            let held: Vec<_> = self.manifest.taps.iter().map(|t| t.point.to_string()).collect();
            format!("the store {} has no tap {point}; it holds {}", self.folder.display(), held.join(", "))
        })
    }

    /// The number of vectors of each tap in `split`.
    #[must_use]
    pub fn n_vectors(&self, split: Split) -> u64 {
        self.manifest.split(split).n_vectors
    }

    /// The number of shards of each tap in `split`.
    #[must_use]
    pub fn n_shards(&self, split: Split) -> usize {
        self.manifest.split(split).shards.len()
    }

    /// Reads shard `index` of `split` at `point`. The first reading of a file compares its hash with the manifest.
    ///
    /// # Errors
    /// If there is no such tap or shard, or its file is missing, truncated, damaged or of another shape.
    pub fn read_shard(&self, point: TapPoint, split: Split, index: usize) -> Result<Shard> {
        let tap = self.tap_index(point)?;
        let shards = &self.manifest.split(split).shards;
        let shard = shards.get(index).with_context(|| {
            format!(
                "{} has {} {} shards, no shard {index}",
                self.folder.display(),
                shards.len(),
                split.folder()
            )
        })?;
        let (width, dtype) = (self.manifest.taps[tap].width, self.manifest.dtype);
        let n = usize::try_from(shard.n_vectors)?;
        let path = shard_path(&self.folder, point, split, index);
        let (mut sequences, mut positions) = (Vec::new(), Vec::new());
        let mut vectors = Vec::new();
        self.read_file(&path, &shard.files[tap], |reader| {
            // The reader compared the shape with the file's length before this allocates.
            reader.tensor("x", safetensors_dtype(dtype), &[n, width], |piece| {
                extend(&mut vectors, dtype, piece);
            })?;
            reader.tensor("sequence", Dtype::U32, &[n], |piece| extend_u32(&mut sequences, piece))?;
            reader.tensor("position", Dtype::U32, &[n], |piece| extend_u32(&mut positions, piece))
        })?;
        let length = self.manifest.sequence_length;
        let n_sequences = self.manifest.split(split).n_sequences;
        ensure!(
            sequences.iter().all(|&s| u64::from(s) < n_sequences)
                && positions.iter().all(|&p| (p as usize) < length),
            "{}: a vector claims a token outside the {n_sequences} sequences of {length}",
            path.display()
        );
        Ok(Shard { width, vectors, sequences, positions })
    }

    /// Reads the token sequences of `split`.
    ///
    /// # Errors
    /// If the file is missing, truncated, damaged or of another shape.
    pub fn tokens(&self, split: Split) -> Result<Tokens> {
        let info = self.manifest.split(split);
        let length = self.manifest.sequence_length;
        read_tokens(&self.folder, split, &info.tokens, usize::try_from(info.n_sequences)?, length)
    }

    /// Reads the mean training vector of `point`, `[width]`.
    ///
    /// # Errors
    /// If the store does not hold the tap, or the file is missing, truncated, damaged or of another shape.
    pub fn mean(&self, point: TapPoint) -> Result<Vec<f32>> {
        let tap = self.tap(point)?;
        let mut mean = Vec::new();
        self.read_file(&mean_path(&self.folder, point), &tap.mean, |reader| {
            reader.tensor("mean", Dtype::F32, &[tap.width], |piece| extend(&mut mean, StoreDtype::F32, piece))
        })?;
        Ok(mean)
    }

    fn read_file(
        &self,
        path: &Path,
        info: &FileInfo,
        read: impl FnOnce(&mut Reader<'_>) -> Result<()>,
    ) -> Result<()> {
        let known = self.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(path);
        let mut reader = Reader::open(path, info, !known)?;
        read(&mut reader)?;
        reader.finish(info)?;
        if !known {
            self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned());
        }
        Ok(())
    }
}

/// Reads a tokens file and checks it against `info`.
pub(crate) fn read_tokens(
    folder: &Path,
    split: Split,
    info: &FileInfo,
    n_sequences: usize,
    sequence_length: usize,
) -> Result<Tokens> {
    let path = tokens_path(folder, split);
    let mut reader = Reader::open(&path, info, true)?;
    let mut ids = Vec::new();
    reader.tensor("ids", Dtype::U32, &[n_sequences, sequence_length], |piece| extend_u32(&mut ids, piece))?;
    reader.finish(info)?;
    Ok(Tokens { sequence_length, ids })
}

/// The safetensors type of stored vectors.
fn safetensors_dtype(dtype: StoreDtype) -> Dtype {
    match dtype {
        StoreDtype::F32 => Dtype::F32,
        StoreDtype::Bf16 => Dtype::BF16,
        StoreDtype::F16 => Dtype::F16,
    }
}

/// Appends little-endian values of type `dtype`.
pub(crate) fn extend(values: &mut Vec<f32>, dtype: StoreDtype, bytes: &[u8]) {
    match dtype {
        StoreDtype::F32 => values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        StoreDtype::Bf16 => {
            values.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
        }
        StoreDtype::F16 => values.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
    }
}

fn extend_u32(values: &mut Vec<u32>, bytes: &[u8]) {
    values.extend(bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)));
}
