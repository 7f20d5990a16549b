//! All activations of a bounded set of sequences, sparse, reachable by token and by latent.
//!
//! A store keeps vectors shuffled; examples need them in reading order. Codes are small (L0 entries of
//! eight bytes a token), so they are regrouped in memory, bounded by the caller's choice of sequences.

use anyhow::{Result, bail, ensure};
use shared::Codes;

/// Activations of whole sequences in both orders.
#[derive(Debug)]
pub struct ActivationTable {
    sequence_length: usize,
    ids: Vec<u32>,
    n_latents: usize,
    n_encoded: u64,
    by_token: Sparse,
    by_latent: Sparse,
}

/// Compressed sparse rows: `keys[offsets[i]..offsets[i + 1]]` ascend.
#[derive(Debug, Default)]
struct Sparse {
    offsets: Vec<usize>,
    keys: Vec<u32>,
    values: Vec<f32>,
}

impl Sparse {
    fn row(&self, i: usize) -> (&[u32], &[f32]) {
        let range = self.offsets[i]..self.offsets[i + 1];
        (&self.keys[range.clone()], &self.values[range])
    }
}

/// Collects batches of codes in whatever order the store has them.
#[derive(Debug)]
pub struct TableBuilder {
    sequence_length: usize,
    ids: Vec<u32>,
    n_latents: usize,
    batches: Vec<(Vec<u32>, Codes)>,
}

impl TableBuilder {
    /// For sequences with these token ids, `[n_sequences · sequence_length]`.
    ///
    /// # Errors
    /// If the ids do not fill whole sequences, or there are more than fit 32-bit token numbers.
    pub fn new(ids: Vec<u32>, sequence_length: usize, n_latents: usize) -> Result<Self> {
        ensure!(
            sequence_length > 0 && ids.len().is_multiple_of(sequence_length),
            "ids must fill whole sequences"
        );
        ensure!(u32::try_from(ids.len()).is_ok(), "{} tokens are too many; use fewer", ids.len());
        Ok(Self { sequence_length, ids, n_latents, batches: Vec::new() })
    }

    /// The number of a token, when its sequence is among those collected.
    #[must_use]
    pub fn token(&self, sequence: u32, position: u32) -> Option<u32> {
        let length = self.sequence_length;
        let token = (sequence as usize).checked_mul(length)?.checked_add(position as usize)?;
        ((position as usize) < length && token < self.ids.len()).then(|| u32::try_from(token).ok())?
    }

    /// Adds the codes of these tokens, row by row.
    ///
    /// # Errors
    /// If there are not as many tokens as rows, a token is out of range, or the width is another.
    pub fn push(&mut self, tokens: Vec<u32>, codes: Codes) -> Result<()> {
        ensure!(
            tokens.len() == codes.n_rows(),
            "{} tokens for {} rows of codes",
            tokens.len(),
            codes.n_rows()
        );
        ensure!(
            codes.n_latents() == self.n_latents,
            "codes of width {}, not {}",
            codes.n_latents(),
            self.n_latents
        );
        ensure!(
            tokens.iter().all(|&t| (t as usize) < self.ids.len()),
            "a token outside the collected sequences"
        );
        self.batches.push((tokens, codes));
        Ok(())
    }

    /// Regroups everything.
    ///
    /// # Errors
    /// If a token was given twice.
    pub fn finish(self) -> Result<ActivationTable> {
        let (mut counts, mut seen) = (vec![0usize; self.ids.len()], vec![false; self.ids.len()]);
        let mut n_encoded = 0;
        for (tokens, codes) in &self.batches {
            for (&token, (latents, _)) in tokens.iter().zip(codes.iter()) {
                if std::mem::replace(&mut seen[token as usize], true) {
                    bail!("token {token} appears twice in the store");
                }
                counts[token as usize] = latents.len();
                n_encoded += 1;
            }
        }
        let mut by_token = allocate(&counts);
        for (tokens, codes) in self.batches {
            for (&token, (latents, values)) in tokens.iter().zip(codes.iter()) {
                let start = by_token.offsets[token as usize];
                by_token.keys[start..start + latents.len()].copy_from_slice(latents);
                by_token.values[start..start + latents.len()].copy_from_slice(values);
            }
        }
        let by_latent = transpose(&by_token, self.n_latents);
        let Self { sequence_length, ids, n_latents, .. } = self;
        Ok(ActivationTable { sequence_length, ids, n_latents, n_encoded, by_token, by_latent })
    }
}

/// Empty rows of these lengths.
fn allocate(counts: &[usize]) -> Sparse {
    let mut offsets = Vec::with_capacity(counts.len() + 1);
    let mut sum = 0;
    offsets.push(0);
    for count in counts {
        sum += count;
        offsets.push(sum);
    }
    Sparse { offsets, keys: vec![0; sum], values: vec![0.0; sum] }
}

/// Rows become columns; because tokens are walked in order, the keys of each new row ascend.
fn transpose(rows: &Sparse, n_columns: usize) -> Sparse {
    let mut counts = vec![0usize; n_columns];
    for &key in &rows.keys {
        counts[key as usize] += 1;
    }
    let mut columns = allocate(&counts);
    let mut next = columns.offsets.clone();
    for (row, number) in (0..rows.offsets.len().saturating_sub(1)).zip(0u32..) {
        let (keys, values) = rows.row(row);
        for (&key, &value) in keys.iter().zip(values) {
            let at = next[key as usize];
            (columns.keys[at], columns.values[at]) = (number, value);
            next[key as usize] += 1;
        }
    }
    columns
}

impl ActivationTable {
    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.n_latents
    }

    /// Tokens whose vectors were encoded: the denominator of densities.
    #[must_use]
    pub fn n_encoded(&self) -> u64 {
        self.n_encoded
    }

    /// The tokens on which `latent` is active, ascending, and its activations there.
    #[must_use]
    pub fn firings(&self, latent: usize) -> (&[u32], &[f32]) {
        self.by_latent.row(latent)
    }

    /// The activation of `latent` on `token`; zero where it is not active or the token was not encoded.
    #[must_use]
    pub fn value(&self, token: u32, latent: u32) -> f32 {
        let (latents, values) = self.by_token.row(token as usize);
        latents.binary_search(&latent).map_or(0.0, |k| values[k])
    }

    /// The id of token number `token`.
    #[must_use]
    pub fn id(&self, token: u32) -> u32 {
        self.ids[token as usize]
    }

    /// The tokens within `before` and `after` of `token` that are in the same sequence.
    #[must_use]
    pub fn window(&self, token: u32, before: usize, after: usize) -> std::ops::Range<u32> {
        let length = u32::try_from(self.sequence_length).unwrap_or(u32::MAX);
        let (sequence, position) = (token / length, token % length);
        let before = u32::try_from(before).unwrap_or(u32::MAX);
        let after = u32::try_from(after).unwrap_or(u32::MAX).saturating_add(1);
        let (start, end) = (position.saturating_sub(before), position.saturating_add(after).min(length));
        sequence * length + start..sequence * length + end
    }

    /// The sequence of a token and its position there.
    #[must_use]
    pub fn place(&self, token: u32) -> (u32, u32) {
        let length = u32::try_from(self.sequence_length).unwrap_or(u32::MAX);
        (token / length, token % length)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use shared::CodesBuilder;

    /// A table from `(token, [(latent, value)])` rows, given in store order.
    pub(in crate::features) fn table(
        ids: &[u32],
        length: usize,
        n_latents: usize,
        rows: &[(u32, Vec<(u32, f32)>)],
    ) -> Result<ActivationTable> {
        let mut builder = TableBuilder::new(ids.to_vec(), length, n_latents)?;
        for batch in rows.chunks(2) {
            let mut codes = CodesBuilder::new(n_latents);
            for (_, row) in batch {
                row.iter().for_each(|&(latent, value)| codes.push(latent, value));
                codes.end_row()?;
            }
            builder.push(batch.iter().map(|r| r.0).collect(), codes.finish())?;
        }
        builder.finish()
    }

    #[test]
    fn shuffled_rows_come_back_in_reading_order() {
        let rows = [(5, vec![(0, 5.0), (2, 5.5)]), (1, vec![(2, 1.0)]), (4, vec![]), (3, vec![(2, 3.0)])];
        let table = table(&[9, 8, 7, 6, 5, 4], 3, 3, &rows).unwrap();
        assert_eq!(table.firings(2), (&[1u32, 3, 5][..], &[1.0f32, 3.0, 5.5][..]));
        assert_eq!(table.firings(1), (&[][..], &[][..]));
        assert_eq!((table.value(5, 0), table.value(5, 1), table.value(0, 2)), (5.0, 0.0, 0.0));
        assert_eq!((table.n_encoded(), table.id(5), table.place(5)), (4, 4, (1, 2)));
        assert_eq!((table.window(4, 9, 9), table.window(4, 0, 1), table.window(2, 1, 1)), (3..6, 4..6, 1..3));
    }

    #[test]
    fn tokens_given_twice_or_outside_are_refused() {
        assert!(table(&[1, 2], 2, 3, &[(0, vec![]), (0, vec![])]).is_err());
        assert!(table(&[1, 2], 2, 3, &[(2, vec![])]).is_err());
        assert!(TableBuilder::new(vec![1, 2, 3], 2, 3).is_err());
        let builder = TableBuilder::new(vec![1, 2, 3, 4], 2, 3).unwrap();
        assert_eq!((builder.token(1, 1), builder.token(2, 0), builder.token(0, 2)), (Some(3), None, None));
    }
}
