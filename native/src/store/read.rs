//! Safetensors files read fast: several threads, each a stretch of the file, straight into where the values are wanted,
//! checked on the way.
//!
//! Each byte is read once, its checksum taken while it is in the processor's cache, and converted. CRC-64 can be taken of
//! stretches and put together, which SHA-256 cannot, and costs a tenth of the copying; so every reading is checked.

use std::io::Read;
use std::num::NonZero;
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use crc_fast::Digest as Crc;
use half::slice::HalfFloatSliceExt;
use safetensors::tensor::{Dtype, Metadata};
use shared::config::harvest::StoreDtype;

use super::manifest::FileInfo;
use super::place::Blob;
use super::tensors::{Checksums, crc, crc_text};

/// The longest header taken seriously; ours are below 1 KiB.
const LONGEST_HEADER: u64 = 1 << 20;
/// Bytes read, checked and converted at a time: they stay in the cache meanwhile.
const PIECE: usize = 256 << 10;
/// A thread is started for this many bytes of a file.
const STRETCH: u64 = 8 << 20;
/// The most threads for a file on disk: more do not make memory faster.
const THREADS: u64 = 8;
/// The most requests for an object at the same time.
const REQUESTS: u64 = 8;

/// Where the values of a tensor go.
pub(crate) enum Into<'a> {
    /// Stored as the type, wanted as `f32`.
    F32(StoreDtype, &'a mut Vec<f32>),
    /// Stored as the type, wanted as it is stored: as many bytes.
    Raw(StoreDtype, &'a mut [u8]),
    /// Integers.
    U32(&'a mut Vec<u32>),
}

/// A tensor that a file must have, and where its values go.
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) into: Into<'a>,
}

impl Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.into {
            Into::F32(StoreDtype::F32, _) | Into::Raw(StoreDtype::F32, _) => Dtype::F32,
            Into::F32(StoreDtype::Bf16, _) | Into::Raw(StoreDtype::Bf16, _) => Dtype::BF16,
            Into::F32(StoreDtype::F16, _) | Into::Raw(StoreDtype::F16, _) => Dtype::F16,
            Into::U32(_) => Dtype::U32,
        }
    }
}

/// Reads the file `blob`, which is `info`, with exactly the tensors `wanted`, in any order.
///
/// # Errors
/// If its length or checksum is another, it is no safetensors file, or its tensors are others; names the file and what
/// was wanted and found. What is in `wanted` is then unspecified.
pub(crate) fn tensors(blob: &Blob, info: &FileInfo, mut wanted: Vec<Tensor<'_>>) -> Result<()> {
    let name = blob.show();
    ensure!(
        blob.bytes == info.bytes,
        "{name} has {} bytes, but the manifest says {}: it is truncated or was changed",
        blob.bytes,
        info.bytes
    );
    let (head, metadata) = header(blob)?;
    for tensor in &wanted {
        check(&name, &metadata, tensor)?;
    }
    ensure!(metadata.tensors().len() == wanted.len(), "{name}: holds more tensors than expected");
    // In the order of the file; the header was checked to leave no gap between tensors.
    wanted.sort_by_key(|tensor| metadata.info(tensor.name).map(|info| info.data_offsets));
    let mut at = head.len() as u64;
    let mut pieces = Vec::new();
    for tensor in wanted {
        let n = tensor.shape.iter().product();
        match tensor.into {
            Into::F32(dtype, values) => {
                make_room(values, n);
                let size = dtype.size();
                for values in values.chunks_mut(PIECE / size) {
                    let start = at;
                    at += (values.len() * size) as u64;
                    pieces.push(Piece { start, values: Values::F32(dtype, values) });
                }
            }
            Into::Raw(dtype, values) => {
                let bytes = n * dtype.size();
                ensure!(values.len() == bytes, "{name}: room for {} bytes of {bytes}", values.len());
                for values in values.chunks_mut(PIECE) {
                    let start = at;
                    at += values.len() as u64;
                    pieces.push(Piece { start, values: Values::Raw(values) });
                }
            }
            Into::U32(values) => {
                make_room(values, n);
                for values in values.chunks_mut(PIECE / size_of::<u32>()) {
                    let start = at;
                    at += size_of_val(values) as u64;
                    pieces.push(Piece { start, values: Values::U32(values) });
                }
            }
        }
    }
    let mut found = crc();
    found.update(&head);
    for part in stretches(blob, &mut pieces)? {
        found.combine(&part);
    }
    let Some(expected) = &info.crc64 else { return Ok(()) };
    let found = crc_text(&found);
    ensure!(
        found == *expected,
        "{name}: its checksum (CRC-64) is {found}, but the manifest says {expected}: the file is damaged or was changed"
    );
    Ok(())
}

/// Makes `values` `n` long. New memory is asked for zeroed, which costs nothing until it is written.
fn make_room<T: Copy + Default>(values: &mut Vec<T>, n: usize) {
    if values.capacity() < n {
        *values = vec![T::default(); n];
    } else {
        values.resize(n, T::default());
    }
}

/// The bytes before the data, and what they say; the data fill the rest of the file without gaps.
fn header(blob: &Blob) -> Result<(Vec<u8>, Metadata)> {
    let name = blob.show();
    let context = || format!("cannot read {name}");
    let mut head = Vec::new();
    blob.part(0, blob.bytes.min(4096))?.read_to_end(&mut head).with_context(context)?;
    let length = head.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let longest = LONGEST_HEADER.min(blob.bytes.saturating_sub(8));
    ensure!(
        (1..=longest).contains(&length),
        "{name}: header length is {length}, expected 1 to {longest} in a file of {} bytes",
        blob.bytes
    );
    let begin = 8 + length;
    if (head.len() as u64) < begin {
        blob.part(head.len() as u64, begin)?.read_to_end(&mut head).with_context(context)?;
    }
    head.truncate(usize::try_from(begin)?);
    ensure!(head.len() as u64 == begin, "{name} became shorter while it was read");
    let metadata: Metadata =
        serde_json::from_slice(&head[8..]).with_context(|| format!("{name}: broken header"))?;
    let wanted = begin.saturating_add(metadata.data_len() as u64);
    ensure!(wanted == blob.bytes, "{name}: its tensors need {wanted} bytes, the file has {}", blob.bytes);
    Ok((head, metadata))
}

fn check(file: &str, metadata: &Metadata, tensor: &Tensor<'_>) -> Result<()> {
    let (name, dtype) = (tensor.name, tensor.dtype());
    let Some(info) = metadata.info(name) else {
        bail!("{file}: tensor `{name}` is missing");
    };
    ensure!(info.dtype == dtype, "{file}: tensor `{name}` is of type {:?}, expected {dtype:?}", info.dtype);
    ensure!(
        info.shape == tensor.shape,
        "{file}: tensor `{name}` has shape {:?}, expected {:?}",
        info.shape,
        tensor.shape
    );
    Ok(())
}

/// Where bytes of a piece go.
enum Values<'a> {
    F32(StoreDtype, &'a mut [f32]),
    Raw(&'a mut [u8]),
    U32(&'a mut [u32]),
}

/// At most [`PIECE`] bytes of a file.
struct Piece<'a> {
    start: u64,
    values: Values<'a>,
}

impl Piece<'_> {
    fn end(&self) -> u64 {
        self.start
            + match &self.values {
                Values::F32(dtype, values) => values.len() * dtype.size(),
                Values::Raw(values) => values.len(),
                Values::U32(values) => size_of_val(*values),
            } as u64
    }

    /// Reads the piece; `buffer` is scratch.
    fn fill(&mut self, from: &mut dyn Read, crc: &mut Crc, buffer: &mut Vec<u8>) -> std::io::Result<()> {
        match &mut self.values {
            Values::F32(StoreDtype::F32, values) => {
                from.read_exact(bytemuck::cast_slice_mut(values))?;
                crc.update(bytemuck::cast_slice(values));
                for value in values.iter_mut() {
                    *value = f32::from_bits(u32::from_le(value.to_bits()));
                }
            }
            Values::Raw(values) => {
                from.read_exact(values)?;
                crc.update(values);
            }
            Values::U32(values) => {
                from.read_exact(bytemuck::cast_slice_mut(values))?;
                crc.update(bytemuck::cast_slice(values));
                for value in values.iter_mut() {
                    *value = u32::from_le(*value);
                }
            }
            Values::F32(dtype, values) => {
                buffer.resize(values.len() * dtype.size(), 0);
                from.read_exact(buffer)?;
                crc.update(buffer);
                decode(*dtype, buffer, values);
            }
        }
        Ok(())
    }
}

/// Values of type `dtype` as `f32`; both slices hold the same number.
pub(crate) fn decode(dtype: StoreDtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        StoreDtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        StoreDtype::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        StoreDtype::F16 => {
            let mut halves = [half::f16::ZERO; 512];
            for (values, bytes) in values.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..values.len()];
                for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                    *half = half::f16::from_le_bytes(*bytes);
                }
                halves.convert_to_f32_slice(values);
            }
        }
    }
}

/// Fills `pieces`, which follow one another, on several threads; the checksum of each stretch, in order.
fn stretches(blob: &Blob, pieces: &mut [Piece<'_>]) -> Result<Vec<Crc>> {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return Ok(Vec::new()) };
    let cores = thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let most = if blob.is_remote() { REQUESTS } else { THREADS.min(cores) };
    let n = (last.end() - first.start).div_ceil(STRETCH).clamp(1, most);
    let each = pieces.len().div_ceil(usize::try_from(n)?);
    if n == 1 {
        return Ok(vec![stretch(blob, pieces)?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> =
            pieces.chunks_mut(each).map(|pieces| scope.spawn(|| stretch(blob, pieces))).collect();
        let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined.map(|crc| crc.map_err(|_| anyhow!("a thread reading {} failed", blob.show()))?).collect()
    })
}

fn stretch(blob: &Blob, pieces: &mut [Piece<'_>]) -> Result<Crc> {
    let mut crc = crc();
    if let (Some(first), Some(last)) = (pieces.first(), pieces.last()) {
        let (mut from, mut buffer) = (blob.part(first.start, last.end())?, Vec::new());
        for piece in pieces {
            let read = piece.fill(&mut *from, &mut crc, &mut buffer);
            read.with_context(|| format!("cannot read {}", blob.show()))?;
        }
    }
    Ok(crc)
}

/// Reads the whole of `blob` and compares its length and both checksums with `info`; one thread.
///
/// # Errors
/// If it cannot be read, or is another file.
pub(crate) fn verify(blob: &Blob, info: &FileInfo) -> Result<()> {
    let (name, mut checksums, mut buffer, mut bytes) = (blob.show(), Checksums::new(), vec![0; 1 << 20], 0);
    let mut from = blob.part(0, blob.bytes)?;
    loop {
        let n = from.read(&mut buffer).with_context(|| format!("cannot read {name}"))?;
        if n == 0 {
            break;
        }
        checksums.update(&buffer[..n]);
        bytes += n as u64;
    }
    ensure!(bytes == info.bytes, "{name} has {bytes} bytes, but the manifest says {}", info.bytes);
    let (sha256, crc64) = checksums.finish();
    ensure!(
        sha256 == info.sha256,
        "{name}: its SHA-256 is {sha256}, but the manifest says {}: the file is damaged or was changed",
        info.sha256
    );
    ensure!(
        info.crc64.as_ref().is_none_or(|expected| *expected == crc64),
        "{name}: its CRC-64 is {crc64}, but the manifest says otherwise although its SHA-256 agrees: the manifest was changed"
    );
    Ok(())
}
