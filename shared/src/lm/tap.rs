//! Reading and replacing activations while the decoder runs.

use crate::Rows;
use crate::tap::TapPoint;

use super::LmError;

/// What the decoder calls at every tap point: harvesting reads, splicing replaces, steering adds.
pub trait Tap {
    /// Whether [`Tap::visit`] wants the values at `point`. Points nobody wants cost nothing.
    fn wants(&self, point: TapPoint) -> bool;

    /// Sees `value`, rows `[batch · seq, width]`, batch-major, and says whether it stays.
    ///
    /// # Errors
    /// Whatever the tap reports ends the forward pass.
    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError>;
}

/// What becomes of a tapped value.
#[derive(Debug, Clone, PartialEq)]
pub enum TapAction {
    /// The forward pass goes on with it.
    Keep,
    /// The forward pass goes on with these rows instead, `[batch · seq, width]`.
    Replace(Vec<f32>),
}

/// How far a forward pass runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Through this block (0-indexed, inclusive); no logits.
    Layer(usize),
    /// To the logits.
    Logits,
}

/// The tap that wants nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTap;

impl Tap for NoTap {
    fn wants(&self, _point: TapPoint) -> bool {
        false
    }

    fn visit(&mut self, _point: TapPoint, _value: Rows<'_>) -> Result<TapAction, LmError> {
        Ok(TapAction::Keep)
    }
}

/// Replaces the value at one tap by a function of its rows, except at kept positions.
///
/// Special tokens keep their own activation because no autoencoder is ever trained on them.
pub struct Splicer<F> {
    point: TapPoint,
    keep: Vec<bool>,
    replace: F,
}

impl<F> std::fmt::Debug for Splicer<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splicer")
            .field("point", &self.point)
            .field("kept", &self.keep.len())
            .finish_non_exhaustive()
    }
}

impl<F: FnMut(Rows<'_>) -> Result<Vec<f32>, LmError>> Splicer<F> {
    /// `replace` gets only the rows whose `keep` is false, in order, and returns as many rows of the same width.
    /// `keep` has one entry a row of the batch (`batch · seq`).
    pub fn new(point: TapPoint, keep: Vec<bool>, replace: F) -> Self {
        Self { point, keep, replace }
    }
}

impl<F: FnMut(Rows<'_>) -> Result<Vec<f32>, LmError>> Tap for Splicer<F> {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.point
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        let width = value.width();
        if self.keep.len() != value.n_rows() {
            let (mask, rows) = (self.keep.len(), value.n_rows());
            return Err(LmError::Tap {
                point,
                message: format!("the mask has {mask} positions, the batch {rows}"),
            });
        }
        let replaced = || value.iter().zip(&self.keep).filter(|(_, keep)| !**keep).map(|(row, _)| row);
        let spliced: Vec<f32> = replaced().flatten().copied().collect();
        if spliced.is_empty() {
            return Ok(TapAction::Keep);
        }
        let new = (self.replace)(Rows::new(&spliced, width)?)?;
        if new.len() != spliced.len() {
            return Err(LmError::Replacement { point, expected: spliced.len(), found: new.len() });
        }
        let mut rows = new.chunks_exact(width);
        let mut out = value.data().to_vec();
        for (row, keep) in out.chunks_exact_mut(width).zip(&self.keep) {
            if let (false, Some(from)) = (*keep, if *keep { None } else { rows.next() }) {
                row.copy_from_slice(from);
            }
        }
        Ok(TapAction::Replace(out))
    }
}
