//! The value that a record has in the column that was asked for.

/// A value of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cell {
    /// Text, perhaps not valid UTF-8.
    Text(Vec<u8>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Nothing, or nothing that can be used.
    Other,
}

impl Cell {
    /// Ids, if all of the values are.
    pub(super) fn ids(values: impl Iterator<Item = Option<i64>>) -> Self {
        let ids = values.map(|value| u32::try_from(value?).ok()).collect::<Option<Vec<_>>>();
        ids.map_or(Self::Other, Self::Ids)
    }
}
