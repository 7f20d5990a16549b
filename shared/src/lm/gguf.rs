//! GGUF files: a checked parser of the header, and tensor data to f32. Nothing in a header is believed before it is
//! checked against the length of the file, and nothing larger than the file is ever allocated.

use std::collections::BTreeMap;
use std::io::Read;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};

use super::safetensors::FloatFormat;
use super::weights::Blueprint;
use super::{LmError, TensorSource, gemma2, gemma3, llama};

const MAX_HEADER: u64 = 1 << 28;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
const MAX_ARRAY: u64 = 1 << 24;
const MAX_DIMENSIONS: u32 = 4;

/// The header of a GGUF file (versions 2 and 3, little-endian).
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any integer type.
    Integer(i64),
    /// Any float type.
    Float(f64),
    /// A truth value.
    Flag(bool),
    /// Text.
    Text(String),
    /// An array of integers.
    Integers(Vec<i64>),
    /// An array of floats.
    Floats(Vec<f32>),
    /// An array of truth values.
    Flags(Vec<bool>),
    /// An array of texts.
    Texts(Vec<String>),
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Row-major shape (the reverse of the file's own order).
    pub shape: Vec<usize>,
    /// The number format.
    pub kind: GgmlDType,
    /// The first byte, from the beginning of the file.
    pub start: u64,
    /// The number of bytes.
    pub len: usize,
}

impl Gguf {
    /// Parses the header at the beginning of a file of `file_len` bytes.
    ///
    /// # Errors
    /// If it is not a GGUF file, is truncated, or claims sizes it cannot have.
    pub fn parse(reader: impl Read, file_len: u64) -> Result<Self, LmError> {
        let mut r = Header { reader, position: 0, end: file_len.min(MAX_HEADER) };
        if r.bytes(4, "magic")? != b"GGUF" {
            return Err(problem("it does not begin with the letters GGUF"));
        }
        let version = r.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(problem(format!("version {version}; supported are 2 and 3")));
        }
        let n_tensors = r.bounded("number of tensors", MAX_TENSORS)?;
        let n_keys = r.bounded("number of metadata keys", MAX_KEYS)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let key = r.text("metadata key")?;
            let value = r.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(problem(format!("metadata key {key} occurs twice")));
            }
            metadata.insert(key, value);
        }
        let infos = (0..n_tensors).map(|_| r.tensor_info()).collect::<Result<Vec<_>, _>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(GgufValue::Integer(n)) if (1..=1 << 20).contains(n) && (*n as u64).is_power_of_two() => {
                *n as u64
            }
            Some(other) => {
                return Err(problem(format!("general.alignment is {other:?}, expected a power of two")));
            }
        };
        let data_start = r.position.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, info) in infos {
            let tensor = info.place(&name, data_start, alignment, file_len)?;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(problem(format!("tensor {name} occurs twice")));
            }
        }
        Ok(Self { metadata, tensors })
    }

    /// All metadata.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// The model this file holds.
    ///
    /// # Errors
    /// If its architecture is not supported or a key is missing, malformed or unsupported.
    pub fn blueprint(&self, source: &mut dyn TensorSource) -> Result<Blueprint, LmError> {
        match self.text("general.architecture") {
            Some("llama") => llama::from_gguf(self, source),
            Some("gemma2") => gemma2::from_gguf(self, source),
            Some("gemma3") => gemma3::from_gguf(self, source),
            Some(other) => Err(LmError::config(
                "general.architecture",
                format!("`{other}`; supported in GGUF files are llama, gemma2 and gemma3"),
            )),
            None => Err(LmError::config("general.architecture", "missing")),
        }
    }

    /// Text under `key`, if there is any.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(GgufValue::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A positive finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, LmError> {
        let value = match self.metadata.get(key) {
            None => return Ok(None),
            Some(GgufValue::Float(x)) => *x,
            Some(GgufValue::Integer(n)) => *n as f64,
            Some(_) => return Err(LmError::config(key, "expected a number")),
        };
        if value.is_finite() && value > 0.0 {
            Ok(Some(value))
        } else {
            Err(LmError::config(key, format!("{value}, expected a positive number")))
        }
    }

    /// A positive whole number up to 2²⁴.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>, LmError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Integer(n @ 1..=0x100_0000)) => Ok(Some(*n as usize)),
            Some(GgufValue::Integer(n)) => {
                Err(LmError::config(key, format!("{n}, expected a whole number from 1 to 16777216")))
            }
            Some(_) => Err(LmError::config(key, "expected a whole number")),
        }
    }

    /// A positive whole number that must be there.
    pub(super) fn count(&self, key: &str) -> Result<usize, LmError> {
        self.optional_count(key)?.ok_or_else(|| LmError::config(key, "missing"))
    }

    /// The number of token ids: under `key`, else the height of the embedding.
    pub(super) fn vocab_size(&self, key: &str, source: &dyn TensorSource) -> Result<usize, LmError> {
        match (self.optional_count(key)?, source.shape("token_embd.weight")) {
            (Some(n), _) => Ok(n),
            (None, Some(shape)) => Ok(shape.first().copied().unwrap_or(0)),
            (None, None) => self.count(key),
        }
    }

    /// The number of layers.
    pub(super) fn layers(&self, key: &str) -> Result<usize, LmError> {
        match self.count(key)? {
            n if n <= 4096 => Ok(n),
            n => Err(LmError::config(key, format!("{n}, expected at most 4096"))),
        }
    }
}

/// The values stored as `kind` in `bytes`, as many as `out` holds.
///
/// # Errors
/// If the number format is not supported or `bytes` is not exactly as long as it needs.
pub fn dequantise(kind: GgmlDType, bytes: &[u8], out: &mut [f32]) -> Result<(), LmError> {
    let n = out.len();
    if byte_len(kind, n) != Some(bytes.len()) {
        return Err(problem(format!("{} bytes do not hold {n} values of {kind:?}", bytes.len())));
    }
    match kind {
        GgmlDType::F32 => FloatFormat::F32.decode(bytes, out),
        GgmlDType::F16 => FloatFormat::F16.decode(bytes, out),
        GgmlDType::BF16 => FloatFormat::Bf16.decode(bytes, out),
        quantised => {
            let tensor = qtensor_from_ggml(quantised, bytes, vec![n], &Device::Cpu)?;
            out.copy_from_slice(&tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

fn byte_len(kind: GgmlDType, n: usize) -> Option<usize> {
    n.is_multiple_of(kind.block_size()).then(|| (n / kind.block_size()).checked_mul(kind.type_size()))?
}

/// The number formats that are read, by their number in the file.
fn kind(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

fn problem(text: impl Into<String>) -> LmError {
    LmError::Format { format: "GGUF", problem: text.into() }
}

struct TensorInfo {
    shape: Vec<usize>,
    kind: GgmlDType,
    offset: u64,
}

impl TensorInfo {
    fn place(
        self,
        name: &str,
        data_start: u64,
        alignment: u64,
        file_len: u64,
    ) -> Result<GgufTensor, LmError> {
        let n = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        // Blocks never straddle rows.
        let whole = self.shape.last().is_some_and(|&row| row.is_multiple_of(self.kind.block_size()));
        let len = n.and_then(|n| byte_len(self.kind, n)).filter(|_| whole);
        let Some(len) = len else {
            let (shape, kind) = (&self.shape, self.kind);
            return Err(problem(format!("tensor {name}: shape {shape:?} cannot be stored as {kind:?}")));
        };
        let start = data_start.checked_add(self.offset);
        let end = start.and_then(|start| start.checked_add(len as u64));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len && self.offset.is_multiple_of(alignment) => {
                Ok(GgufTensor { shape: self.shape, kind: self.kind, start, len })
            }
            _ => {
                let offset = self.offset;
                Err(problem(format!("tensor {name}: {len} bytes at offset {offset} do not lie in the file")))
            }
        }
    }
}

struct Header<R> {
    reader: R,
    position: u64,
    end: u64,
}

impl<R: Read> Header<R> {
    fn bytes(&mut self, len: u64, what: &str) -> Result<Vec<u8>, LmError> {
        if len > self.end - self.position {
            let (position, left) = (self.position, self.end - self.position);
            return Err(problem(format!("{what} at byte {position} needs {len} bytes, {left} are left")));
        }
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(len).read_to_end(&mut bytes);
        match read {
            Ok(found) if found as u64 == len => {
                self.position += len;
                Ok(bytes)
            }
            Ok(found) => Err(problem(format!("{what}: the file ends after {found} of {len} bytes"))),
            Err(e) => Err(problem(format!("{what}: {e}"))),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LmError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes(N as u64, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, LmError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, LmError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn bounded(&mut self, what: &str, most: u64) -> Result<u64, LmError> {
        match self.u64(what)? {
            n if n <= most => Ok(n),
            n => Err(problem(format!("{what} is {n}, expected at most {most}"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, LmError> {
        let len = self.u64(what)?;
        let bytes = self.bytes(len, what)?;
        String::from_utf8(bytes).map_err(|_| problem(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, key: &str) -> Result<GgufValue, LmError> {
        let kind = self.u32(key)?;
        Ok(match kind {
            6 => GgufValue::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            12 => GgufValue::Float(f64::from_le_bytes(self.array(key)?)),
            7 => GgufValue::Flag(self.flag(key)?),
            8 => GgufValue::Text(self.text(key)?),
            9 => self.values(key)?,
            kind => GgufValue::Integer(self.integer(kind, key)?),
        })
    }

    fn flag(&mut self, key: &str) -> Result<bool, LmError> {
        match self.array::<1>(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(problem(format!("{key}: truth value {other}, expected 0 or 1"))),
        }
    }

    fn integer(&mut self, kind: u32, key: &str) -> Result<i64, LmError> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array(key)?).into(),
            1 => i8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            4 => self.u32(key)?.into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            10 => i64::try_from(self.u64(key)?)
                .map_err(|_| problem(format!("{key}: a whole number above 2⁶³")))?,
            11 => i64::from_le_bytes(self.array(key)?),
            other => return Err(problem(format!("{key}: value type {other} is not known"))),
        })
    }

    fn values(&mut self, key: &str) -> Result<GgufValue, LmError> {
        let kind = self.u32(key)?;
        let n = self.bounded(key, MAX_ARRAY)?;
        // Collecting grows step by step, so a false count fails at the end of the file, not at an allocation.
        Ok(match kind {
            6 => {
                GgufValue::Floats((0..n).map(|_| Ok(f32::from_le_bytes(self.array(key)?))).collect::<Result<
                    _,
                    LmError,
                >>(
                )?)
            }
            12 => GgufValue::Floats(
                (0..n)
                    .map(|_| Ok(f64::from_le_bytes(self.array(key)?) as f32))
                    .collect::<Result<_, LmError>>()?,
            ),
            7 => GgufValue::Flags((0..n).map(|_| self.flag(key)).collect::<Result<_, _>>()?),
            8 => GgufValue::Texts((0..n).map(|_| self.text(key)).collect::<Result<_, _>>()?),
            9 => return Err(problem(format!("{key}: arrays of arrays are not supported"))),
            kind => GgufValue::Integers((0..n).map(|_| self.integer(kind, key)).collect::<Result<_, _>>()?),
        })
    }

    fn tensor_info(&mut self) -> Result<(String, TensorInfo), LmError> {
        let name = self.text("tensor name")?;
        let n_dimensions = self.u32(&name)?;
        if !(1..=MAX_DIMENSIONS).contains(&n_dimensions) {
            return Err(problem(format!("tensor {name} has {n_dimensions} dimensions, expected 1 to 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dimensions {
            let d = self.u64(&name)?;
            shape.push(usize::try_from(d).map_err(|_| problem(format!("tensor {name}: dimension {d}")))?);
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let Some(kind) = kind(number) else {
            return Err(problem(format!("tensor {name}: number format {number} is not supported")));
        };
        let offset = self.u64(&name)?;
        Ok((name, TensorInfo { shape, kind, offset }))
    }
}
