//! Named float tensors in safetensors bytes: opened strictly, read as f32, written as f32.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, View};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::error::FormatError;

/// A parsed safetensors file under the name used in messages.
#[derive(Debug)]
pub struct TensorFile<'a> {
    part: &'a str,
    tensors: SafeTensors<'a>,
}

/// A tensor read as f32, with the shape it was stored in.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub data: Vec<f32>,
}

impl<'a> TensorFile<'a> {
    /// Parses `bytes`; `part` names the file in messages.
    ///
    /// # Errors
    /// If the header does not describe exactly these bytes, or names a tensor twice.
    pub fn open(part: &'a str, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| FormatError::container(part, e))?;
        // The parser keeps one of two entries of the same name, so the header is looked at once more.
        if let Some(name) = repeated_name(bytes) {
            return Err(FormatError::field(part, &name, "one tensor of this name", "several"));
        }
        Ok(Self { part, tensors })
    }

    /// Whether a tensor of this name exists.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    /// The names in the file, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names = self.tensors.names();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor without reading it.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, FormatError> {
        Ok(self.view(name)?.shape().to_vec())
    }

    /// A float tensor of any precision as f32.
    ///
    /// # Errors
    /// If there is no such tensor, or it is not f64, f32, f16 or bf16.
    pub fn read(&self, name: &str) -> Result<Tensor, FormatError> {
        let view = self.view(name)?;
        let data = to_f32(view.dtype(), view.data()).ok_or_else(|| {
            FormatError::field(
                self.part,
                name,
                "a float type (F32, F16, BF16 or F64)",
                format!("{:?}", view.dtype()),
            )
        })?;
        Ok(Tensor { shape: view.shape().to_vec(), data })
    }

    /// [`TensorFile::read`] of a matrix `[rows, cols]`.
    ///
    /// # Errors
    /// As [`TensorFile::read`], and if the tensor has another number of dimensions.
    pub fn matrix(&self, name: &str) -> Result<(usize, usize, Vec<f32>), FormatError> {
        let shape = self.shape(name)?;
        match shape[..] {
            [rows, cols] => Ok((rows, cols, self.read(name)?.data)),
            _ => Err(FormatError::field(self.part, name, "a matrix", format!("shape {shape:?}"))),
        }
    }

    /// [`TensorFile::read`] of a tensor that must have exactly this shape.
    ///
    /// # Errors
    /// As [`TensorFile::read`], and if the shape is another.
    pub fn exact(&self, name: &str, wanted: &[usize]) -> Result<Vec<f32>, FormatError> {
        let shape = self.shape(name)?;
        if shape == wanted {
            Ok(self.read(name)?.data)
        } else {
            Err(FormatError::field(self.part, name, format!("shape {wanted:?}"), format!("shape {shape:?}")))
        }
    }

    fn view(&self, name: &str) -> Result<TensorView<'a>, FormatError> {
        self.tensors.tensor(name).map_err(|_| {
            FormatError::field(
                self.part,
                name,
                "a tensor of this name",
                format!("only {}", self.names().join(", ")),
            )
        })
    }
}

/// Little-endian floats as f32; `None` for a type that is not a float of at least 16 bits.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    #[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
        _ => return None,
    })
}

/// The first name the JSON header holds twice.
fn repeated_name(bytes: &[u8]) -> Option<String> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
            let (mut seen, mut repeated) = (HashSet::new(), None);
            while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                if !seen.insert(name.clone()) {
                    repeated.get_or_insert(name);
                }
            }
            Ok(repeated)
        }
    }
    let (length, rest) = bytes.split_at_checked(8)?;
    let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    serde_json::Deserializer::from_slice(rest.get(..length)?).deserialize_map(Names).ok().flatten()
}

/// An f32 tensor on its way into a file.
struct Outgoing<'a> {
    shape: Vec<usize>,
    data: &'a [f32],
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            Cow::Borrowed(bytemuck::cast_slice(self.data))
        } else {
            Cow::Owned(self.data.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    }

    fn data_len(&self) -> usize {
        size_of_val(self.data)
    }
}

/// A safetensors file of f32 tensors `(name, shape, values)`.
///
/// # Errors
/// If a shape does not fit its values.
pub fn serialize(part: &str, tensors: &[(&str, &[usize], &[f32])]) -> Result<Vec<u8>, FormatError> {
    for &(name, shape, data) in tensors {
        if shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n)) != Some(data.len()) {
            return Err(FormatError::field(part, name, format!("values for shape {shape:?}"), data.len()));
        }
    }
    let views = tensors.iter().map(|&(name, shape, data)| (name, Outgoing { shape: shape.to_vec(), data }));
    safetensors::serialize(views, None).map_err(|e| FormatError::container(part, e))
}

/// `[rows, cols]` to `[cols, rows]`, in tiles so that neither side misses the cache on every value.
#[must_use]
pub(crate) fn transpose(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; data.len()];
    scatter_transposed(&mut out, data, rows, cols, 0, rows);
    out
}

/// Writes `panel`, rows `first..first + panel_rows` of a `[rows, cols]` matrix, into `out [cols, rows]`.
pub(crate) fn scatter_transposed(
    out: &mut [f32],
    panel: &[f32],
    rows: usize,
    cols: usize,
    first: usize,
    panel_rows: usize,
) {
    const TILE: usize = 32;
    for row_tile in (0..panel_rows).step_by(TILE) {
        for col_tile in (0..cols).step_by(TILE) {
            for col in col_tile..(col_tile + TILE).min(cols) {
                for row in row_tile..(row_tile + TILE).min(panel_rows) {
                    out[col * rows + first + row] = panel[row * cols + col];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_reads_as_f32() {
        let values = [1.5f32, -0.25, 3.0, 64.0];
        let bytes = |dtype| -> Vec<u8> {
            match dtype {
                Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
                Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
            }
        };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
            let data = bytes(dtype);
            let view = TensorView::new(dtype, vec![2, 2], &data).unwrap();
            let file = safetensors::serialize([("w", view)], None).unwrap();
            let read = TensorFile::open("t", &file).unwrap().exact("w", &[2, 2]).unwrap();
            assert_eq!(read, values, "{dtype:?}");
        }
        let data = bytes(Dtype::I32);
        let file =
            safetensors::serialize([("w", TensorView::new(Dtype::I32, vec![4], &data).unwrap())], None);
        let file = file.unwrap();
        let error = TensorFile::open("t", &file).unwrap().read("w").unwrap_err().to_string();
        assert!(error.contains("t: w: wanted a float type") && error.contains("I32"), "{error}");
    }

    #[test]
    fn repeated_names_truncation_and_wrong_shapes_are_refused() {
        let entry = r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let header = format!("{{{entry},{entry}}}");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0u8; 4]);
        assert!(TensorFile::open("t", &bytes).is_err());

        let good = serialize("t", &[("w", &[2, 3], &[0.5; 6])]).unwrap();
        assert!(TensorFile::open("t", &good).unwrap().exact("w", &[3, 2]).is_err());
        assert!(TensorFile::open("t", &good).unwrap().read("v").is_err());
        for length in 0..good.len() {
            assert!(TensorFile::open("t", &good[..length]).is_err(), "cut at {length}");
        }
        assert!(serialize("t", &[("w", &[usize::MAX, 2], &[])]).is_err());
    }

    #[test]
    fn transposing_twice_is_the_identity() {
        let data: Vec<f32> = (0..35 * 67).map(|i| i as f32).collect();
        let turned = transpose(&data, 35, 67);
        assert_eq!(turned[3 * 35 + 2], data[2 * 67 + 3]);
        assert_eq!(transpose(&turned, 67, 35), data);
    }
}
