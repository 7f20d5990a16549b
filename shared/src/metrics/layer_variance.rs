//! How much the layer at which a latent is active varies: over all tokens, on single tokens, and at all
//! (arXiv 2409.04185 §4, the law of total variance).
//!
//! Two versions, under two names. *Weighted* is the decomposition of one distribution, P(l, t, j) proportional to the activation:
//! `Var(L) ≥ E[Var(L | J)] ≥ E[Var(L | J, T)]`, each pair (t, j) by its share of all activation. *Published* is what the paper's
//! program computes, for comparison: means over all pairs, inactive ones included, whose distributions then do not sum to 1, batch by
//! batch. The published ratio of the last two is small however many layers a latent is active at on a token: q = mean_t p sums to the
//! latent's density a, so that `Σ l² q − (Σ l q)²` is a E[L²] − a² E[L]², about the mean square of the layer's number and no variance.
//! [`OnToken`] counts instead.

use serde::{Deserialize, Serialize};

use super::layer_use::{LayerUse, check_layers, variance};
use crate::codes::Codes;
use crate::error::ShapeError;

/// Accumulates both decompositions.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerVariance {
    n_latents: usize,
    n_layers: usize,
    /// Σ over pairs of their activation times their variance, and of their activation.
    within: f64,
    weight: f64,
    /// Pairs of a latent and a token where it was active, layers of them, pairs of one layer, and activation of those.
    pairs: u64,
    layers: u64,
    single: u64,
    single_weight: f64,
    published: [f64; 3],
    ratios: [f64; 2],
    n_batches: u32,
}

/// At how many layers a latent is active on a token, over all pairs where it is active at one or more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnToken {
    /// Pairs of a latent and a token.
    pub pairs: u64,
    /// Mean number of layers.
    pub layers: f64,
    /// Share of pairs with a single layer.
    pub single: f64,
    /// Share of all activation in those.
    pub single_weighted: f64,
}

/// A decomposition of the variance of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decomposition {
    /// Var(L).
    pub total: f64,
    /// E[Var(L | J)]: of the layers of a latent, over all tokens.
    pub latent: f64,
    /// E[Var(L | J, T)]: of the layers of a latent on a single token.
    pub token: f64,
    /// E[Var(L | J)] / Var(L).
    pub latent_ratio: f64,
    /// E[Var(L | J, T)] / E[Var(L | J)]: small when a latent moves from layer to layer between tokens, not on one.
    pub token_ratio: f64,
}

impl LayerVariance {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(n_latents: usize, n_layers: usize) -> Self {
        let (published, ratios) = ([0.0; 3], [0.0; 2]);
        let (within, weight, single_weight) = (0.0, 0.0, 0.0);
        let (pairs, layers, single, n_batches) = (0, 0, 0, 0);
        Self {
            n_latents,
            n_layers,
            within,
            weight,
            pairs,
            layers,
            single,
            single_weight,
            published,
            ratios,
            n_batches,
        }
    }

    /// Adds the codes of the same rows at every layer: a batch of the published version (2048 tokens there).
    ///
    /// # Errors
    /// If there is another number of layers, of latents, or of rows at one of them.
    pub fn update(&mut self, layers: &[Codes]) -> Result<(), ShapeError> {
        let n_rows = check_layers(layers, self.n_layers, self.n_latents)?;
        if n_rows == 0 {
            return Ok(());
        }
        // Σ_t p[l, t, j], `[n, L]`.
        let mut sums = vec![0.0f64; self.n_latents * self.n_layers];
        let mut of_pairs = 0.0;
        let mut active: Vec<(u32, usize, f64)> = Vec::new();
        let mut shares = vec![0.0f64; self.n_layers];
        for row in 0..n_rows {
            active.clear();
            for (layer, codes) in layers.iter().enumerate() {
                let (latents, values) = codes.row(row);
                active.extend(latents.iter().zip(values).map(|(&j, &z)| (j, layer, f64::from(z))));
            }
            active.sort_unstable_by_key(|&(latent, layer, _)| (latent, layer));
            for pair in active.chunk_by(|a, b| a.0 == b.0) {
                let weight: f64 = pair.iter().map(|(_, _, z)| z).sum();
                if weight <= 0.0 {
                    continue;
                }
                shares.fill(0.0);
                pair.iter().for_each(|&(_, layer, z)| shares[layer] = z / weight);
                let variance = variance(&shares);
                (self.within, self.weight) = (self.within + weight * variance, self.weight + weight);
                of_pairs += variance;
                self.count(pair.len(), weight);
                let start = pair[0].0 as usize * self.n_layers;
                let sums = &mut sums[start..start + self.n_layers];
                sums.iter_mut().zip(&shares).for_each(|(sum, share)| *sum += share);
            }
        }
        self.add_published(&sums, of_pairs, n_rows);
        Ok(())
    }

    /// Counts a pair of a latent and a token, active at `n_layers`.
    fn count(&mut self, n_layers: usize, weight: f64) {
        (self.pairs, self.layers) = (self.pairs + 1, self.layers + n_layers as u64);
        if n_layers == 1 {
            (self.single, self.single_weight) = (self.single + 1, self.single_weight + weight);
        }
    }

    /// At how many layers latents were active on tokens; `None` when nothing was active.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub fn on_token(&self) -> Option<OnToken> {
        let pairs = self.pairs as f64;
        (self.pairs > 0).then(|| OnToken {
            pairs: self.pairs,
            layers: self.layers as f64 / pairs,
            single: self.single as f64 / pairs,
            single_weighted: self.single_weight / self.weight,
        })
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    fn add_published(&mut self, sums: &[f64], of_pairs: f64, n_rows: usize) {
        let (rows, latents) = (n_rows as f64, self.n_latents.max(1) as f64);
        let mut mean = vec![0.0f64; self.n_layers];
        let mut of_latents = 0.0;
        for sums in sums.chunks_exact(self.n_layers.max(1)) {
            let q: Vec<f64> = sums.iter().map(|sum| sum / rows).collect();
            of_latents += variance(&q);
            mean.iter_mut().zip(&q).for_each(|(mean, q)| *mean += q / latents);
        }
        let [total, latent, token] = [variance(&mean), of_latents / latents, of_pairs / (rows * latents)];
        let sums = self.published.iter_mut().zip([total, latent, token]);
        sums.for_each(|(sum, value)| *sum += value);
        let quotient = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        self.ratios[0] += quotient(latent, total);
        self.ratios[1] += quotient(token, latent);
        self.n_batches += 1;
    }

    /// The decomposition weighted by activity; `layer_use` has seen the same codes. `None` when nothing was active.
    #[must_use]
    pub fn weighted(&self, layer_use: &LayerUse) -> Option<Decomposition> {
        if self.weight <= 0.0 {
            return None;
        }
        let overall: Vec<f64> = layer_use.overall().iter().map(|sum| sum / self.weight).collect();
        let of_latent = |latent: usize| {
            let total: f64 = layer_use.totals(latent).iter().sum();
            layer_use.by_activation(latent).map_or(0.0, |shares| total * variance(&shares))
        };
        let latent = (0..layer_use.n_latents()).map(of_latent).sum::<f64>() / self.weight;
        Some(Decomposition::of(variance(&overall), latent, self.within / self.weight))
    }

    /// The decomposition as published, means over batches, the ratios too; `None` before the first batch.
    #[must_use]
    pub fn published(&self) -> Option<Decomposition> {
        let n = f64::from(self.n_batches);
        let [total, latent, token] = self.published.map(|sum| sum / n);
        let [latent_ratio, token_ratio] = self.ratios.map(|sum| sum / n);
        (n > 0.0).then_some(Decomposition { total, latent, token, latent_ratio, token_ratio })
    }
}

impl Decomposition {
    fn of(total: f64, latent: f64, token: f64) -> Self {
        let quotient = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        Self {
            total,
            latent,
            token,
            latent_ratio: quotient(latent, total),
            token_ratio: quotient(token, latent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer_use::tests::codes;
    use super::*;

    /// Latent 0 is active at layer 0 on the first token and at layer 1 on the second; latent 1 at both on the first.
    fn layers() -> [Codes; 2] {
        [codes(2, &[&[(0, 2.0), (1, 1.0)], &[]]), codes(2, &[&[(1, 1.0)], &[(0, 2.0)]])]
    }

    fn close(found: Decomposition, wanted: [f64; 5]) {
        let found = [found.total, found.latent, found.token, found.latent_ratio, found.token_ratio];
        for (found, wanted) in found.into_iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-12, "{found} for {wanted}");
        }
    }

    #[test]
    fn both_versions_by_hand() {
        let (mut variance, mut layer_use) = (LayerVariance::new(2, 2), LayerUse::new(2, 2));
        assert!(variance.published().is_none() && variance.weighted(&layer_use).is_none());
        assert!(variance.on_token().is_none());
        variance.update(&layers()).unwrap();
        // Latent 0 at one layer on each token, 2 each; latent 1 at both on the first, 2 in all.
        let on_token = OnToken { pairs: 3, layers: 4.0 / 3.0, single: 2.0 / 3.0, single_weighted: 4.0 / 6.0 };
        assert_eq!(variance.on_token(), Some(on_token));
        layer_use.update(&layers()).unwrap();
        close(variance.weighted(&layer_use).unwrap(), [0.25, 0.25, 1.0 / 12.0, 1.0, 1.0 / 3.0]);
        let (total, latent, token) = (0.375 - 0.375 * 0.375, (0.25 + 0.1875) / 2.0, 0.0625);
        close(variance.published().unwrap(), [total, latent, token, latent / total, token / latent]);
        // The same batch again changes no mean.
        variance.update(&layers()).unwrap();
        layer_use.update(&layers()).unwrap();
        close(variance.weighted(&layer_use).unwrap(), [0.25, 0.25, 1.0 / 12.0, 1.0, 1.0 / 3.0]);
        close(variance.published().unwrap(), [total, latent, token, latent / total, token / latent]);
    }

    /// The law of total variance holds for the weighted version on anything.
    #[test]
    fn weighted_parts_are_ordered() {
        let mut state = 9u64;
        let mut next = |n: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % n
        };
        let (mut variance, mut layer_use) = (LayerVariance::new(7, 5), LayerUse::new(7, 5));
        for _ in 0..4 {
            let layers: Vec<Codes> = (0..5)
                .map(|_| {
                    let mut pick =
                        |j: u32| if next(3) == 0 { Some((j, next(90) as f32 + 1.0)) } else { None };
                    let rows: Vec<Vec<(u32, f32)>> =
                        (0..30).map(|_| (0..7).filter_map(&mut pick).collect()).collect();
                    codes(7, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>())
                })
                .collect();
            variance.update(&layers).unwrap();
            layer_use.update(&layers).unwrap();
        }
        let found = variance.weighted(&layer_use).unwrap();
        assert!(found.total >= found.latent && found.latent > found.token && found.token > 0.0, "{found:?}");
        assert!(variance.update(&[]).is_err());
    }
}
