//! safetensors for model weights: a checked header that needs no data in memory, and floats of any width to f32.

use std::collections::BTreeMap;
use std::io::Read;

use half::{bf16, f16};
use serde::Deserialize;

use super::LmError;

const MAX_HEADER: u64 = 100_000_000;

/// The header of a safetensors file: where every tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsHeader {
    tensors: BTreeMap<String, StoredTensor>,
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The number format.
    pub format: FloatFormat,
    /// The first byte, from the beginning of the file.
    pub start: u64,
    /// The number of bytes.
    pub len: usize,
}

/// The number formats weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatFormat {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
}

impl FloatFormat {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F32" => Self::F32,
            "F64" => Self::F64,
            _ => return None,
        })
    }

    /// Bytes a value.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// Little-endian `bytes` as f32, as many as both `bytes` and `out` hold.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F16 => {
                out.iter_mut()
                    .zip(bytes.as_chunks().0)
                    .for_each(|(x, b)| *x = f16::from_le_bytes(*b).to_f32());
            }
            Self::Bf16 => {
                out.iter_mut()
                    .zip(bytes.as_chunks().0)
                    .for_each(|(x, b)| *x = bf16::from_le_bytes(*b).to_f32());
            }
            Self::F32 => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
            }
            Self::F64 => {
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f64::from_le_bytes(*b) as f32);
            }
        }
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl SafetensorsHeader {
    /// Parses the header at the beginning of a file of `file_len` bytes.
    ///
    /// # Errors
    /// If it is truncated or malformed, or a tensor's shape, format and place do not fit each other and the file.
    pub fn parse(mut reader: impl Read, file_len: u64) -> Result<Self, LmError> {
        let mut len = [0u8; 8];
        reader.read_exact(&mut len).map_err(|_| problem("it is shorter than 8 bytes"))?;
        let len = u64::from_le_bytes(len);
        if len > MAX_HEADER || len > file_len.saturating_sub(8) {
            return Err(problem(format!("the header claims {len} bytes, the file has {file_len}")));
        }
        let mut json = Vec::new();
        reader.take(len).read_to_end(&mut json).map_err(|e| problem(e.to_string()))?;
        let entries: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&json).map_err(|e| problem(format!("header: {e}")))?;
        let mut tensors = BTreeMap::new();
        for (name, value) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
            let entry: Entry =
                serde_json::from_value(value).map_err(|e| problem(format!("tensor {name}: {e}")))?;
            let tensor = entry.place(&name, 8 + len, file_len)?;
            tensors.insert(name, tensor);
        }
        Ok(Self { tensors })
    }

    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }
}

impl Entry {
    fn place(self, name: &str, data_start: u64, file_len: u64) -> Result<StoredTensor, LmError> {
        let Some(format) = FloatFormat::parse(&self.dtype) else {
            let found = self.dtype;
            return Err(problem(format!("tensor {name}: dtype {found}; supported are F32, F16, BF16, F64")));
        };
        let (begin, end) = self.data_offsets;
        let wanted =
            self.shape.iter().try_fold(format.size(), |n, &d| n.checked_mul(d)).map(|bytes| bytes as u64);
        let inside = end.checked_add(data_start).is_some_and(|end| end <= file_len);
        if begin > end || wanted != Some(end - begin) || !inside {
            let (shape, dtype) = (&self.shape, &self.dtype);
            return Err(problem(format!(
                "tensor {name}: {dtype} of shape {shape:?} does not fit bytes {begin}..{end} of the data"
            )));
        }
        Ok(StoredTensor { shape: self.shape, format, start: data_start + begin, len: (end - begin) as usize })
    }
}

fn problem(text: impl Into<String>) -> LmError {
    LmError::Format { format: "safetensors", problem: text.into() }
}
