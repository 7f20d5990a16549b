//! Reading, replacing and steering activations while the decoder runs.

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
        check_mask(&self.keep, point, value)?;
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

/// Adds `strength · direction` to the value at one tap, except at kept positions.
#[derive(Debug, Clone)]
pub struct Steerer {
    point: TapPoint,
    keep: Vec<bool>,
    step: Vec<f32>,
}

impl Steerer {
    /// `direction` is as wide as the site; `keep` has one entry a row of the batch (`batch · seq`).
    #[must_use]
    pub fn new(point: TapPoint, keep: Vec<bool>, direction: &[f32], strength: f32) -> Self {
        Self { point, keep, step: direction.iter().map(|d| strength * d).collect() }
    }
}

impl Tap for Steerer {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.point
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        check_mask(&self.keep, point, value)?;
        value.expect_width("steered activations", self.step.len())?;
        let mut out = value.data().to_vec();
        for (row, keep) in out.chunks_exact_mut(self.step.len()).zip(&self.keep) {
            if !keep {
                row.iter_mut().zip(&self.step).for_each(|(x, step)| *x += step);
            }
        }
        Ok(TapAction::Replace(out))
    }
}

fn check_mask(keep: &[bool], point: TapPoint, value: Rows<'_>) -> Result<(), LmError> {
    if keep.len() == value.n_rows() {
        return Ok(());
    }
    let (mask, rows) = (keep.len(), value.n_rows());
    Err(LmError::Tap { point, message: format!("the mask has {mask} positions, the batch {rows}") })
}

/// Several taps in one pass. At a point that several want, each sees what those before it made of the value.
#[derive(Default)]
pub struct Taps<'a>(Vec<&'a mut dyn Tap>);

impl std::fmt::Debug for Taps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Taps").field(&self.0.len()).finish()
    }
}

impl<'a> Taps<'a> {
    /// Taps in the order they are asked.
    #[must_use]
    pub fn new(taps: Vec<&'a mut dyn Tap>) -> Self {
        Self(taps)
    }
}

impl Tap for Taps<'_> {
    fn wants(&self, point: TapPoint) -> bool {
        self.0.iter().any(|tap| tap.wants(point))
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        let mut now: Option<Vec<f32>> = None;
        for tap in self.0.iter_mut().filter(|tap| tap.wants(point)) {
            let rows = match &now {
                Some(values) => Rows::new(values, value.width())?,
                None => value,
            };
            match tap.visit(point, rows)? {
                TapAction::Keep => {}
                TapAction::Replace(new) if new.len() == value.data().len() => now = Some(new),
                TapAction::Replace(new) => {
                    return Err(LmError::Replacement {
                        point,
                        expected: value.data().len(),
                        found: new.len(),
                    });
                }
            }
        }
        Ok(now.map_or(TapAction::Keep, TapAction::Replace))
    }
}
