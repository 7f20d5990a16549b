//! Typed, exact reading and writing of small safetensors files: the names asked for and no others.

use std::collections::BTreeMap;

use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::error::{PackError, check};

/// A little-endian number as safetensors stores it.
pub(super) trait Element: Copy {
    /// The type's name in the file.
    const DTYPE: Dtype;
    /// Bytes of one value.
    const SIZE: usize;
    /// One value from exactly [`Element::SIZE`] bytes.
    fn read(bytes: &[u8]) -> Option<Self>;
    /// Appends the value's bytes.
    fn write(self, out: &mut Vec<u8>);
    /// Whether the value may appear in a pack: anything but NaN and infinities.
    fn is_allowed(self) -> bool;
}

macro_rules! element {
    ($type:ty, $dtype:expr, $allowed:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = $dtype;
            const SIZE: usize = size_of::<$type>();
            fn read(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(<$type>::from_le_bytes)
            }
            fn write(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn is_allowed(self) -> bool {
                let allowed: fn($type) -> bool = $allowed;
                allowed(self)
            }
        }
    };
}
element!(f32, Dtype::F32, f32::is_finite);
element!(f16, Dtype::F16, f16::is_finite);
element!(u32, Dtype::U32, |_| true);
element!(u16, Dtype::U16, |_| true);
element!(u8, Dtype::U8, |_| true);

/// A parsed safetensors file that holds exactly the tensors asked for.
pub(super) struct Reader<'a> {
    file: &'a str,
    tensors: SafeTensors<'a>,
}

impl<'a> Reader<'a> {
    /// Parses `bytes`; `names` must be exactly the tensors inside.
    pub(super) fn new(file: &'a str, bytes: &'a [u8], names: &[&str]) -> Result<Self, PackError> {
        let tensors = SafeTensors::deserialize(bytes)
            .map_err(|e| PackError::Tensors { file: file.to_owned(), reason: e.to_string() })?;
        for found in tensors.names() {
            check(names.contains(&found), file, "tensors", format!("only {}", names.join(", ")), found)?;
        }
        Ok(Self { file, tensors })
    }

    /// Whether `name`, one of the tensors asked for, is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    /// The shape of `name`.
    pub(super) fn shape(&self, name: &str) -> Result<Vec<usize>, PackError> {
        Ok(self.view(name)?.shape().to_vec())
    }

    /// The values of `name`, which must have this type and shape; floats must be finite.
    pub(super) fn values<T: Element>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>, PackError> {
        let view = self.view(name)?;
        let (wanted, found) =
            (format!("{:?} {shape:?}", T::DTYPE), format!("{:?} {:?}", view.dtype(), view.shape()));
        check(view.dtype() == T::DTYPE && view.shape() == shape, self.file, name, wanted, found)?;
        // The parser has proven that the data is as long as type and shape say.
        let values: Vec<T> = view.data().chunks_exact(T::SIZE).filter_map(T::read).collect();
        if let Some(index) = values.iter().position(|v| !v.is_allowed()) {
            return Err(PackError::invalid(
                self.file,
                name,
                "finite values",
                format!("NaN or infinity at {index}"),
            ));
        }
        Ok(values)
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, PackError> {
        self.tensors
            .tensor(name)
            .map_err(|_| PackError::invalid(self.file, "tensors", name, "no such tensor"))
    }
}

/// Collects tensors and serialises them in name order.
pub(super) struct Writer<'a> {
    file: &'a str,
    tensors: BTreeMap<&'static str, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl<'a> Writer<'a> {
    /// An empty file, called `file` in errors.
    pub(super) fn new(file: &'a str) -> Self {
        Self { file, tensors: BTreeMap::new() }
    }

    /// Adds a tensor; `values` must fill `shape`.
    pub(super) fn add<T: Element>(
        &mut self,
        name: &'static str,
        shape: &[usize],
        values: impl IntoIterator<Item = T>,
    ) -> Result<(), PackError> {
        let mut bytes = Vec::new();
        for (index, value) in values.into_iter().enumerate() {
            check(
                value.is_allowed(),
                self.file,
                name,
                "finite values",
                format!("NaN or infinity at {index}"),
            )?;
            value.write(&mut bytes);
        }
        let wanted: usize = shape.iter().product();
        check(
            bytes.len() == wanted * T::SIZE,
            self.file,
            name,
            format!("{wanted} values"),
            bytes.len() / T::SIZE,
        )?;
        self.tensors.insert(name, (T::DTYPE, shape.to_vec(), bytes));
        Ok(())
    }

    /// The file.
    pub(super) fn finish(self) -> Result<Vec<u8>, PackError> {
        let file = self.file;
        let failed = |e: safetensors::SafeTensorError| PackError::Tensors {
            file: file.to_owned(),
            reason: e.to_string(),
        };
        let views: Vec<(&str, TensorView<'_>)> = self
            .tensors
            .iter()
            .map(|(&name, (dtype, shape, bytes))| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)))
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        serialize(views, None).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let mut writer = Writer::new("t");
        writer.add("a", &[2, 2], [1.0f32, 2.0, 3.0, 4.0]).unwrap();
        writer.add("b", &[0], Vec::<u16>::new()).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn round_trip_and_exact_names() {
        let bytes = file();
        let reader = Reader::new("t", &bytes, &["a", "b"]).unwrap();
        assert_eq!(reader.values::<f32>("a", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        assert!(reader.values::<u16>("b", &[0]).unwrap().is_empty());
        assert!(Reader::new("t", &bytes, &["a"]).is_err(), "a stray tensor is refused");
        assert!(reader.values::<f32>("a", &[4]).is_err(), "another shape is refused");
        assert!(reader.values::<u32>("a", &[2, 2]).is_err(), "another type is refused");
        assert!(reader.values::<u32>("c", &[1]).is_err(), "a missing tensor is refused");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = file();
        for end in 0..bytes.len() {
            assert!(Reader::new("t", &bytes[..end], &["a", "b"]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn nan_is_refused_both_ways() {
        assert!(Writer::new("t").add("a", &[1], [f32::NAN]).is_err());
        let mut bytes = file();
        let last = bytes.len();
        bytes[last - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        let reader = Reader::new("t", &bytes, &["a", "b"]).unwrap();
        assert!(reader.values::<f32>("a", &[2, 2]).is_err());
    }
}
