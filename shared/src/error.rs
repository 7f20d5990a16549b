//! Errors about shapes and values, shared by every module: what was wanted, and what was found.

/// A tensor, vector or index that does not fit where it was put.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A buffer whose length is not the product of its dimensions.
    #[error("{name}: expected {expected} values for shape {shape:?}, found {found}")]
    Length {
        /// What the buffer is called.
        name: &'static str,
        /// The shape that was asked for.
        shape: Vec<usize>,
        /// The number of values that shape needs.
        expected: usize,
        /// The number of values given.
        found: usize,
    },
    /// Rows of another width than the operation takes.
    #[error("{name}: expected rows of width {expected}, found {found}")]
    Width {
        /// What the rows are called.
        name: &'static str,
        /// The width that was asked for.
        expected: usize,
        /// The width given.
        found: usize,
    },
    /// A dimension that must be positive is zero, or a product of dimensions overflows.
    #[error("{name}: dimension {dimension} is {value}, which is not usable")]
    Dimension {
        /// What the dimension belongs to.
        name: &'static str,
        /// Which dimension.
        dimension: &'static str,
        /// Its value.
        value: usize,
    },
    /// A value that must be finite, or finite and not negative, is not.
    #[error("{name}: value at index {index} is {value}, expected {expected}")]
    Value {
        /// What the buffer is called.
        name: &'static str,
        /// The flat index of the first offending value.
        index: usize,
        /// The value, printed.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A latent index outside the dictionary, or latents of one row that are not strictly ascending.
    #[error("codes: latent {latent} at entry {entry} is out of range or out of order (width {n_latents})")]
    Latent {
        /// The offending latent.
        latent: u32,
        /// Its position in the entry list.
        entry: usize,
        /// The number of latents.
        n_latents: usize,
    },
}

/// `Ok` when `found` values fill `shape` exactly.
pub(crate) fn check_len(name: &'static str, shape: &[usize], found: usize) -> Result<(), ShapeError> {
    let expected = shape
        .iter()
        .try_fold(1usize, |acc, &n| acc.checked_mul(n))
        .ok_or(ShapeError::Dimension { name, dimension: "product", value: usize::MAX })?;
    if expected == found {
        Ok(())
    } else {
        Err(ShapeError::Length { name, shape: shape.to_vec(), expected, found })
    }
}

/// `Ok` when every value is finite.
pub(crate) fn check_finite(name: &'static str, values: &[f32]) -> Result<(), ShapeError> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(ShapeError::Value {
            name,
            index,
            value: values[index].to_string(),
            expected: "a finite number",
        }),
    }
}
