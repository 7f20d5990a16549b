//! Which activation vectors an autoencoder speaks about, by their norm.
//!
//! Training leaves out massive activations (`train::normalise`): vectors many times longer than the rest, at a few
//! positions that serve as attention sinks. The limit travels with the autoencoder, and whoever applies it to a
//! language model treats longer vectors as it treats BOS: not measured, not shown, left as they are when spliced.

use std::borrow::Cow;

use shared::Rows;

use crate::sae_files::SaeFile;

/// The key of the limit in an autoencoder's provenance; absent or null when there is none.
pub const PROVENANCE_KEY: &str = "max_input_norm";

/// The largest norm of a raw vector that an autoencoder was trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputLimit(f64);

impl InputLimit {
    /// No limit.
    pub const NONE: Self = Self(f64::INFINITY);

    /// The limit recorded with an autoencoder; one from elsewhere has none.
    #[must_use]
    pub fn of(file: &SaeFile) -> Self {
        Self::new(file.metadata.provenance.get(PROVENANCE_KEY).and_then(serde_json::Value::as_f64))
    }

    /// A recorded limit; what is not positive is none.
    #[must_use]
    pub fn new(recorded: Option<f64>) -> Self {
        recorded.filter(|limit| *limit > 0.0).map_or(Self::NONE, Self)
    }

    /// The smaller of two limits.
    #[must_use]
    pub fn stricter(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }

    /// The limit, when there is one.
    #[must_use]
    pub fn norm(self) -> Option<f64> {
        self.0.is_finite().then_some(self.0)
    }

    /// Whether a raw vector is within the limit; one that is not finite is, so that its reader can complain.
    #[must_use]
    pub fn keeps(self, x: &[f32]) -> bool {
        let norm = shared::reference::dot(x, x).sqrt();
        norm <= self.0 || !norm.is_finite()
    }

    /// The rows within the limit, in order.
    #[must_use]
    pub fn within(self, rows: Rows<'_>) -> Cow<'_, [f32]> {
        if self.norm().is_none() || rows.iter().all(|x| self.keeps(x)) {
            return Cow::Borrowed(rows.data());
        }
        Cow::Owned(rows.iter().filter(|x| self.keeps(x)).flatten().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_beyond_the_limit_are_left_out() {
        let data = [3.0, 4.0, 0.0, 6.0, f32::NAN, 0.0];
        let rows = Rows::new(&data, 2).unwrap();
        let limit = InputLimit(5.0).stricter(InputLimit::NONE);
        assert_eq!(limit.within(rows.slice(0, 2)).as_ref(), &data[..2]);
        assert_eq!(limit.within(rows).len(), 4, "what is not finite is not hidden");
        assert!(matches!(InputLimit::NONE.within(rows), Cow::Borrowed(all) if all.len() == 6));
    }
}
