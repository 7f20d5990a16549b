//! Safetensors files written and read as streams, hashed on the way, so that no file is ever in memory twice.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};

use super::manifest::FileInfo;
use crate::files;

/// The longest header taken seriously; ours are below 1 KiB.
const LONGEST_HEADER: u64 = 1 << 20;

/// One tensor of a file to write: its name, safetensors type name, shape and length in bytes.
pub(crate) struct TensorHeader<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: u64,
}

/// Writes a safetensors file atomically: the header of `tensors`, then what `data` writes, which must be
/// the tensors' bytes one after another. Returns its length and hash.
///
/// # Errors
/// If the file cannot be written, or `data` writes another number of bytes than announced.
pub(crate) fn write(
    path: &Path,
    tensors: &[TensorHeader<'_>],
    data: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<FileInfo> {
    let (header, body) = header_bytes(tensors);
    let mut info = FileInfo { bytes: header.len() as u64 + body, sha256: String::new() };
    let expected = info.bytes;
    files::write_atomic(path, |out| {
        let mut hashed = Hashed { out, hasher: Sha256::new(), bytes: 0 };
        hashed.write_all(&header)?;
        data(&mut hashed)?;
        if hashed.bytes != expected {
            return Err(io::Error::other(format!(
                "{} bytes were written where {expected} were announced",
                hashed.bytes
            )));
        }
        info.sha256 = hex(hashed.hasher);
        Ok(())
    })?;
    Ok(info)
}

/// The length of the file [`write`] makes for `tensors`.
pub(crate) fn file_bytes(tensors: &[TensorHeader<'_>]) -> u64 {
    let (header, body) = header_bytes(tensors);
    header.len() as u64 + body
}

fn header_bytes(tensors: &[TensorHeader<'_>]) -> (Vec<u8>, u64) {
    let (mut map, mut offset) = (serde_json::Map::new(), 0u64);
    for t in tensors {
        let entry = serde_json::json!({
            "dtype": t.dtype, "shape": t.shape, "data_offsets": [offset, offset + t.bytes],
        });
        offset += t.bytes;
        map.insert(t.name.to_owned(), entry);
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    // Spaces after the JSON put the data on a 64-byte boundary, for readers that map the file.
    json.resize((json.len() + 8).next_multiple_of(64) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    (header, offset)
}

struct Hashed<'a> {
    out: &'a mut dyn Write,
    hasher: Sha256,
    bytes: u64,
}

impl Write for Hashed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// A safetensors file whose length was compared with `info`, read front to back.
pub(crate) struct Reader<'a> {
    path: &'a Path,
    metadata: Metadata,
    file: BufReader<File>,
    hasher: Option<Sha256>,
    at: u64,
}

impl<'a> Reader<'a> {
    /// Opens `path` and reads its header; `verify` hashes what is read for [`Reader::finish`].
    ///
    /// # Errors
    /// If it cannot be read, has another length than `info`, or a header that is no safetensors header.
    pub(crate) fn open(path: &'a Path, info: &FileInfo, verify: bool) -> Result<Self> {
        let context = || format!("cannot read {}", path.display());
        let file = File::open(path).with_context(context)?;
        let found = file.metadata().with_context(context)?.len();
        ensure!(
            found == info.bytes,
            "{} has {found} bytes, but the manifest says {}: it is truncated or was changed",
            path.display(),
            info.bytes
        );
        let mut reader = Self {
            path,
            metadata: Metadata::new(None, Vec::new())?,
            file: BufReader::with_capacity(1 << 20, file),
            hasher: verify.then(Sha256::new),
            at: 0,
        };
        let mut length = [0u8; 8];
        reader.read(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(
            length <= LONGEST_HEADER.min(found - 8),
            "{}: header length is {length}, expected at most {} in a file of {found} bytes",
            path.display(),
            LONGEST_HEADER.min(found - 8)
        );
        let mut header = vec![0u8; usize::try_from(length)?];
        reader.read(&mut header)?;
        reader.metadata =
            serde_json::from_slice(&header).with_context(|| format!("{}: broken header", path.display()))?;
        let body = reader.metadata.data_len() as u64;
        ensure!(
            8 + length + body == found,
            "{}: its tensors need {} bytes, the file has {found}",
            path.display(),
            8 + length + body
        );
        reader.at = 0;
        Ok(reader)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact(buffer).with_context(|| format!("cannot read {}", self.path.display()))?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&*buffer);
        }
        self.at += buffer.len() as u64;
        Ok(())
    }

    /// Streams tensor `name`, which must be the next in the file, in pieces of whole values.
    ///
    /// # Errors
    /// If there is no such tensor, or its type or shape is another; names file, tensor, wanted and found.
    pub(crate) fn tensor(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        mut piece: impl FnMut(&[u8]),
    ) -> Result<()> {
        let path = self.path.display();
        let Some(info) = self.metadata.info(name).cloned() else {
            bail!("{path}: tensor `{name}` is missing");
        };
        ensure!(
            info.dtype == dtype,
            "{path}: tensor `{name}` is of type {:?}, expected {dtype:?}",
            info.dtype
        );
        ensure!(
            info.shape == shape,
            "{path}: tensor `{name}` has shape {:?}, expected {shape:?}",
            info.shape
        );
        let (start, end) = info.data_offsets;
        ensure!(
            start as u64 == self.at,
            "{path}: tensor `{name}` begins at byte {start} of the data, expected {}",
            self.at
        );
        let (mut left, mut buffer) = (end - start, vec![0u8; (1 << 18).min(end - start)]);
        while left > 0 {
            let n = buffer.len().min(left);
            self.read(&mut buffer[..n])?;
            piece(&buffer[..n]);
            left -= n;
        }
        Ok(())
    }

    /// Compares the hash of everything read, which must be the whole file, with `info`.
    ///
    /// # Errors
    /// If something is left to read, or the hash differs.
    pub(crate) fn finish(mut self, info: &FileInfo) -> Result<()> {
        let mut rest = [0u8; 1];
        let path = self.path.display();
        ensure!(self.file.read(&mut rest)? == 0, "{path}: holds more tensors than expected");
        if let Some(hasher) = self.hasher.take() {
            let found = hex(hasher);
            ensure!(
                found == info.sha256,
                "{path}: its SHA-256 is {found}, but the manifest says {}: the file is damaged or was changed",
                info.sha256
            );
        }
        Ok(())
    }
}
