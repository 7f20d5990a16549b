//! Safetensors files written and read as streams, hashed on the way, so that no file is ever in memory twice.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail, ensure};
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

/// Bytes read and hashed at a time.
const PIECE: usize = 1 << 20;

/// A hash taken on a thread of its own, so that reading and converting do not wait for it.
struct Hashing {
    pieces: SyncSender<Vec<u8>>,
    thread: JoinHandle<Sha256>,
}

impl Hashing {
    fn start() -> Self {
        let (pieces, received) = mpsc::sync_channel::<Vec<u8>>(4);
        let thread = thread::spawn(move || received.into_iter().fold(Sha256::new(), Sha256::chain_update));
        Self { pieces, thread }
    }

    fn finish(self) -> Result<String> {
        drop(self.pieces);
        self.thread.join().map(hex).map_err(|_| anyhow!("the thread that checks a file's hash failed"))
    }
}

/// A safetensors file whose length was compared with `info`, read front to back.
pub(crate) struct Reader<'a> {
    path: &'a Path,
    metadata: Metadata,
    file: File,
    hashing: Option<Hashing>,
    /// Bytes of the data read so far.
    at: usize,
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
        let metadata = Metadata::new(None, Vec::new())?;
        let mut reader = Self { path, metadata, file, hashing: verify.then(Hashing::start), at: 0 };
        let mut length = 0;
        reader.read(8, |bytes| length = bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b)))?;
        let longest = LONGEST_HEADER.min(found - 8);
        ensure!(
            length <= longest,
            "{}: header length is {length}, expected at most {longest} in a file of {found} bytes",
            path.display()
        );
        let mut header = Vec::new();
        reader.read(usize::try_from(length)?, |bytes| header.extend_from_slice(bytes))?;
        reader.metadata =
            serde_json::from_slice(&header).with_context(|| format!("{}: broken header", path.display()))?;
        let wanted = (8 + length).saturating_add(reader.metadata.data_len() as u64);
        ensure!(wanted == found, "{}: its tensors need {wanted} bytes, the file has {found}", path.display());
        Ok(reader)
    }

    /// Reads `n` bytes in pieces; all but the last are [`PIECE`] long.
    fn read(&mut self, n: usize, mut piece: impl FnMut(&[u8])) -> Result<()> {
        let (mut left, mut buffer) = (n, Vec::new());
        while left > 0 {
            buffer.resize(PIECE.min(left), 0);
            self.file
                .read_exact(&mut buffer)
                .with_context(|| format!("cannot read {}", self.path.display()))?;
            piece(&buffer);
            left -= buffer.len();
            if let Some(hashing) = &self.hashing {
                // A hashing thread that is gone is reported when it is joined.
                let _ = hashing.pieces.send(std::mem::take(&mut buffer));
            }
        }
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
        piece: impl FnMut(&[u8]),
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
            start == self.at,
            "{path}: tensor `{name}` begins at byte {start} of the data, expected {}",
            self.at
        );
        self.read(end - start, piece)?;
        self.at = end;
        Ok(())
    }

    /// Compares the hash of everything read, which must be the whole file, with `info`.
    ///
    /// # Errors
    /// If something is left to read, or the hash differs.
    pub(crate) fn finish(self, info: &FileInfo) -> Result<()> {
        let path = self.path.display();
        ensure!(self.at == self.metadata.data_len(), "{path}: holds more tensors than expected");
        if let Some(hashing) = self.hashing {
            let found = hashing.finish()?;
            ensure!(
                found == info.sha256,
                "{path}: its SHA-256 is {found}, but the manifest says {}: the file is damaged or was changed",
                info.sha256
            );
        }
        Ok(())
    }
}
