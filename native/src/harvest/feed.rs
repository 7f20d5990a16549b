//! One pass of the language model over a few sequences, and which of its rows are kept.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use shared::Rows;
use shared::tap::TapPoint;

use super::plan::Keep;
use super::source::ActivationModel;
use crate::store::Tokens;

/// The model, the sequences it reads, and the taps that are wanted of it.
#[derive(Clone, Copy)]
pub(super) struct Feed<'a> {
    pub(super) model: &'a dyn ActivationModel,
    pub(super) tokens: &'a Tokens,
    pub(super) keep: Keep<'a>,
    /// Ascending, with the width of each.
    pub(super) taps: &'a [(TapPoint, usize)],
}

impl Feed<'_> {
    /// Runs sequences `range` through the model in one pass. `see(tap, rows, kept)` gets the rows of each tap once,
    /// and the indices of those that are stored, ascending.
    ///
    /// # Errors
    /// If the model fails or gives something else than was asked for, or `see` fails.
    pub(super) fn run(
        &self,
        range: Range<usize>,
        see: &mut dyn FnMut(usize, Rows<'_>, &[usize]) -> Result<()>,
    ) -> Result<()> {
        let length = self.tokens.sequence_length;
        let ids = &self.tokens.ids[range.start * length..range.end * length];
        let kept: Vec<usize> = ids
            .chunks_exact(length)
            .enumerate()
            .flat_map(|(i, sequence)| self.keep.positions(sequence).map(move |p| i * length + p as usize))
            .collect();
        let points: Vec<_> = self.taps.iter().map(|&(point, _)| point).collect();
        let mut seen = vec![false; points.len()];
        self.model.activations(ids, length, &points, &mut |point, value| {
            let tap = points.binary_search(&point).ok().context("the model gave a tap nobody asked for")?;
            value.expect_width("activations", self.taps[tap].1)?;
            ensure!(
                value.n_rows() == ids.len() && !seen[tap],
                "the model gave {} rows at {point}",
                value.n_rows()
            );
            seen[tap] = true;
            see(tap, value, &kept)
        })?;
        ensure!(seen.iter().all(|s| *s), "the model did not give every tap asked for");
        Ok(())
    }
}
