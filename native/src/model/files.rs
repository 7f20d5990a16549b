//! Tensors in files, read one at a time: safetensors shards and GGUF.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use shared::lm::{Gguf, LmError, SafetensorsHeader, StoredTensor, TensorSource, dequantise};

/// The tensors of one or more safetensors files.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<File>,
    tensors: BTreeMap<String, (usize, StoredTensor)>,
}

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Opens `model.safetensors`, or the shards its index names.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for (file, wanted) in weight_files(folder)? {
            let path = folder.join(&file);
            let (mut opened, len) = open(&path)?;
            let header = SafetensorsHeader::parse(BufReader::new(&mut opened), len)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let names = match wanted {
                Some(names) => names,
                None => header.tensors().keys().cloned().collect(),
            };
            for name in names {
                let Some(tensor) = header.tensors().get(&name) else {
                    bail!("the index says {} holds tensor {name}, but it does not", path.display());
                };
                shards.tensors.insert(name, (shards.files.len(), tensor.clone()));
            }
            shards.files.push(opened);
        }
        Ok(shards)
    }
}

/// The weight files of a folder in alphabetical order, with the tensors to take from each (`None`: all).
pub(super) fn weight_files(folder: &Path) -> Result<BTreeMap<String, Option<Vec<String>>>> {
    if folder.join("model.safetensors").is_file() {
        return Ok(BTreeMap::from([("model.safetensors".to_owned(), None)]));
    }
    let path = folder.join("model.safetensors.index.json");
    if !path.is_file() {
        let pickled = folder.join("pytorch_model.bin").is_file()
            || folder.join("pytorch_model.bin.index.json").is_file();
        let hint = if pickled {
            "; its pytorch_model.bin is a pickle, which is never opened: convert it"
        } else {
            ""
        };
        bail!("{} holds no model.safetensors and no model.safetensors.index.json{hint}", folder.display());
    }
    let json = read_small(&path)?;
    let index: Index =
        serde_json::from_slice(&json).with_context(|| format!("cannot read {}", path.display()))?;
    let mut files: BTreeMap<String, Option<Vec<String>>> = BTreeMap::new();
    for (name, file) in index.weight_map {
        let plain = Path::new(&file).file_name().is_some_and(|plain| plain == file.as_str());
        ensure!(plain, "{}: `{file}` is not the name of a file beside it", path.display());
        files.entry(file).or_default().get_or_insert_default().push(name);
    }
    ensure!(!files.is_empty(), "{}: weight_map is empty", path.display());
    Ok(files)
}

/// A file that has to fit in memory comfortably (configurations, tokenizers, indices).
pub(super) fn read_small(path: &Path) -> Result<Vec<u8>> {
    const MOST: u64 = 1 << 28;
    let (file, len) = open(path)?;
    ensure!(len <= MOST, "{} has {len} bytes, expected at most {MOST}", path.display());
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let metadata = file.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
    ensure!(metadata.is_file(), "{} is not a file", path.display());
    Ok((file, metadata.len()))
}

/// How much of a tensor is read at a time, in bytes.
const PIECE: usize = 1 << 20;

/// Decodes the `len` bytes from `start` into `out`, piece by piece: no tensor is ever in memory twice.
/// `unit` bytes become `values` numbers; `decode` is shown whole units.
fn read_at(
    file: &mut File,
    (name, start, len): (&str, u64, usize),
    (unit, values): (usize, usize),
    out: &mut [f32],
    decode: impl Fn(&[u8], &mut [f32]) -> Result<(), LmError>,
) -> Result<(), LmError> {
    let failed = |message: String| LmError::Read { name: name.to_owned(), message };
    if len / unit * values != out.len() {
        return Err(failed(format!("{len} bytes hold {} values, wanted {}", len / unit * values, out.len())));
    }
    file.seek(SeekFrom::Start(start)).map_err(|e| failed(e.to_string()))?;
    let units = (PIECE / unit).max(1);
    let mut bytes = vec![0u8; (units * unit).min(len)];
    for (i, out) in out.chunks_mut(units * values).enumerate() {
        let piece = &mut bytes[..out.len() / values * unit];
        file.read_exact(piece).map_err(|e| failed(format!("at byte {} of {len}: {e}", i * units * unit)))?;
        decode(piece, out)?;
    }
    Ok(())
}

fn missing(name: &str) -> LmError {
    LmError::Read { name: name.to_owned(), message: "no such tensor".to_owned() }
}

impl TensorSource for Shards {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|(_, tensor)| tensor.shape.clone())
    }

    fn read(&mut self, name: &str, out: &mut [f32]) -> Result<(), LmError> {
        let (file, tensor) = self.tensors.get(name).ok_or_else(|| missing(name))?;
        let format = tensor.format;
        let place = (name, tensor.start, tensor.len);
        read_at(&mut self.files[*file], place, (format.size(), 1), out, |bytes, out| {
            format.decode(bytes, out);
            Ok(())
        })
    }
}

/// The tensors of a GGUF file.
#[derive(Debug)]
pub(super) struct GgufFile {
    file: File,
    /// The parsed header.
    pub(super) header: Gguf,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let (mut file, len) = open(path)?;
        let header = Gguf::parse(BufReader::with_capacity(1 << 20, &mut file), len)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { file, header })
    }
}

impl TensorSource for GgufFile {
    fn names(&self) -> Vec<String> {
        self.header.tensors().keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.header.tensors().get(name).map(|tensor| tensor.shape.clone())
    }

    fn read(&mut self, name: &str, out: &mut [f32]) -> Result<(), LmError> {
        let tensor = self.header.tensors().get(name).ok_or_else(|| missing(name))?;
        let (kind, place) = (tensor.kind, (name, tensor.start, tensor.len));
        let unit = (kind.type_size(), kind.block_size());
        read_at(&mut self.file, place, unit, out, |bytes, out| dequantise(kind, bytes, out))
    }
}
