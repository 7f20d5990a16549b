//! Writing a dictionary of tensors as `torch.save` does: what `torch.load` reads, also with `weights_only`.

use std::io::{Seek, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::error::FormatError;

/// What an entry of the dictionary holds.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Item<'a> {
    /// A contiguous f32 tensor; no sizes for a scalar.
    F32(&'a [usize], &'a [f32]),
    /// A scalar i32 tensor.
    I32(i32),
    /// An i64 tensor of one dimension.
    I64(&'a [i64]),
    /// Text.
    Text(&'a str),
    /// A plain integer.
    Int(usize),
    /// An ordered dictionary of what is no tensor.
    Dict(&'a [(&'a str, Item<'a>)]),
}

/// Writes `items` by name; `part` names the file in messages.
///
/// # Errors
/// If a shape does not fit its values, a size does not fit the format, or writing fails.
pub(in super::super) fn write(
    part: &str,
    items: &[(&str, Item<'_>)],
    target: impl Write + Seek,
) -> Result<(), FormatError> {
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    let mut storages: Vec<(usize, Item<'_>)> = Vec::new();
    for (name, item) in items {
        let wrong =
            || FormatError::field(part, name, "values for its shape, of lengths below 2^31", "others");
        text(&mut pickle, name).ok_or_else(wrong)?;
        match item {
            Item::Text(value) => text(&mut pickle, value).ok_or_else(wrong)?,
            Item::Int(value) => integer(&mut pickle, *value).ok_or_else(wrong)?,
            Item::Dict(entries) => dictionary(&mut pickle, entries).ok_or_else(wrong)?,
            tensor => {
                tensor_entry(&mut pickle, storages.len(), *tensor).ok_or_else(wrong)?;
                storages.push((storages.len(), *tensor));
            }
        }
    }
    pickle.extend(b"u.");
    let mut archive = ZipWriter::new(target);
    let begin = |archive: &mut ZipWriter<_>, name: &str, bytes: usize| {
        // Storages lie on 64 bytes, so that torch can map them.
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment(64)
            .large_file(bytes >= 1 << 31);
        archive.start_file(format!("archive/{name}"), options).map_err(|e| FormatError::container(part, e))
    };
    let io = |e| FormatError::io(part, e);
    for (name, bytes) in [("data.pkl", &pickle[..]), ("byteorder", b"little"), ("version", b"3\n")] {
        begin(&mut archive, name, bytes.len())?;
        archive.write_all(bytes).map_err(io)?;
    }
    for (index, item) in storages {
        let name = format!("data/{index}");
        match item {
            Item::F32(_, values) => {
                begin(&mut archive, &name, size_of_val(values))?;
                for chunk in values.chunks(1 << 16) {
                    let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                    archive.write_all(&bytes).map_err(io)?;
                }
            }
            Item::I32(value) => {
                begin(&mut archive, &name, 4)?;
                archive.write_all(&value.to_le_bytes()).map_err(io)?;
            }
            Item::I64(values) => {
                begin(&mut archive, &name, size_of_val(values))?;
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                archive.write_all(&bytes).map_err(io)?;
            }
            Item::Text(_) | Item::Int(_) | Item::Dict(_) => {}
        }
    }
    archive.finish().map_err(|e| FormatError::container(part, e))?;
    Ok(())
}

fn dictionary(pickle: &mut Vec<u8>, entries: &[(&str, Item<'_>)]) -> Option<()> {
    pickle.extend(b"ccollections\nOrderedDict\n)R(");
    for (name, item) in entries {
        text(pickle, name)?;
        match item {
            Item::Text(value) => text(pickle, value)?,
            Item::Int(value) => integer(pickle, *value)?,
            _ => return None,
        }
    }
    pickle.push(b'u');
    Some(())
}

fn text(pickle: &mut Vec<u8>, text: &str) -> Option<()> {
    pickle.push(b'X');
    pickle.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
    pickle.extend(text.as_bytes());
    Some(())
}

/// `i32` for what fits, `long` for the rest.
fn integer(pickle: &mut Vec<u8>, value: usize) -> Option<()> {
    if let Ok(small) = i32::try_from(value) {
        pickle.push(b'J');
        pickle.extend(small.to_le_bytes());
    } else {
        pickle.extend([0x8a, 8]);
        pickle.extend(i64::try_from(value).ok()?.to_le_bytes());
    }
    Some(())
}

/// A tensor over the storage `index`, contiguous.
fn tensor_entry(pickle: &mut Vec<u8>, index: usize, item: Item<'_>) -> Option<()> {
    let (storage, shape, length): (&[u8], Vec<usize>, usize) = match item {
        Item::F32(shape, values) => (b"FloatStorage", shape.to_vec(), values.len()),
        Item::I32(_) => (b"IntStorage", Vec::new(), 1),
        Item::I64(values) => (b"LongStorage", vec![values.len()], values.len()),
        Item::Text(_) | Item::Int(_) | Item::Dict(_) => return None,
    };
    if shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n)) != Some(length) {
        return None;
    }
    pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(pickle, "storage")?;
    pickle.extend(b"ctorch\n");
    pickle.extend(storage);
    pickle.push(b'\n');
    text(pickle, &index.to_string())?;
    text(pickle, "cpu")?;
    integer(pickle, length)?;
    pickle.extend(b"tQ");
    integer(pickle, 0)?;
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    for sizes in [shape, strides] {
        pickle.push(b'(');
        for size in sizes {
            integer(pickle, size)?;
        }
        pickle.push(b't');
    }
    pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    Some(())
}
