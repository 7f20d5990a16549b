//! The `.npy` array format, versions 1 to 3: a checked header, then raw values.

use std::io::Read;

use half::f16;

use super::error::FormatError;
use super::gemma_scope::PARAMS;
use super::tensors::scatter_transposed;

/// Headers are a line of text; nothing honest comes near this.
const LONGEST_HEADER: usize = 1 << 16;
/// Values read at a time.
const PANEL_VALUES: usize = 1 << 20;

/// How a value is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F2,
    F4,
    F8,
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Self::F2 => 2,
            Self::F4 => 4,
            Self::F8 => 8,
        }
    }
}

/// The description of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    kind: Kind,
    fortran: bool,
    /// Sizes as NumPy shows them.
    pub(super) shape: Vec<usize>,
    /// Number of values; checked not to overflow in bytes.
    n_values: usize,
    /// Length of magic, length field and text.
    pub(super) bytes: u64,
}

impl Header {
    /// Reads magic, version, length and the dictionary literal; the source then stands at the first value.
    pub(super) fn read(source: &mut impl Read, name: &str) -> Result<Self, FormatError> {
        let io = |e| FormatError::io(&format!("{PARAMS}: {name}"), e);
        let mut start = [0u8; 8];
        source.read_exact(&mut start).map_err(io)?;
        if &start[..6] != b"\x93NUMPY" {
            return Err(FormatError::field(PARAMS, name, "an array in .npy format", "other bytes"));
        }
        let mut length = [0u8; 4];
        let length_bytes = match start[6] {
            1 => 2,
            2 | 3 => 4,
            version => return Err(FormatError::field(PARAMS, name, ".npy version 1, 2 or 3", version)),
        };
        source.read_exact(&mut length[..length_bytes]).map_err(io)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST_HEADER {
            return Err(FormatError::field(
                PARAMS,
                name,
                format!("a header below {LONGEST_HEADER} bytes"),
                length,
            ));
        }
        let mut text = vec![0u8; length];
        source.read_exact(&mut text).map_err(io)?;
        let text = String::from_utf8_lossy(&text);
        let wrong = |wanted: &str, found: &str| FormatError::field(PARAMS, name, wanted, found);
        let kind = match value_of(&text, "descr").map(|v| v.trim_matches(['\'', '"'])) {
            Some("<f2") => Kind::F2,
            Some("<f4") => Kind::F4,
            Some("<f8") => Kind::F8,
            other => return Err(wrong("descr <f2, <f4 or <f8", other.unwrap_or("none"))),
        };
        let fortran = match value_of(&text, "fortran_order") {
            Some("True") => true,
            Some("False") => false,
            other => return Err(wrong("fortran_order True or False", other.unwrap_or("none"))),
        };
        let shape_text = value_of(&text, "shape").unwrap_or("none");
        let shape = parse_shape(shape_text).ok_or_else(|| wrong("a shape such as (3, 4)", shape_text))?;
        let n_values = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let n_values = n_values.filter(|n| n.checked_mul(kind.bytes()).is_some());
        let n_values = n_values.ok_or_else(|| wrong("a shape that fits in memory", shape_text))?;
        Ok(Self { kind, fortran, shape, n_values, bytes: (8 + length_bytes + length) as u64 })
    }

    /// How many bytes the values take.
    pub(super) fn data_bytes(&self) -> u64 {
        (self.n_values * self.kind.bytes()) as u64
    }
}

/// The text of one value of the dictionary literal: up to the comma that ends it.
fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let after = ['\'', '"'].iter().find_map(|quote| {
        let quoted = format!("{quote}{key}{quote}");
        text.find(&quoted).map(|at| &text[at + quoted.len()..])
    })?;
    let value = after.trim_start().strip_prefix(':')?.trim_start();
    let end = if value.starts_with('(') { value.find(')')? + 1 } else { value.find([',', '}'])? };
    Some(value[..end].trim())
}

fn parse_shape(text: &str) -> Option<Vec<usize>> {
    let inner = text.strip_prefix('(')?.strip_suffix(')')?;
    let sizes = inner.split(',').map(|size| size.trim().trim_end_matches('L'));
    sizes.filter(|size| !size.is_empty()).map(|size| size.parse().ok()).collect()
}

/// The values as f32, row-major; of a matrix, its transpose when `turned`. Read in panels, so that only the result
/// is held; the caller has compared [`Header::data_bytes`] with the bytes that are there.
pub(super) fn read_values(
    source: &mut impl Read,
    header: &Header,
    name: &str,
    turned: bool,
) -> Result<Vec<f32>, FormatError> {
    // As stored: a Fortran-order matrix is its transpose in C order.
    let (rows, cols) = match header.shape[..] {
        [rows, cols] if header.fortran => (cols, rows),
        [rows, cols] => (rows, cols),
        _ => (1, header.n_values),
    };
    let transposes = header.shape.len() == 2 && turned != header.fortran;
    let mut out = Vec::new();
    out.try_reserve_exact(header.n_values)
        .map_err(|_| FormatError::field(PARAMS, name, "an array that fits in memory", header.n_values))?;
    let panel_rows = (PANEL_VALUES / cols.max(1)).max(1);
    let width = header.kind.bytes();
    if transposes {
        out.resize(header.n_values, 0.0);
    }
    let mut bytes = Vec::new();
    for first in (0..rows).step_by(panel_rows) {
        let here = panel_rows.min(rows - first);
        bytes.resize(here * cols * width, 0);
        source.read_exact(&mut bytes).map_err(|e| FormatError::io(&format!("{PARAMS}: {name}"), e))?;
        if transposes {
            let panel: Vec<f32> = values(header.kind, &bytes).collect();
            scatter_transposed(&mut out, &panel, rows, cols, first, here);
        } else {
            out.extend(values(header.kind, &bytes));
        }
    }
    Ok(out)
}

fn values(kind: Kind, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    #[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
    match kind {
        Kind::F2 => Box::new(bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
        Kind::F4 => Box::new(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))),
        Kind::F8 => Box::new(bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32)),
    }
}

/// The bytes before the values of a C-order `<f4` array, version 1, padded to 64 as NumPy does.
pub(super) fn header(shape: &[usize]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let sizes = if shape.len() > 1 { sizes.trim_end_matches(", ") } else { sizes.trim_end() };
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}");
    while (10 + text.len() + 1) % 64 != 0 {
        text.push(' ');
    }
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    #[expect(clippy::cast_possible_truncation, reason = "at most two sizes of twenty digits")]
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(version: u8, text: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((text.len() as u16).to_le_bytes()),
            _ => bytes.extend((text.len() as u32).to_le_bytes()),
        }
        bytes.extend(text.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn read(bytes: &[u8], turned: bool) -> Result<Vec<f32>, FormatError> {
        let mut source = bytes;
        let header = Header::read(&mut source, "a")?;
        assert_eq!(header.bytes as usize, bytes.len() - source.len());
        read_values(&mut source, &header, "a", turned)
    }

    #[test]
    fn every_version_type_and_order() {
        let f4: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let f8: Vec<u8> = [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let f2: Vec<u8> =
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        for version in 1..=3 {
            for (descr, data) in [("<f4", &f4), ("<f8", &f8), ("<f2", &f2)] {
                let c = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (2, 3), }}\n");
                let fortran = format!("{{\"shape\":(2,3),\"fortran_order\":True,\"descr\":\"{descr}\"}}");
                let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
                assert_eq!(read(&array(version, &c, data), false).unwrap(), rows);
                assert_eq!(read(&array(version, &c, data), true).unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
                assert_eq!(
                    read(&array(version, &fortran, data), false).unwrap(),
                    [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]
                );
                assert_eq!(read(&array(version, &fortran, data), true).unwrap(), rows);
            }
        }
    }

    #[test]
    fn written_headers_read_back() {
        for shape in [&[7usize][..], &[2, 3], &[2304, 16384]] {
            let bytes = header(shape);
            assert_eq!(bytes.len() % 64, 0);
            let read = Header::read(&mut &bytes[..], "a").unwrap();
            assert_eq!((read.shape, read.fortran, read.kind), (shape.to_vec(), false, Kind::F4));
        }
    }

    #[test]
    fn hostile_headers_are_errors() {
        for text in [
            "",
            "{",
            "{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551615,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': 3}",
        ] {
            assert!(read(&array(1, text, &[0; 16]), false).is_err(), "{text}");
        }
        assert!(read(&array(9, "{}", &[]), false).is_err());
        let mut huge = b"\x93NUMPY\x02\x00".to_vec();
        huge.extend(u32::MAX.to_le_bytes());
        assert!(Header::read(&mut &huge[..], "a").is_err());
    }
}
