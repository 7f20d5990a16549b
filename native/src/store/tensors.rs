//! Safetensors files written as streams, with their checksums taken on the way, so that no file is ever in memory twice.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use crc_fast::{CrcAlgorithm, Digest as Crc};
use sha2::{Digest, Sha256};

use super::manifest::FileInfo;
use crate::files;

/// One tensor of a file to write: its name, safetensors type name, shape and length in bytes.
pub(crate) struct TensorHeader<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: u64,
}

/// Writes a safetensors file atomically: the header of `tensors`, then what `data` writes, which must be
/// the tensors' bytes one after another. Returns its length and checksums.
///
/// # Errors
/// If the file cannot be written, or `data` writes another number of bytes than announced.
pub(crate) fn write(
    path: &Path,
    tensors: &[TensorHeader<'_>],
    data: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<FileInfo> {
    let (header, body) = header_bytes(tensors);
    let mut info = FileInfo { bytes: header.len() as u64 + body, sha256: String::new(), crc64: None };
    let expected = info.bytes;
    files::write_atomic(path, |out| {
        let mut checked = Checked { out, checksums: Checksums::new(), bytes: 0 };
        checked.write_all(&header)?;
        data(&mut checked)?;
        if checked.bytes != expected {
            return Err(io::Error::other(format!(
                "{} bytes were written where {expected} were announced",
                checked.bytes
            )));
        }
        let (sha256, crc64) = checked.checksums.finish();
        (info.sha256, info.crc64) = (sha256, Some(crc64));
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

/// Both checksums of a file, taken as it goes by.
pub(crate) struct Checksums {
    sha256: Sha256,
    crc64: Crc,
}

impl Checksums {
    pub(crate) fn new() -> Self {
        Self { sha256: Sha256::new(), crc64: crc() }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.crc64.update(bytes);
    }

    /// SHA-256 and CRC-64, as the manifest writes them.
    pub(crate) fn finish(self) -> (String, String) {
        let sha256 = self.sha256.finalize().iter().map(|b| format!("{b:02x}")).collect();
        (sha256, crc_text(&self.crc64))
    }
}

/// The checksum readings are checked with, over no bytes yet.
pub(crate) fn crc() -> Crc {
    Crc::new(CrcAlgorithm::Crc64Nvme)
}

/// A CRC as the manifest writes it.
pub(crate) fn crc_text(crc: &Crc) -> String {
    format!("{:016x}", crc.finalize())
}

struct Checked<'a> {
    out: &'a mut dyn Write,
    checksums: Checksums,
    bytes: u64,
}

impl Write for Checked<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buffer)?;
        self.checksums.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
