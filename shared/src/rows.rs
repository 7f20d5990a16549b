//! A checked row-major matrix view: the only shape in which activation vectors cross a seam.

use crate::error::{ShapeError, check_len};

/// A borrowed `[n_rows, width]` matrix, row-major, one activation vector a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rows<'a> {
    data: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    /// Views `data` as rows of `width` values.
    ///
    /// # Errors
    /// If `width` is zero or does not divide the number of values.
    pub fn new(data: &'a [f32], width: usize) -> Result<Self, ShapeError> {
        if width == 0 {
            return Err(ShapeError::Dimension { name: "rows", dimension: "width", value: 0 });
        }
        check_len("rows", &[data.len() / width, width], data.len())?;
        Ok(Self { data, width })
    }

    /// The number of rows.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.data.len() / self.width
    }

    /// The length of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// All values, row after row.
    #[must_use]
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Row `i`. Panics when `i` is not below [`Rows::n_rows`], as slice indexing does.
    #[must_use]
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.width..(i + 1) * self.width]
    }

    /// The rows in order.
    pub fn iter(&self) -> std::slice::ChunksExact<'a, f32> {
        self.data.chunks_exact(self.width)
    }

    /// Rows `start..end` as a view of their own; panics when out of range, as slicing does.
    #[must_use]
    pub fn slice(&self, start: usize, end: usize) -> Rows<'a> {
        Rows { data: &self.data[start * self.width..end * self.width], width: self.width }
    }

    /// `Ok` when rows have `expected` values each.
    ///
    /// # Errors
    /// Names `name`, the width wanted and the width found.
    pub fn expect_width(&self, name: &'static str, expected: usize) -> Result<(), ShapeError> {
        if self.width == expected {
            Ok(())
        } else {
            Err(ShapeError::Width { name, expected, found: self.width })
        }
    }
}

impl<'a> IntoIterator for Rows<'a> {
    type Item = &'a [f32];
    type IntoIter = std::slice::ChunksExact<'a, f32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_ragged_and_zero_width() {
        assert!(matches!(Rows::new(&[1.0, 2.0, 3.0], 2), Err(ShapeError::Length { .. })));
        assert!(matches!(Rows::new(&[], 0), Err(ShapeError::Dimension { .. })));
    }

    #[test]
    fn rows_are_contiguous() {
        let data = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let rows = Rows::new(&data, 2).unwrap();
        assert_eq!((rows.n_rows(), rows.row(1)), (3, &data[2..4]));
        assert_eq!(rows.slice(1, 3).data(), &data[2..6]);
    }
}
