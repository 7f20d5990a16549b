//! What a bucket holds: which sequences, which of their vectors, and in which order they are written.

use std::ops::Range;

use super::random;
use crate::store::manifest::{Dropped, TokenizerInfo};
use crate::store::{Split, Tokens};

/// Which vectors of a token sequence are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keep<'a> {
    pub(super) tokenizer: &'a TokenizerInfo,
    pub(super) dropped: &'a Dropped,
}

impl Keep<'_> {
    /// The stored positions of `sequence`, ascending. The same rule as [`crate::store::Manifest::keeps`].
    pub(super) fn positions(self, sequence: &[u32]) -> impl Iterator<Item = u32> {
        sequence
            .iter()
            .zip(0u32..)
            .filter(move |&(&id, position)| self.dropped.keeps(self.tokenizer, position, id))
            .map(|(_, position)| position)
    }

    /// The number of stored vectors of sequences `range`.
    pub(super) fn count(self, tokens: &Tokens, range: Range<usize>) -> usize {
        range.map(|i| self.positions(tokens.sequence(i)).count()).sum()
    }
}

/// Consecutive sequences whose vectors are shuffled together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    pub(super) sequences: Range<usize>,
    pub(super) n_vectors: usize,
}

/// Divides `tokens` into buckets of at most `most` vectors (and at least one sequence), none empty.
pub(super) fn buckets(tokens: &Tokens, keep: Keep<'_>, most: u64) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut current = Bucket { sequences: 0..0, n_vectors: 0 };
    for i in 0..tokens.n_sequences() {
        let n = keep.positions(tokens.sequence(i)).count();
        if current.n_vectors > 0 && (current.n_vectors + n) as u64 > most {
            buckets.push(std::mem::replace(&mut current, Bucket { sequences: i..i, n_vectors: 0 }));
        }
        current.sequences.end = i + 1;
        current.n_vectors += n;
    }
    if current.n_vectors > 0 {
        buckets.push(current);
    }
    buckets
}

/// Where each vector of a bucket came from, as it comes out of the model, and the order it is written in.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) sequences: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// `order[i]` is the vector written as number `i`.
    pub(super) order: Vec<u32>,
}

/// The layout of bucket `index` of `split`; the same for every tap.
pub(super) fn layout(
    tokens: &Tokens,
    keep: Keep<'_>,
    bucket: &Bucket,
    seed: u64,
    split: Split,
    index: usize,
) -> Layout {
    let (mut sequences, mut positions) =
        (Vec::with_capacity(bucket.n_vectors), Vec::with_capacity(bucket.n_vectors));
    for i in bucket.sequences.clone() {
        let before = positions.len();
        positions.extend(keep.positions(tokens.sequence(i)));
        // Sequences are fewer than 2^32, vectors of a bucket too: both checked with the configuration.
        sequences.resize(sequences.len() + positions.len() - before, i as u32);
    }
    let order = random::permutation(positions.len() as u32, seed, split.folder(), index as u64);
    Layout { sequences, positions, order }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_sequence_once_and_respect_the_limit() {
        let tokenizer = TokenizerInfo {
            vocab_size: 9,
            bos: None,
            separator: None,
            special_ids: vec![7, 8],
            dropped_ids: vec![],
        };
        let dropped = Dropped { special_tokens: true, positions: vec![0] };
        let keep = Keep { tokenizer: &tokenizer, dropped: &dropped };
        // Vectors kept: 2, 1, 0, 2, 2.
        let tokens = Tokens { sequence_length: 3, ids: vec![0, 1, 2, 0, 7, 2, 0, 8, 7, 7, 1, 2, 3, 4, 5] };
        let made = buckets(&tokens, keep, 3);
        assert_eq!(
            made.iter().map(|b| (b.sequences.clone(), b.n_vectors)).collect::<Vec<_>>(),
            [(0..3, 3), (3..4, 2), (4..5, 2)]
        );
        assert_eq!(buckets(&tokens, keep, 1).len(), 4);
        assert_eq!(keep.count(&tokens, 0..5), 7);
        let layout = layout(&tokens, keep, &made[0], 0, Split::Train, 0);
        assert_eq!((layout.sequences, layout.positions), (vec![0, 0, 1], vec![1, 2, 2]));
    }
}
