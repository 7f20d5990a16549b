//! Choosing the examples of a latent: the largest, some from each quarter of its range, some at random.

use std::collections::HashSet;

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use shared::pack::Group;

use super::table::ActivationTable;

/// Quarters of the activation range that have a group of their own.
const QUARTERS: u8 = 4;
/// Two tokens have the same context when these many tokens before and after them are equal.
const CONTEXT: (usize, usize) = (6, 2);

/// How many examples of each kind, and how much text around them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amounts {
    /// Largest activations.
    pub top: usize,
    /// Examples from each quarter of `(0, max_activation]`.
    pub per_quarter: usize,
    /// Examples drawn uniformly among all activations.
    pub random: usize,
    /// Tokens shown before the chosen one.
    pub before: usize,
    /// Tokens shown after it.
    pub after: usize,
}

/// The part `0..parts` of `(0, max]` that `value` lies in.
#[must_use]
pub fn part(value: f32, max: f32, parts: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a few dozen parts, clamped"
    )]
    let part = (f64::from(value) / f64::from(max) * parts as f64).ceil() as usize;
    part.clamp(1, parts) - 1
}

/// The chosen tokens of `latent`, group by group: top descending, quarters from the highest down, random.
///
/// Within top and quarters no context repeats and windows of one sequence do not overlap by half;
/// the random group is an honest sample of all activations, free only of repeats of one token.
#[must_use]
pub fn choose(table: &ActivationTable, latent: usize, amounts: &Amounts, seed: u64) -> Vec<(Group, u32)> {
    let (tokens, values) = table.firings(latent);
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    // Descending; equal values in reading order, so that a rerun chooses the same.
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let Some(&first) = order.first() else {
        return Vec::new();
    };
    let max = values[first];
    let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(latent as u64));
    let mut fresh = Fresh::new(table, amounts);
    let mut chosen: Vec<(Group, u32)> = Vec::new();
    let top = order.iter().map(|&i| tokens[i]).filter(|&t| fresh.take(t)).take(amounts.top);
    chosen.extend(top.map(|t| (Group::Top, t)));
    // `order` is sorted, so each quarter is one stretch of it.
    let mut stretch = &order[..];
    for quarter in (0..QUARTERS).rev() {
        let inside = |&i: &usize| part(values[i], max, usize::from(QUARTERS)) == usize::from(quarter);
        let (here, below) = stretch.split_at(stretch.partition_point(inside));
        stretch = below;
        let sampled =
            sample(&mut rng, here.len(), amounts.per_quarter * 4).into_iter().map(|k| tokens[here[k]]);
        let mut picked: Vec<u32> = sampled.filter(|&t| fresh.take(t)).take(amounts.per_quarter).collect();
        picked.sort_by(|&a, &b| table.value(b, latent as u32).total_cmp(&table.value(a, latent as u32)));
        chosen.extend(picked.into_iter().map(|t| (Group::Quantile(quarter + 1), t)));
    }
    let random = sample(&mut rng, tokens.len(), amounts.random);
    chosen.extend(random.into_iter().map(|k| (Group::Random, tokens[k])));
    chosen
}

/// Up to `count` distinct numbers below `n`, uniform, in random order.
fn sample(rng: &mut ChaCha8Rng, n: usize, count: usize) -> Vec<usize> {
    if n <= 2 * count {
        let mut all: Vec<usize> = (0..n).collect();
        for i in 0..n.min(count) {
            all.swap(i, rng.random_range(i..n));
        }
        all.truncate(count);
        return all;
    }
    let mut out = Vec::with_capacity(count);
    while out.len() < count {
        let k = rng.random_range(0..n);
        if !out.contains(&k) {
            out.push(k);
        }
    }
    out
}

/// Remembers which contexts and places were taken.
struct Fresh<'a> {
    table: &'a ActivationTable,
    distance: u32,
    contexts: HashSet<Vec<u32>>,
    places: Vec<u32>,
}

impl<'a> Fresh<'a> {
    fn new(table: &'a ActivationTable, amounts: &Amounts) -> Self {
        let distance = u32::try_from((amounts.before + amounts.after) / 2).unwrap_or(u32::MAX);
        Self { table, distance, contexts: HashSet::new(), places: Vec::new() }
    }

    /// Takes `token` unless its context, or a place near it, was taken before.
    fn take(&mut self, token: u32) -> bool {
        let sequence = self.table.place(token).0;
        let near = |&p: &u32| self.table.place(p).0 == sequence && p.abs_diff(token) <= self.distance;
        if self.places.iter().any(near) {
            return false;
        }
        let context = self.table.window(token, CONTEXT.0, CONTEXT.1).map(|t| self.table.id(t)).collect();
        if !self.contexts.insert(context) {
            return false;
        }
        self.places.push(token);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::table;
    use super::*;

    const AMOUNTS: Amounts = Amounts { top: 3, per_quarter: 2, random: 4, before: 1, after: 1 };

    /// 100 sequences of 10 different tokens; latent 0 fires once in each, ever stronger.
    fn ramp(ids: impl Fn(u32) -> u32) -> ActivationTable {
        let ids: Vec<u32> = (0..1000).map(ids).collect();
        let rows: Vec<(u32, Vec<(u32, f32)>)> =
            (0..100u8).map(|s| (u32::from(s) * 10 + 5, vec![(0, f32::from(s) + 1.0)])).collect();
        table(&ids, 10, 2, &rows).unwrap()
    }

    #[test]
    fn groups_are_what_they_say() {
        let table = ramp(|t| t);
        let chosen = choose(&table, 0, &AMOUNTS, 7);
        let of = |group| -> Vec<f32> {
            chosen.iter().filter(|c| c.0 == group).map(|c| table.value(c.1, 0)).collect()
        };
        assert_eq!(of(Group::Top), [100.0, 99.0, 98.0]);
        for quarter in 1..=4u8 {
            let values = of(Group::Quantile(quarter));
            let range = f32::from(quarter - 1) * 25.0..f32::from(quarter) * 25.0;
            assert_eq!(values.len(), 2);
            assert!(values.iter().all(|v| *v > range.start && *v <= range.end), "{quarter}: {values:?}");
        }
        assert_eq!(of(Group::Random).len(), 4);
        assert_eq!(chosen, choose(&table, 0, &AMOUNTS, 7), "the same seed chooses the same");
        assert_ne!(chosen, choose(&table, 0, &AMOUNTS, 8), "another seed another sample");
        assert!(choose(&table, 1, &AMOUNTS, 7).is_empty(), "a dead latent has no examples");
    }

    #[test]
    fn a_repeated_context_is_shown_once() {
        let table = ramp(|t| t % 10);
        let chosen = choose(&table, 0, &AMOUNTS, 7);
        let top: Vec<_> = chosen.iter().filter(|c| c.0 == Group::Top).collect();
        assert_eq!(top.len(), 1, "every sequence is the same text");
        assert_eq!(chosen.iter().filter(|c| c.0 == Group::Random).count(), 4, "random stays a true sample");
    }

    #[test]
    fn parts_cover_the_half_open_range() {
        assert_eq!([0.01, 0.25, 0.26, 0.75, 1.0].map(|v| part(v, 1.0, 4)), [0, 0, 1, 2, 3]);
    }
}
