//! Dictionaries of tensors that `torch.save` wrote: a zip of a pickle and raw storages, read as data and never run.
//!
//! `pickle` reads the structure (made of `value`s), `write` makes such files; here the structure is checked against the archive's bytes and
//! tensors are gathered by their strides.

mod pickle;
mod value;
mod write;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};

use half::{bf16, f16};
use zip::{CompressionMethod, ZipArchive};

use super::error::FormatError;
use super::tensors::Tensor;
use pickle::Pickle;
use value::{Kind, Node, View, what};
pub(super) use write::{Item, write};

/// Archives of weights have a member for each tensor, and a few more.
const MOST_MEMBERS: usize = 1 << 16;

/// An opened file. Tensors are read when they are asked for.
pub(super) struct TorchFile<'a, R> {
    part: &'a str,
    archive: ZipArchive<R>,
    /// Index and length of each member, by name.
    members: BTreeMap<String, (usize, u64)>,
    /// What stands before `data/0` in the names.
    prefix: String,
    pickle: Pickle,
    entries: BTreeMap<String, usize>,
}

impl<'a, R: Read + Seek> TorchFile<'a, R> {
    /// Opens a file; `part` names it in messages.
    ///
    /// # Errors
    /// If it is no archive of torch's, its pickle holds anything but data, or it is not a dictionary with names.
    pub(super) fn open(part: &'a str, mut source: R) -> Result<Self, FormatError> {
        let container = |reason: String| FormatError::container(part, reason);
        let length = source.seek(SeekFrom::End(0)).map_err(|e| FormatError::io(part, e))?;
        let archive = ZipArchive::new(source).map_err(|e| {
            container(format!(
                "{e} (files from before torch 1.6 are no archives: save them again with a newer one)"
            ))
        })?;
        let mut file = Self {
            part,
            archive,
            members: BTreeMap::new(),
            prefix: String::new(),
            pickle: Pickle::read(b"}.").map_err(container)?,
            entries: BTreeMap::new(),
        };
        file.list_members(length)?;
        let pickles: Vec<_> =
            file.members.keys().filter(|n| *n == "data.pkl" || n.ends_with("/data.pkl")).cloned().collect();
        let [name] = &pickles[..] else {
            return Err(container(format!("wanted one data.pkl in the archive, found {}", pickles.len())));
        };
        file.prefix = name.trim_end_matches("data.pkl").to_owned();
        let order = format!("{}byteorder", file.prefix);
        if file.members.contains_key(&order) && file.member(&order, 16)? != b"little" {
            return Err(FormatError::field(part, &order, "little", "another byte order"));
        }
        let bytes = file.member(name, pickle::LONGEST)?;
        file.pickle =
            Pickle::read(&bytes).map_err(|e| FormatError::container(&format!("{part}: {name}"), e))?;
        file.list_entries()?;
        Ok(file)
    }

    fn list_members(&mut self, length: u64) -> Result<(), FormatError> {
        let container = |e: zip::result::ZipError| FormatError::container(self.part, e);
        if self.archive.len() > MOST_MEMBERS {
            return Err(FormatError::container(self.part, format!("{} members", self.archive.len())));
        }
        if self.archive.has_overlapping_entries().map_err(container)? || self.archive.has_duplicate_names() {
            return Err(FormatError::container(self.part, "members of the archive overlap or share a name"));
        }
        for index in 0..self.archive.len() {
            let entry = self.archive.by_index(index).map_err(container)?;
            let name = entry.name().map_err(container)?.into_owned();
            let size = entry.size();
            if entry.compression() != CompressionMethod::Stored
                || size != entry.compressed_size()
                || size > length
            {
                let found = format!("{size} bytes in {} of an archive of {length}", entry.compressed_size());
                return Err(FormatError::field(self.part, &name, "plain bytes, as torch stores them", found));
            }
            self.members.insert(name, (index, size));
        }
        Ok(())
    }

    /// The top-level names, once the whole is known to be a dictionary of distinct names.
    fn list_entries(&mut self) -> Result<(), FormatError> {
        let Node::Dict(pairs) = self.pickle.root() else {
            let found = format!("wanted a dictionary of tensors, found {}", what(self.pickle.root()));
            return Err(FormatError::container(self.part, found));
        };
        for &(key, value) in pairs {
            let Node::Text(name) = self.pickle.get(key) else {
                return Err(FormatError::container(self.part, "a key that is not text"));
            };
            if self.entries.insert(name.clone(), value).is_some() {
                return Err(FormatError::field(self.part, name, "one entry of this name", "several"));
            }
        }
        Ok(())
    }

    /// The bytes of a member, all of them, so that its checksum is compared.
    fn member(&mut self, name: &str, limit: u64) -> Result<Vec<u8>, FormatError> {
        let Some(&(index, size)) = self.members.get(name) else {
            return Err(FormatError::field(self.part, name, "a member of the archive", "none"));
        };
        if size > limit {
            return Err(FormatError::field(self.part, name, format!("at most {limit} bytes"), size));
        }
        let mut entry = self.archive.by_index(index).map_err(|e| FormatError::container(self.part, e))?;
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        entry.read_to_end(&mut bytes).map_err(|e| FormatError::io(&format!("{}: {name}", self.part), e))?;
        Ok(bytes)
    }

    /// Whether the dictionary has this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The names, sorted and joined, for messages.
    pub(super) fn names(&self) -> String {
        self.entries.keys().cloned().collect::<Vec<_>>().join(", ")
    }

    /// The text under a name.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.pickle.get(*self.entries.get(name)?) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The value under `key` in the dictionary under `name`: a positive whole number.
    pub(super) fn count_in(&self, name: &str, key: &str) -> Result<usize, FormatError> {
        let field = format!("{name}.{key}");
        match self.inner(name, key) {
            Some(&Node::Int(value)) => {
                let count = usize::try_from(value).ok().filter(|&count| count > 0);
                count.ok_or_else(|| FormatError::field(self.part, &field, "a positive whole number", value))
            }
            other => Err(FormatError::field(self.part, &field, "an integer", other.map_or("nothing", what))),
        }
    }

    /// The text under `key` in the dictionary under `name`.
    pub(super) fn text_in(&self, name: &str, key: &str) -> Option<&str> {
        match self.inner(name, key)? {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The one value of a dictionary inside this one.
    fn inner(&self, name: &str, key: &str) -> Option<&Node> {
        let Node::Dict(pairs) = self.pickle.get(*self.entries.get(name)?) else { return None };
        let mut found =
            pairs.iter().filter(|(k, _)| matches!(self.pickle.get(*k), Node::Text(k) if k == key));
        let (_, value) = found.next()?;
        found.next().is_none().then(|| self.pickle.get(*value))
    }

    fn view(&self, name: &str) -> Result<View, FormatError> {
        let found = match self.entries.get(name) {
            None => format!("only {}", self.names()),
            Some(&id) => match self.pickle.get(id) {
                Node::Tensor(view) => return Ok(view.clone()),
                other => what(other).to_owned(),
            },
        };
        Err(FormatError::field(self.part, name, "a tensor of this name", found))
    }

    /// The shape of a tensor without reading it.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub(super) fn shape(&self, name: &str) -> Result<Vec<usize>, FormatError> {
        let view = self.view(name)?;
        let shape = view.shape.iter().map(|&n| usize::try_from(n)).collect::<Result<Vec<_>, _>>();
        shape.map_err(|_| FormatError::field(self.part, name, "a shape", format!("{:?}", view.shape)))
    }

    /// A float tensor as f32, its elements in row-major order whatever its strides.
    ///
    /// # Errors
    /// If there is no such tensor, it is no float, or it does not lie within its storage.
    pub(super) fn read(&mut self, name: &str) -> Result<Tensor, FormatError> {
        let view = self.view(name)?;
        let shape = self.shape(name)?;
        let bytes = self.storage(name, &view)?;
        #[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
        let data = match view.kind {
            Kind::F32 => gather(&view, bytes.as_chunks::<4>().0, f32::from_le_bytes),
            Kind::F64 => gather(&view, bytes.as_chunks::<8>().0, |b| f64::from_le_bytes(b) as f32),
            Kind::F16 => gather(&view, bytes.as_chunks::<2>().0, |b| f16::from_le_bytes(b).to_f32()),
            Kind::Bf16 => gather(&view, bytes.as_chunks::<2>().0, |b| bf16::from_le_bytes(b).to_f32()),
            other => return Err(FormatError::field(self.part, name, "a float type", format!("{other:?}"))),
        };
        Ok(Tensor { shape, data })
    }

    /// [`TorchFile::read`] of a matrix `[rows, cols]`.
    pub(super) fn matrix(&mut self, name: &str) -> Result<(usize, usize, Vec<f32>), FormatError> {
        match self.shape(name)?[..] {
            [rows, cols] => Ok((rows, cols, self.read(name)?.data)),
            ref shape => Err(FormatError::field(self.part, name, "a matrix", format!("shape {shape:?}"))),
        }
    }

    /// [`TorchFile::read`] of a tensor that must have exactly this shape.
    pub(super) fn exact(&mut self, name: &str, wanted: &[usize]) -> Result<Vec<f32>, FormatError> {
        let shape = self.shape(name)?;
        if shape == wanted {
            return Ok(self.read(name)?.data);
        }
        Err(FormatError::field(self.part, name, format!("shape {wanted:?}"), format!("shape {shape:?}")))
    }

    /// A positive whole number: an integer tensor of one element, or a plain integer.
    pub(super) fn count(&mut self, name: &str) -> Result<usize, FormatError> {
        let plain = self.entries.get(name).map(|&id| self.pickle.get(id).clone());
        let value = match plain {
            Some(Node::Int(value)) => value,
            _ => {
                let view = self.view(name)?;
                let bytes = self.storage(name, &view)?;
                let values = match view.kind {
                    Kind::I64 => gather(&view, bytes.as_chunks::<8>().0, i64::from_le_bytes),
                    Kind::I32 => {
                        gather(&view, bytes.as_chunks::<4>().0, |b| i64::from(i32::from_le_bytes(b)))
                    }
                    other => {
                        return Err(FormatError::field(self.part, name, "an integer", format!("{other:?}")));
                    }
                };
                match values[..] {
                    [value] => value,
                    _ => {
                        return Err(FormatError::field(
                            self.part,
                            name,
                            "one integer",
                            format!("{} values", values.len()),
                        ));
                    }
                }
            }
        };
        let count = usize::try_from(value).ok().filter(|&count| count > 0);
        count.ok_or_else(|| FormatError::field(self.part, name, "a positive whole number", value))
    }

    /// The bytes of a view's storage, once they are known to hold every element of the view.
    fn storage(&mut self, name: &str, view: &View) -> Result<Vec<u8>, FormatError> {
        let member = format!("{}data/{}", self.prefix, view.key);
        let bytes = self.member(&member, u64::MAX)?;
        if view.length.checked_mul(view.kind.bytes()) != Some(bytes.len() as u64) {
            let wanted = format!("{} elements of {:?}", view.length, view.kind);
            return Err(FormatError::field(self.part, &member, wanted, format!("{} bytes", bytes.len())));
        }
        if !fits(view) {
            let wanted = format!("a place within its storage of {} elements", view.length);
            let found = format!("shape {:?}, strides {:?}, offset {}", view.shape, view.strides, view.offset);
            return Err(FormatError::field(self.part, name, wanted, found));
        }
        Ok(bytes)
    }
}

/// Whether all elements lie within the storage, and are no more than it has.
fn fits(view: &View) -> bool {
    let count = view.shape.iter().try_fold(1u64, |all, &n| all.checked_mul(n));
    let last =
        view.shape.iter().zip(&view.strides).try_fold(view.offset, |at, (&n, &stride)| {
            at.checked_add(n.saturating_sub(1).checked_mul(stride)?)
        });
    match (count, last) {
        (Some(0), Some(_)) => true,
        (Some(count), Some(last)) => count <= view.length && last < view.length,
        _ => false,
    }
}

/// Elements of a view that [`fits`], row-major.
#[expect(clippy::cast_possible_truncation, reason = "indices lie within a slice")]
fn gather<const N: usize, T>(view: &View, elements: &[[u8; N]], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    let count: u64 = view.shape.iter().product();
    let mut out = Vec::with_capacity(count as usize);
    let mut index = vec![0u64; view.shape.len()];
    let mut at = view.offset;
    for _ in 0..count {
        out.push(value(elements[at as usize]));
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at += view.strides[axis];
            if index[axis] < view.shape[axis] {
                break;
            }
            at -= view.strides[axis] * view.shape[axis];
            index[axis] = 0;
        }
    }
    out
}
