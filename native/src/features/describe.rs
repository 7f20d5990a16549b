//! From the table of activations to the features of a shard: counts, examples, words.

use std::collections::HashMap;

use shared::lm::Tokenizer;
use shared::pack::{Example, Feature, FeatureShard, HISTOGRAM_BINS, INDEX_WORDS};

use super::geometry::{Extremes, largest};
use super::select::{Amounts, choose, part};
use super::table::ActivationTable;

/// What one latent's row of the index says.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Share of encoded tokens on which it is active.
    pub density: f32,
    /// Largest activation.
    pub max: f32,
    /// Mean over the tokens where it is active.
    pub mean: f32,
    /// Ids of the tokens with the most activation in total.
    pub top_tokens: Vec<u32>,
    /// Tokens in uniform bins over `(0, max]`.
    pub histogram: Vec<u32>,
}

/// Counts and extremes of `latent`.
#[must_use]
pub fn summarise(table: &ActivationTable, latent: usize) -> Summary {
    let (tokens, values) = table.firings(latent);
    let max = values.iter().copied().fold(0.0, f32::max);
    let mut histogram = vec![0u32; HISTOGRAM_BINS];
    let (mut sum, mut totals) = (0.0f64, HashMap::<u32, f64>::new());
    for (&token, &value) in tokens.iter().zip(values) {
        histogram[part(value, max, HISTOGRAM_BINS)] += 1;
        sum += f64::from(value);
        *totals.entry(table.id(token)).or_default() += f64::from(value);
    }
    let mut totals: Vec<(u32, f64)> = totals.into_iter().collect();
    totals.sort_by_key(|t| t.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "shown to a few digits")]
    let (density, mean, totals) = (
        (tokens.len() as f64 / table.n_encoded().max(1) as f64) as f32,
        (sum / tokens.len().max(1) as f64) as f32,
        totals.into_iter().map(|(id, total)| (id, total as f32)),
    );
    let top_tokens = largest(totals, INDEX_WORDS).into_iter().map(|t| t.0).collect();
    Summary { density, max, mean, top_tokens, histogram }
}

/// The words of a shard, each once.
struct Words<'a> {
    tokenizer: &'a Tokenizer,
    indices: HashMap<u32, u32>,
    words: Vec<String>,
}

impl Words<'_> {
    fn index(&mut self, id: u32) -> u32 {
        *self.indices.entry(id).or_insert_with(|| {
            self.words.push(self.tokenizer.piece(id));
            u32::try_from(self.words.len() - 1).unwrap_or(u32::MAX)
        })
    }

    fn logits(&mut self, ends: &[(u32, f32)]) -> Vec<(u32, f32)> {
        ends.iter().map(|&(id, value)| (self.index(id), value)).collect()
    }
}

/// All that goes into feature shards.
#[derive(Debug)]
pub struct Describer<'a> {
    /// The activations.
    pub table: &'a ActivationTable,
    /// For words.
    pub tokenizer: &'a Tokenizer,
    /// How many examples.
    pub amounts: &'a Amounts,
    /// Seed of the samples.
    pub seed: u64,
    /// One row a latent.
    pub summaries: &'a [Summary],
    /// Nearest latents of each latent.
    pub neighbours: &'a [Vec<(u32, f32)>],
    /// Logits of each latent, when its direction has any.
    pub logits: Option<&'a [Extremes]>,
}

impl Describer<'_> {
    /// The shard of these latents.
    #[must_use]
    pub fn shard(&self, latents: std::ops::Range<usize>) -> FeatureShard {
        let mut words = Words { tokenizer: self.tokenizer, indices: HashMap::new(), words: Vec::new() };
        let features = latents.map(|latent| self.feature(latent, &mut words)).collect();
        FeatureShard { words: words.words, features }
    }

    fn feature(&self, latent: usize, words: &mut Words<'_>) -> Feature {
        let number = u32::try_from(latent).unwrap_or(u32::MAX);
        let chosen = choose(self.table, latent, self.amounts, self.seed);
        let examples = chosen.into_iter().map(|(group, token)| {
            let window = self.table.window(token, self.amounts.before, self.amounts.after);
            let (sequence, start) = self.table.place(window.start);
            Example {
                group,
                sequence,
                start,
                peak: u16::try_from(token - window.start).unwrap_or(u16::MAX),
                words: window.clone().map(|t| words.index(self.table.id(t))).collect(),
                values: window.map(|t| self.table.value(t, number)).collect(),
            }
        });
        let examples = examples.collect();
        let ends = self.logits.map(|all| &all[latent]);
        Feature {
            histogram: self.summaries[latent].histogram.clone(),
            neighbours: self.neighbours[latent].clone(),
            top_logits: ends.map_or_else(Vec::new, |e| words.logits(&e.0)),
            bottom_logits: ends.map_or_else(Vec::new, |e| words.logits(&e.1)),
            examples,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::table;
    use super::*;

    #[test]
    fn a_summary_worked_by_hand() {
        let rows = [(0, vec![(0, 1.0)]), (1, vec![(0, 4.0)]), (2, vec![]), (3, vec![(0, 1.0)])];
        let table = table(&[7, 8, 9, 7], 4, 2, &rows).unwrap();
        let summary = summarise(&table, 0);
        assert_eq!((summary.density, summary.max, summary.mean), (0.75, 4.0, 2.0));
        assert_eq!(summary.top_tokens, [8, 7]);
        assert_eq!((summary.histogram[9], summary.histogram[39]), (2, 1));
        let dead = summarise(&table, 1);
        assert_eq!((dead.density, dead.max, dead.mean, dead.top_tokens.len()), (0.0, 0.0, 0.0, 0));
    }
}
