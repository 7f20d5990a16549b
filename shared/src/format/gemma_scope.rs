//! Gemma Scope: `params.npz`, five arrays in a zip.
//!
//! Stored are `W_enc [d_in, n]`, `W_dec [n, d_out]`, `b_enc [n]`, `b_dec [d_out]`, `threshold [n]`. Inputs are raw and nothing is subtracted from them (arXiv 2408.05147, appendix).

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::error::FormatError;
use super::fold;
use super::npy::{self, Header};
use super::tensors::transpose;
use crate::row_scaling::RowScaling;
use crate::sae::{Sae, SaeParts};

/// The name of the archive in messages and on disk.
pub const PARAMS: &str = "params.npz";

/// The arrays an archive must hold; others are ignored.
const ARRAYS: [&str; 5] = ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"];
/// Deflate cannot expand further than this.
const DEFLATE_LIMIT: u64 = 1032;

/// An array of the archive, ready to be read: its place and its checked header.
struct Member {
    name: String,
    header: Header,
}

/// Reads `params.npz`: stored or deflated, zip64, f2/f4/f8 in either order, names in either case.
///
/// # Errors
/// If the archive or an array does not parse, a name occurs twice, shapes disagree, or a value is not finite.
pub fn read(mut source: impl Read + Seek) -> Result<Sae, FormatError> {
    let length = source.seek(SeekFrom::End(0)).map_err(|e| FormatError::io(PARAMS, e))?;
    let mut archive = ZipArchive::new(source).map_err(|e| FormatError::container(PARAMS, e))?;
    if archive.has_overlapping_entries().map_err(|e| FormatError::container(PARAMS, e))? {
        return Err(FormatError::container(PARAMS, "entries of the archive overlap"));
    }
    let members = members(&mut archive, length)?;
    let shape = |name: &str| -> Result<(usize, usize), FormatError> {
        let (_, member) = find(&members, name)?;
        match member.header.shape[..] {
            [rows, cols] => Ok((rows, cols)),
            _ => Err(FormatError::field(
                PARAMS,
                &member.name,
                "a matrix",
                format!("shape {:?}", member.header.shape),
            )),
        }
    };
    let ((d_in, n), (rows, d_out)) = (shape("w_enc")?, shape("w_dec")?);
    if rows != n {
        return Err(FormatError::field(PARAMS, "W_dec", format!("{n} rows, as W_enc has columns"), rows));
    }
    for (name, wanted) in [("b_enc", n), ("b_dec", d_out), ("threshold", n)] {
        let (_, member) = find(&members, name)?;
        if member.header.shape != [wanted] {
            let found = format!("shape {:?}", member.header.shape);
            return Err(FormatError::field(PARAMS, &member.name, format!("shape [{wanted}]"), found));
        }
    }
    let mut array = |name: &str, turned: bool| -> Result<Vec<f32>, FormatError> {
        let (index, member) = find(&members, name)?;
        let mut entry = archive.by_index(index).map_err(|e| FormatError::container(PARAMS, e))?;
        Header::read(&mut entry, &member.name)?;
        let data = npy::read_values(&mut entry, &member.header, &member.name, turned)?;
        // Reading to the end is what checks the entry's checksum.
        match entry.read(&mut [0]) {
            Ok(0) => Ok(data),
            Ok(_) => Err(FormatError::field(PARAMS, &member.name, "nothing after the values", "more bytes")),
            Err(e) => Err(FormatError::io(PARAMS, e)),
        }
    };
    let parts = SaeParts {
        d_in,
        d_out,
        w_enc: array("w_enc", true)?,
        b_enc: array("b_enc", false)?,
        w_dec: array("w_dec", false)?,
        b_dec: array("b_dec", false)?,
        activation: fold::threshold(array("threshold", false)?),
        w_skip: None,
        rows: RowScaling::None,
    };
    Sae::new(parts).map_err(|e| FormatError::weights(PARAMS, e))
}

/// The headers of the arrays wanted, keyed by lower-case name, each checked against the bytes really there.
fn members<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    length: u64,
) -> Result<BTreeMap<String, (usize, Member)>, FormatError> {
    if archive.has_duplicate_names() {
        return Err(FormatError::container(PARAMS, "a name occurs more than once in the archive"));
    }
    let mut members = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| FormatError::container(PARAMS, e))?;
        let name = entry.name().map_err(|e| FormatError::container(PARAMS, e))?.into_owned();
        let name = name.strip_suffix(".npy").unwrap_or(&name).to_owned();
        let key = name.to_ascii_lowercase();
        if !ARRAYS.contains(&key.as_str()) {
            continue;
        }
        let (packed, size) = (entry.compressed_size(), entry.size());
        if packed > length || size > packed.saturating_mul(DEFLATE_LIMIT).saturating_add(1 << 16) {
            let found = format!("{size} in an archive of {length}");
            return Err(FormatError::field(PARAMS, &name, "a size its bytes can hold", found));
        }
        let header = Header::read(&mut entry, &name)?;
        if header.data_bytes().checked_add(header.bytes) != Some(size) {
            let wanted = format!("values for shape {:?}", header.shape);
            return Err(FormatError::field(PARAMS, &name, wanted, format!("{size} bytes with the header")));
        }
        drop(entry);
        if members.insert(key, (index, Member { name: name.clone(), header })).is_some() {
            return Err(FormatError::field(PARAMS, &name, "one array of this name in either case", "two"));
        }
    }
    Ok(members)
}

fn find<'a>(
    members: &'a BTreeMap<String, (usize, Member)>,
    name: &str,
) -> Result<(usize, &'a Member), FormatError> {
    let found = members.get(name).map(|(index, member)| (*index, member));
    found.ok_or_else(|| {
        let names = members.values().map(|(_, m)| m.name.as_str()).collect::<Vec<_>>().join(", ");
        FormatError::field(PARAMS, name, "an array of this name", format!("only [{names}]"))
    })
}

/// Writes `params.npz` as published: stored, little-endian f32, C order. A ReLU becomes thresholds of zero.
///
/// # Errors
/// If the autoencoder is top-k, which the format cannot say, or writing fails.
pub fn write(sae: &Sae, target: impl Write + Seek) -> Result<(), FormatError> {
    fold::refuse_skip(PARAMS, sae)?;
    fold::refuse_scaled_rows(PARAMS, sae)?;
    let (d_in, d_out, n) = (sae.dims().d_in, sae.dims().d_out, sae.dims().n_latents);
    let threshold = fold::thresholds(PARAMS, sae)?;
    let mut archive = ZipWriter::new(target);
    let mut add = |name: &str, shape: &[usize], values: &[f32]| -> Result<(), FormatError> {
        let header = npy::header(shape);
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(size_of_val(values) + header.len() >= 1 << 31);
        archive.start_file(format!("{name}.npy"), options).map_err(|e| FormatError::container(PARAMS, e))?;
        let mut write = |bytes: &[u8]| archive.write_all(bytes).map_err(|e| FormatError::io(PARAMS, e));
        write(&header)?;
        for chunk in values.chunks(1 << 16) {
            write(&chunk.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    };
    add("W_enc", &[d_in, n], &transpose(sae.w_enc(), n, d_in))?;
    add("W_dec", &[n, d_out], sae.w_dec())?;
    add("b_enc", &[n], sae.b_enc())?;
    add("b_dec", &[d_out], sae.b_dec())?;
    add("threshold", &[n], &threshold)?;
    archive.finish().map_err(|e| FormatError::container(PARAMS, e))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::sae::Activation;

    fn sae() -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        Sae::new(SaeParts {
            d_in: 3,
            d_out: 4,
            w_enc: wave(15, 0.1),
            b_enc: wave(5, 0.2),
            w_dec: wave(20, 0.3),
            b_dec: wave(4, 0.4),
            activation: Activation::JumpRelu { threshold: vec![0.1, 0.2, 0.3, 0.4, 0.5] },
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap()
    }

    fn written() -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        write(&sae(), &mut bytes).unwrap();
        bytes.into_inner()
    }

    /// An archive of raw `.npy` members.
    fn zipped(members: &[(&str, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in members {
            archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
            archive.write_all(bytes).unwrap();
        }
        archive.finish().unwrap().into_inner()
    }

    fn member(shape: &[usize], values: &[f32]) -> Vec<u8> {
        let mut bytes = npy::header(shape);
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        bytes
    }

    fn members() -> Vec<(&'static str, Vec<u8>)> {
        let s = sae();
        vec![
            ("W_enc.npy", member(&[3, 5], &transpose(s.w_enc(), 5, 3))),
            ("w_dec.npy", member(&[5, 4], s.w_dec())),
            ("b_enc.npy", member(&[5], s.b_enc())),
            ("b_dec", member(&[4], s.b_dec())),
            ("threshold.npy", member(&[5], &[0.1, 0.2, 0.3, 0.4, 0.5])),
            ("notes.npy", b"whatever".to_vec()),
        ]
    }

    #[test]
    fn what_is_written_reads_back_equal_however_it_is_packed() {
        assert_eq!(read(Cursor::new(written())).unwrap(), sae());
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            assert_eq!(read(Cursor::new(zipped(&members(), method))).unwrap(), sae());
        }
    }

    #[test]
    fn truncated_or_flipped_archives_are_errors_and_never_panics() {
        let good = written();
        for length in 0..good.len() {
            assert!(read(Cursor::new(&good[..length])).is_err(), "cut at {length}");
        }
        for at in 0..good.len() {
            for bit in [0x01, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                // Dates and attributes may change freely; weights may not.
                if let Ok(read) = read(Cursor::new(bad)) {
                    assert_eq!(read, sae(), "byte {at} changed the weights unnoticed");
                }
            }
        }
    }

    #[test]
    fn wrong_members_are_named() {
        let spoiled: [(usize, &'static str, Vec<u8>, &str); 7] = [
            (0, "other.npy", Vec::new(), "w_enc: wanted an array of this name"),
            (0, "W_enc.npy", member(&[15], &[0.5; 15]), "W_enc: wanted a matrix"),
            (1, "W_dec.npy", member(&[4, 5], &[0.5; 20]), "W_dec: wanted 5 rows"),
            (2, "b_enc.npy", member(&[4], &[0.5; 4]), "b_enc: wanted shape [5]"),
            (2, "b_enc.npy", member(&[5], &[0.5; 4]), "b_enc: wanted values for shape [5]"),
            (2, "b_enc.npy", member(&[1 << 60, 1 << 60], &[]), "b_enc"),
            (4, "threshold.npy", member(&[5], &[f32::NAN; 5]), "threshold: value at index 0 is NaN"),
        ];
        for (index, name, bytes, wanted) in spoiled {
            let mut all = members();
            all[index] = (name, bytes);
            let error = read(Cursor::new(zipped(&all, CompressionMethod::Stored))).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error} does not say {wanted}");
        }
        let mut twice = members();
        twice.push(("B_ENC.npy", member(&[5], &[0.5; 5])));
        assert!(
            read(Cursor::new(zipped(&twice, CompressionMethod::Stored)))
                .unwrap_err()
                .to_string()
                .contains("two")
        );
    }

    #[test]
    fn top_k_cannot_be_said() {
        let mut parts = sae().into_parts();
        parts.activation = Activation::TopK { k: 2 };
        assert!(write(&Sae::new(parts).unwrap(), Cursor::new(Vec::new())).is_err());
    }
}
