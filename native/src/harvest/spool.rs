//! The spool: vectors of the bucket in the making, in the order the model gives them, one file a tap.
//!
//! It keeps memory small whatever the number of taps, and keeps the model's work when a harvest is stopped: a record
//! says how many sequences are safely in it, and a resumed harvest goes on from there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::config::harvest::StoreDtype;
use shared::tap::TapPoint;

use crate::files;
use crate::store::Split;

/// How often progress is synced to disk and recorded: what a crash of the machine can cost.
const RECORD_EVERY: Duration = Duration::from_secs(5);

/// How far the bucket in the making is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    split: Split,
    bucket: usize,
    sequences: usize,
}

/// A tap's vectors in the spool.
struct Column {
    path: PathBuf,
    file: File,
    row_bytes: usize,
}

/// The spool of one bucket, open for writing.
pub(super) struct Spool {
    folder: PathBuf,
    columns: Vec<Column>,
    record: Record,
    recorded: Instant,
    buffer: Vec<u8>,
}

/// Where the vectors of `point` wait inside the folder of unfinished work.
pub(super) fn path(folder: &Path, point: TapPoint) -> PathBuf {
    folder.join(format!("{point}.spool"))
}

impl Spool {
    /// Opens the spool of bucket `bucket` of `split` in `folder`, keeping what a stopped harvest left of it.
    /// `vectors_of(n)` is the number of vectors the bucket's first `n` sequences give.
    pub(super) fn open(
        folder: &Path,
        taps: &[(TapPoint, usize)],
        dtype: StoreDtype,
        (split, bucket): (Split, usize),
        vectors_of: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let mut sequences =
            match fs::read(folder.join("record.json")).ok().map(|b| serde_json::from_slice(&b)) {
                Some(Ok(Record { split: s, bucket: b, sequences })) if (s, b) == (split, bucket) => sequences,
                _ => 0,
            };
        let mut columns = Vec::new();
        for &(point, width) in taps {
            let path = path(folder, point);
            let context = || format!("cannot open {}", path.display());
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .with_context(context)?;
            let (row_bytes, length) = (width * dtype.size(), file.metadata().with_context(context)?.len());
            if length < (vectors_of(sequences) * row_bytes) as u64 {
                sequences = 0;
            }
            columns.push(Column { path, file, row_bytes });
        }
        let n_vectors = vectors_of(sequences);
        for column in &mut columns {
            let context = || format!("cannot write {}", column.path.display());
            let length = (n_vectors * column.row_bytes) as u64;
            column.file.set_len(length).with_context(context)?;
            column.file.seek(SeekFrom::Start(length)).with_context(context)?;
        }
        let record = Record { split, bucket, sequences };
        Ok(Self { folder: folder.to_owned(), columns, record, recorded: Instant::now(), buffer: Vec::new() })
    }

    /// How many of the bucket's sequences are in the spool.
    pub(super) fn n_sequences(&self) -> usize {
        self.record.sequences
    }

    /// Appends the rows of `value` that `rows` names (ascending) to the vectors of tap `tap`.
    ///
    /// # Errors
    /// If a value is not finite, in the model's output or after rounding to `dtype`, or the disk is full.
    pub(super) fn append(
        &mut self,
        tap: usize,
        value: Rows<'_>,
        rows: &[usize],
        dtype: StoreDtype,
    ) -> Result<()> {
        self.buffer.clear();
        encode(value, rows, dtype, &mut self.buffer)?;
        let column = &mut self.columns[tap];
        column.file.write_all(&self.buffer).with_context(|| format!("cannot write {}", column.path.display()))
    }

    /// Says that the next `n` sequences are complete in every tap; recorded on disk from time to time.
    pub(super) fn advance(&mut self, n: usize) -> Result<()> {
        self.record.sequences += n;
        if self.recorded.elapsed() >= RECORD_EVERY { self.save() } else { Ok(()) }
    }

    /// Makes everything up to here survive a crash.
    pub(super) fn save(&mut self) -> Result<()> {
        for column in &self.columns {
            column.file.sync_data().with_context(|| format!("cannot write {}", column.path.display()))?;
        }
        files::write_bytes(
            &self.folder.join("record.json"),
            serde_json::to_string(&self.record)?.as_bytes(),
        )?;
        self.recorded = Instant::now();
        Ok(())
    }
}

/// Removes the vectors of a finished bucket.
pub(super) fn clear(folder: &Path, taps: &[(TapPoint, usize)]) -> Result<()> {
    for path in taps.iter().map(|&(point, _)| path(folder, point)).chain([folder.join("record.json")]) {
        if path.exists() {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Appends the rows of `value` that `rows` names as values of `dtype`, rounded to the nearest, ties to even.
///
/// # Errors
/// If a value is not finite, in the model's output or after rounding to `dtype`; says which and what to do.
pub(super) fn encode(value: Rows<'_>, rows: &[usize], dtype: StoreDtype, bytes: &mut Vec<u8>) -> Result<()> {
    for &row in rows {
        let values = value.row(row);
        if let Some((at, value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            bail!(
                "the model gave {value} as value {at} of row {row} of the batch, which is not a finite number"
            );
        }
        let fits = match dtype {
            StoreDtype::F32 => {
                bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                None
            }
            StoreDtype::Bf16 => {
                bytes.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()));
                values.iter().find(|v| !bf16::from_f32(**v).is_finite())
            }
            StoreDtype::F16 => {
                bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
                values.iter().find(|v| !f16::from_f32(**v).is_finite())
            }
        };
        if let Some(large) = fits {
            let (name, most) = match dtype {
                StoreDtype::F16 => ("f16", "65504"),
                StoreDtype::F32 | StoreDtype::Bf16 => ("bf16", "3.39e38"),
            };
            let advice = if dtype == StoreDtype::F16 { "bf16 or f32" } else { "f32" };
            bail!(
                "the model gave {large} at row {row} of the batch, and {name} holds at most {most}: set dtype to \
                 {advice} (massive activations at a few positions are usual; drop_positions leaves them out)"
            );
        }
    }
    Ok(())
}

/// Reads rows `wanted` of a spool file into `rows`, in the order wanted. The file is read front to back.
pub(super) fn gather(path: &Path, row_bytes: usize, wanted: &[u32], rows: &mut Vec<u8>) -> io::Result<()> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()));
    let mut file = File::open(path).map_err(named)?;
    let mut places: Vec<(u32, usize)> = wanted.iter().copied().zip(0..).collect();
    places.sort_unstable();
    rows.resize(wanted.len() * row_bytes, 0);
    let mut at = None;
    for (row, place) in places {
        if at != Some(row) {
            file.seek(SeekFrom::Start(u64::from(row) * row_bytes as u64)).map_err(named)?;
        }
        file.read_exact(&mut rows[place * row_bytes..(place + 1) * row_bytes]).map_err(named)?;
        at = row.checked_add(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::tap::Site;

    const TAP: TapPoint = TapPoint { site: Site::Resid, layer: 0 };

    fn open(folder: &Path, bucket: usize) -> Spool {
        Spool::open(folder, &[(TAP, 2)], StoreDtype::F32, (Split::Train, bucket), |n| n).unwrap()
    }

    #[test]
    fn what_was_recorded_is_kept_and_what_was_not_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let data = [1.0, 2.0, 3.0, 4.0];
        let rows = Rows::new(&data, 2).unwrap();
        let mut spool = open(folder.path(), 3);
        spool.append(0, rows, &[0, 1], StoreDtype::F32).unwrap();
        spool.advance(2).unwrap();
        spool.save().unwrap();
        spool.append(0, rows, &[0], StoreDtype::F32).unwrap();
        drop(spool);
        assert_eq!(open(folder.path(), 3).n_sequences(), 2);
        assert_eq!(fs::metadata(path(folder.path(), TAP)).unwrap().len(), 16);
        let mut gathered = Vec::new();
        gather(&path(folder.path(), TAP), 8, &[1, 0], &mut gathered).unwrap();
        let expected: Vec<u8> = [3.0f32, 4.0, 1.0, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(gathered, expected);
        // A shorter file than recorded, and the record of another bucket, both mean starting again.
        File::options().write(true).open(path(folder.path(), TAP)).unwrap().set_len(9).unwrap();
        assert_eq!(open(folder.path(), 3).n_sequences(), 0);
        assert_eq!(open(folder.path(), 4).n_sequences(), 0);
    }

    #[test]
    fn values_that_cannot_be_stored_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = open(folder.path(), 0);
        let nan = [0.0, f32::NAN];
        assert!(spool.append(0, Rows::new(&nan, 2).unwrap(), &[0], StoreDtype::F32).is_err());
        let large = [0.0, 70_000.0];
        let large = Rows::new(&large, 2).unwrap();
        let error = spool.append(0, large, &[0], StoreDtype::F16).unwrap_err().to_string();
        assert!(
            error.contains("gave 70000") && error.contains("65504") && error.contains("bf16 or f32"),
            "{error}"
        );
        spool.append(0, large, &[0], StoreDtype::Bf16).unwrap();
        // Rows that are not stored may hold anything.
        let mixed = [f32::INFINITY, 0.0, 1.0, 2.0];
        spool.append(0, Rows::new(&mixed, 2).unwrap(), &[1], StoreDtype::F32).unwrap();
    }
}
