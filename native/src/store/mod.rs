//! The store: activation vectors on disk, shuffled when written so that training reads straight through.
//!
//! [`manifest`] is what `manifest.json` says; [`place`] is where a store lies and `bucket` the object stores it may lie in;
//! `tensors` writes the files and `read` reads them; this file opens and reads a store. [`crate::harvest`] writes it. The format is described in `docs/store.md`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use shared::config::harvest::StoreDtype;
use shared::tap::TapPoint;

pub mod bucket;
pub(crate) mod describe;
pub mod manifest;
pub mod place;
mod read;
pub(crate) mod tensors;
#[cfg(test)]
mod tests;

use manifest::{FileInfo, ShardInfo};
pub use manifest::{Manifest, Split, TapInfo};
pub use place::Place;
pub(crate) use read::decode;
use read::{Into, Tensor};

/// The file whose presence makes a folder a finished store.
pub const MANIFEST: &str = "manifest.json";
/// The longest manifest read.
const LONGEST_MANIFEST: u64 = 1 << 30;

/// A finished store, opened for reading. Cheap to share between threads.
#[derive(Debug)]
pub struct Store {
    place: Place,
    manifest: Manifest,
    manifest_sha256: String,
    /// Files without a CRC-64 whose SHA-256 was compared once in this process.
    verified: Mutex<HashSet<String>>,
}

/// The vectors of one shard at one tap: raw (unnormalised), in shuffled order, with where each came from.
#[derive(Debug, Clone, Default, PartialEq)]
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

/// The name of shard `index` of `split` at `point` in a store.
pub(crate) fn shard_name(point: TapPoint, split: Split, index: usize) -> String {
    format!("{}/{point}/shard-{index:05}.safetensors", split.folder())
}

/// The name of the file of the tokens of `split`.
pub(crate) fn tokens_name(split: Split) -> String {
    format!("{}/tokens.safetensors", split.folder())
}

/// The name of the file of the mean training vector of `point`.
pub(crate) fn mean_name(point: TapPoint) -> String {
    format!("{}/{point}/mean.safetensors", Split::Train.folder())
}

/// Where shard `index` of `split` at `point` lies in a folder.
pub(crate) fn shard_path(folder: &Path, point: TapPoint, split: Split, index: usize) -> PathBuf {
    folder.join(shard_name(point, split, index))
}

/// Where the tokens of `split` lie.
pub(crate) fn tokens_path(folder: &Path, split: Split) -> PathBuf {
    folder.join(tokens_name(split))
}

/// Where the mean training vector of `point` lies.
pub(crate) fn mean_path(folder: &Path, point: TapPoint) -> PathBuf {
    folder.join(mean_name(point))
}

impl Store {
    /// Opens the finished store at `path`: a folder, or a URL as [`Place::of`] reads it. Checks the manifest; files are
    /// checked as they are read.
    ///
    /// # Errors
    /// If there is no finished store, or the manifest is broken; names file and field.
    pub fn open(path: &Path) -> Result<Self> {
        Self::at(Place::of(path)?)
    }

    /// [`Store::open`] for a place that is known.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn at(place: Place) -> Result<Self> {
        if !place.holds(MANIFEST)? {
            let hint = match &place {
                Place::Folder(folder) if folder.join(crate::harvest::PARTIAL_MANIFEST).exists() => {
                    "its harvest was stopped before the end; run the same harvest again to finish it"
                }
                Place::Folder(_) => "there is no manifest.json",
                Place::Bucket(_) => "there is no manifest.json, which a harvest writes last",
            };
            anyhow::bail!("{} is not a finished store: {hint}", place.show(""));
        }
        let (name, bytes) = (place.show(MANIFEST), place.read(MANIFEST, LONGEST_MANIFEST)?);
        let manifest: Manifest =
            serde_json::from_slice(&bytes).with_context(|| format!("{name} is not a store manifest"))?;
        manifest.check().with_context(|| name)?;
        let manifest_sha256 = crate::files::sha256(&bytes);
        Ok(Self { place, manifest, manifest_sha256, verified: Mutex::default() })
    }

    /// Where the store lies.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// SHA-256 of the manifest's bytes: with the checksums in it, it identifies everything in the store.
    #[must_use]
    pub fn manifest_sha256(&self) -> &str {
        &self.manifest_sha256
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
            format!("the store {} has no tap {point}; it holds {}", self.place.show(""), held.join(", "))
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

    /// Reads shard `index` of `split` at `point`, comparing its checksum with the manifest.
    ///
    /// # Errors
    /// If there is no such tap or shard, or its file is missing, truncated, damaged or of another shape.
    pub fn read_shard(&self, point: TapPoint, split: Split, index: usize) -> Result<Shard> {
        let mut shard = Shard::default();
        self.read_shard_into(point, split, index, &mut shard)?;
        Ok(shard)
    }

    /// [`Store::read_shard`] into the memory of a shard that is no longer needed, which saves much of the time when
    /// many are read one after another. After an error `into` holds nothing that can be used.
    ///
    /// # Errors
    /// As [`Store::read_shard`].
    pub fn read_shard_into(
        &self,
        point: TapPoint,
        split: Split,
        index: usize,
        into: &mut Shard,
    ) -> Result<()> {
        let Shard { vectors, width, sequences, positions } = into;
        let values = Into::F32(self.manifest.dtype, vectors);
        *width = self.read_rows(point, split, index, values, sequences, positions)?;
        Ok(())
    }

    /// Bytes of the vectors of shard `index` of `split` at `point`, as they are stored.
    ///
    /// # Errors
    /// If there is no such tap or shard.
    pub fn raw_bytes(&self, point: TapPoint, split: Split, index: usize) -> Result<usize> {
        let (tap, shard) = (self.tap(point)?, self.shard(split, index)?);
        let values = usize::try_from(shard.n_vectors)?.checked_mul(tap.width);
        values.and_then(|n| n.checked_mul(self.manifest.dtype.size())).context("a shard overflows")
    }

    /// The vectors of shard `index` of `split` at `point` as they are stored, little-endian values of the manifest's type, into
    /// `into`, which has [`Store::raw_bytes`]. Checked as [`Store::read_shard`] checks them.
    ///
    /// # Errors
    /// As [`Store::read_shard`].
    pub fn read_raw(&self, point: TapPoint, split: Split, index: usize, into: &mut [u8]) -> Result<()> {
        let (mut sequences, mut positions) = (Vec::new(), Vec::new());
        let values = Into::Raw(self.manifest.dtype, into);
        self.read_rows(point, split, index, values, &mut sequences, &mut positions)?;
        Ok(())
    }

    fn shard(&self, split: Split, index: usize) -> Result<&ShardInfo> {
        let shards = &self.manifest.split(split).shards;
        shards.get(index).with_context(|| {
            format!(
                "{} has {} {} shards, no shard {index}",
                self.place.show(""),
                shards.len(),
                split.folder()
            )
        })
    }

    /// Reads a shard file, its values into `values`; returns their width.
    fn read_rows(
        &self,
        point: TapPoint,
        split: Split,
        index: usize,
        values: Into<'_>,
        sequences: &mut Vec<u32>,
        positions: &mut Vec<u32>,
    ) -> Result<usize> {
        let (tap, shard) = (self.tap_index(point)?, self.shard(split, index)?);
        let width = self.manifest.taps[tap].width;
        let n = usize::try_from(shard.n_vectors)?;
        let name = shard_name(point, split, index);
        self.read_file(
            &name,
            &shard.files[tap],
            vec![
                Tensor { name: "x", shape: &[n, width], into: values },
                Tensor { name: "sequence", shape: &[n], into: Into::U32(sequences) },
                Tensor { name: "position", shape: &[n], into: Into::U32(positions) },
            ],
        )?;
        let length = self.manifest.sequence_length;
        let n_sequences = self.manifest.split(split).n_sequences;
        ensure!(
            sequences.iter().all(|&s| u64::from(s) < n_sequences)
                && positions.iter().all(|&p| (p as usize) < length),
            "{}: a vector claims a token outside the {n_sequences} sequences of {length}",
            self.place.show(&name)
        );
        Ok(width)
    }

    /// Reads the token sequences of `split`.
    ///
    /// # Errors
    /// If the file is missing, truncated, damaged or of another shape.
    pub fn tokens(&self, split: Split) -> Result<Tokens> {
        let info = self.manifest.split(split);
        let (sequence_length, mut ids) = (self.manifest.sequence_length, Vec::new());
        let shape = [usize::try_from(info.n_sequences)?, sequence_length];
        let wanted = Tensor { name: "ids", shape: &shape, into: Into::U32(&mut ids) };
        self.read_file(&tokens_name(split), &info.tokens, vec![wanted])?;
        Ok(Tokens { sequence_length, ids })
    }

    /// Reads the mean training vector of `point`, `[width]`.
    ///
    /// # Errors
    /// If the store does not hold the tap, or the file is missing, truncated, damaged or of another shape.
    pub fn mean(&self, point: TapPoint) -> Result<Vec<f32>> {
        let (tap, mut mean) = (self.tap(point)?, Vec::new());
        let into = Into::F32(StoreDtype::F32, &mut mean);
        self.read_file(
            &mean_name(point),
            &tap.mean,
            vec![Tensor { name: "mean", shape: &[tap.width], into }],
        )?;
        Ok(mean)
    }

    /// Reads every file and compares its SHA-256 and CRC-64; `done` is told the bytes of each file as it is finished.
    ///
    /// # Errors
    /// Names the first file found that is missing, truncated or damaged.
    pub fn verify(&self, done: impl Fn(u64) + Sync) -> Result<()> {
        self.manifest.files().par_iter().try_for_each(|(name, info)| {
            read::verify(&self.place.open(name)?, info)?;
            done(info.bytes);
            Ok(())
        })
    }

    fn read_file(&self, name: &str, info: &FileInfo, wanted: Vec<Tensor<'_>>) -> Result<()> {
        let blob = self.place.open(name)?;
        if info.crc64.is_none()
            && !self.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
        {
            read::verify(&blob, info)?;
            self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        }
        read::tensors(&blob, info, wanted)
    }
}

/// Reads a tokens file in a folder and checks it against `info`.
pub(crate) fn read_tokens(
    folder: &Path,
    split: Split,
    info: &FileInfo,
    n_sequences: usize,
    sequence_length: usize,
) -> Result<Tokens> {
    let mut ids = Vec::new();
    let (place, shape) = (Place::Folder(folder.to_owned()), [n_sequences, sequence_length]);
    let wanted = Tensor { name: "ids", shape: &shape, into: Into::U32(&mut ids) };
    read::tensors(&place.open(&tokens_name(split))?, info, vec![wanted])?;
    Ok(Tokens { sequence_length, ids })
}
