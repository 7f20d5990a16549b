//! A loaded language model.

use crate::Rows;

use super::{LmError, Spec, Tap, TokenBatch, Until};

/// A language model that runs and can be tapped.
#[derive(Debug)]
pub struct LanguageModel {
    spec: Spec,
}

impl LanguageModel {
    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Runs the model; `tap` sees the points it wants. Logits `[batch · seq, vocab]`, or `None` when stopped before them.
    ///
    /// # Errors
    /// On ids outside the vocabulary, a layer that does not exist, and whatever the tap reports.
    pub fn forward(
        &self,
        _tokens: TokenBatch<'_>,
        _tap: &mut dyn Tap,
        _until: Until,
    ) -> Result<Option<Vec<f32>>, LmError> {
        Err(LmError::Backend("not built yet".to_owned()))
    }

    /// Next-token losses `[batch, seq − 1]` (as [`super::nll`]) without holding all logits at once.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`].
    pub fn forward_nll(&self, _tokens: TokenBatch<'_>, _tap: &mut dyn Tap) -> Result<Vec<f32>, LmError> {
        Err(LmError::Backend("not built yet".to_owned()))
    }

    /// Direct effect of residual directions on the logits: rows `[m, d_model]` scaled by the final norm's gain,
    /// times the unembedding, `[m, vocab]`.
    ///
    /// # Errors
    /// If the rows are not `d_model` wide.
    pub fn direct_logits(&self, _directions: Rows<'_>) -> Result<Vec<f32>, LmError> {
        Err(LmError::Backend("not built yet".to_owned()))
    }
}
