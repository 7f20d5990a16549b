//! Some tensors of a safetensors file that holds much more, as bytes of a smaller one: an mlsae with its language model beside
//! it is a file of many gigabytes, of which the autoencoder is one.
//!
//! A file is the length of its header (u64), the header (JSON: name → type, shape and `data_offsets`), and the values.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// Headers beyond this are no headers; safetensors has the same limit.
const LONGEST_HEADER: u64 = 100_000_000;

/// The tensors of the file at `path` whose names `keep` accepts, as a safetensors file of their own. A damaged header of
/// those left out is not noticed.
///
/// # Errors
/// If the header does not parse, offsets lie outside the file or overlap, or reading fails.
pub(super) fn tensors(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Vec<u8>> {
    let what = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(what)?;
    let length = file.metadata().with_context(what)?.len();
    let mut prefix = [0u8; 8];
    file.read_exact(&mut prefix).with_context(what)?;
    let header_length = u64::from_le_bytes(prefix);
    let found = format!("{}: a header of {header_length} bytes in a file of {length}", path.display());
    ensure!(header_length <= LONGEST_HEADER.min(length.saturating_sub(8)), found);
    let mut text = Vec::new();
    (&mut file).take(header_length).read_to_end(&mut text).with_context(what)?;
    let header: Map<String, Value> = serde_json::from_slice(&text).with_context(what)?;
    let data = 8 + header_length;
    let mut kept = Vec::new();
    for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__" && keep(name)) {
        let offset = |i: usize| entry.get("data_offsets")?.get(i)?.as_u64();
        let range = offset(0).zip(offset(1)).filter(|&(start, end)| start <= end && end <= length - data);
        let (start, end) =
            range.with_context(|| format!("{}: {name} lies outside the file", path.display()))?;
        kept.push((start, end, name, entry));
    }
    kept.sort_unstable_by_key(|&(start, end, ..)| (start, end));
    let disjoint = kept.windows(2).all(|pair| pair[0].1 <= pair[1].0);
    ensure!(disjoint, "{}: tensors overlap", path.display());
    let (mut smaller, mut size) = (Map::new(), 0);
    for (start, end, name, entry) in &mut kept {
        entry["data_offsets"] = json!([size, size + *end - *start]);
        size += *end - *start;
        smaller.insert(std::mem::take(name), entry.take());
    }
    let mut text = Value::Object(smaller).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    // The sizes are of ranges inside the file that do not overlap.
    bytes.reserve_exact(usize::try_from(size)?);
    for (start, end, ..) in kept {
        let before = bytes.len();
        file.seek(SeekFrom::Start(data + start)).with_context(what)?;
        (&mut file).take(end - start).read_to_end(&mut bytes).with_context(what)?;
        ensure!((bytes.len() - before) as u64 == end - start, "{} became shorter", path.display());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use shared::format::tensors::{TensorFile, serialize};

    use super::*;

    #[test]
    fn what_is_kept_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let (a, b, big) = ([1.0f32, 2.0, 3.0], [4.0f32, 5.0], vec![9.0f32; 1000]);
        let all: [(&str, &[usize], &[f32]); 4] = [
            ("autoencoder.a", &[3], &a),
            ("transformer.big", &[1000], &big),
            ("autoencoder.b", &[1, 2], &b),
            ("z", &[2], &b),
        ];
        let whole = serialize("t", &all).unwrap();
        fs::write(&path, &whole).unwrap();
        let bytes = tensors(&path, |name| name.starts_with("autoencoder.")).unwrap();
        assert!(bytes.len() < 400, "{} bytes", bytes.len());
        let part = TensorFile::open("part", &bytes).unwrap();
        assert_eq!(part.names(), ["autoencoder.a", "autoencoder.b"]);
        assert_eq!(part.exact("autoencoder.a", &[3]).unwrap(), a);
        assert_eq!(part.exact("autoencoder.b", &[1, 2]).unwrap(), b);
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(tensors(&path, |_| true).is_err(), "cut at {length}");
        }
        for header in [
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[-1,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
            "[]",
        ] {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 8]);
            fs::write(&path, bytes).unwrap();
            assert!(tensors(&path, |_| true).is_err(), "{header}");
        }
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(tensors(&path, |_| true).is_err());
    }
}
