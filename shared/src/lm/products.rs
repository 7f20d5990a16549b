//! The seam through which matrix products and attention use vector units and cores that `shared` knows nothing of.

use super::{Heads, LmError};

/// A weight matrix `[out, in]`, kept in whatever number format and order its maker likes.
pub trait Packed: Send + Sync + std::fmt::Debug {
    /// The number of rows, `out`.
    fn n_out(&self) -> usize;

    /// The number of columns, `in`.
    fn n_in(&self) -> usize;

    /// Row `i` into `row`, which is `n_in` long; `i` is below `n_out`.
    fn row(&self, i: usize, row: &mut [f32]);

    /// `out = x Wᵀ`, or `out += x Wᵀ` when `add`, for rows `x [m, n_in]` and `out [m, n_out]`.
    ///
    /// # Errors
    /// If the lengths do not fit each other.
    fn product(&self, x: &[f32], out: &mut [f32], add: bool) -> Result<(), LmError>;
}

/// Rotated heads of whole sequences, as attention takes them.
#[derive(Debug, Clone, Copy)]
pub struct QueryKeyValue<'a> {
    /// Queries `[batch · n_kv_heads, seq · group, head_dim]`, where `group` query heads share a key head.
    pub queries: &'a [f32],
    /// Keys `[batch · n_kv_heads, seq, head_dim]`.
    pub keys: &'a [f32],
    /// Values, as keys.
    pub values: &'a [f32],
}

/// Products by other means than candle's.
pub trait Products: Send + Sync + std::fmt::Debug {
    /// Takes a weight matrix `[n_out, n_in]`; `None` leaves it to candle.
    ///
    /// # Errors
    /// If the values do not fill the shape.
    fn pack(&self, weight: &[f32], n_out: usize, n_in: usize) -> Result<Option<Box<dyn Packed>>, LmError>;

    /// Causal attention after the rotary embedding into rows `out [batch · seq, n_heads · head_dim]`; `false` leaves
    /// it to candle.
    ///
    /// # Errors
    /// If the lengths do not fit each other.
    fn attend(
        &self,
        heads: &Heads,
        seq: usize,
        inputs: QueryKeyValue<'_>,
        out: &mut [f32],
    ) -> Result<bool, LmError>;
}

/// Everything by candle.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleProducts;

impl Products for CandleProducts {
    fn pack(&self, _: &[f32], _: usize, _: usize) -> Result<Option<Box<dyn Packed>>, LmError> {
        Ok(None)
    }

    fn attend(&self, _: &Heads, _: usize, _: QueryKeyValue<'_>, _: &mut [f32]) -> Result<bool, LmError> {
        Ok(false)
    }
}
