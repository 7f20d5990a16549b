//! At which layers a latent of a multi-layer SAE is active: P(layer | latent) by activation and by count, and what follows
//! from it (arXiv 2409.04185 §4; layers are numbered 0 to L − 1 in the order they are given).

use super::ratio;
use crate::codes::Codes;
use crate::error::ShapeError;

/// Sums activations and counts of every latent at every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerUse {
    n_layers: usize,
    n_rows: u64,
    /// `[n, L]`.
    totals: Vec<f64>,
    /// `[n, L]`.
    counts: Vec<u64>,
}

/// Where a latent is active.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerProfile {
    /// Mean layer, `μ = Σ_l l P(l | j)`.
    pub mean: f64,
    /// Standard deviation of the layer, `σ² = Σ_l l² P(l | j) − μ²`.
    pub deviation: f64,
    /// `H = −Σ_l P ln P`, in nats; at most `ln L`.
    pub entropy: f64,
}

impl LayerUse {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(n_latents: usize, n_layers: usize) -> Self {
        let size = n_latents * n_layers;
        Self { n_layers, n_rows: 0, totals: vec![0.0; size], counts: vec![0; size] }
    }

    /// Adds the codes of the same rows at every layer.
    ///
    /// # Errors
    /// If there is another number of layers, of latents, or of rows at one of them.
    pub fn update(&mut self, layers: &[Codes]) -> Result<(), ShapeError> {
        let n_rows = check_layers(layers, self.n_layers, self.n_latents())?;
        self.n_rows += n_rows as u64;
        for (layer, codes) in layers.iter().enumerate() {
            for (latents, values) in codes.iter() {
                for (&latent, &value) in latents.iter().zip(values) {
                    let at = latent as usize * self.n_layers + layer;
                    self.totals[at] += f64::from(value);
                    self.counts[at] += 1;
                }
            }
        }
        Ok(())
    }

    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.totals.len() / self.n_layers.max(1)
    }

    /// Number of layers L.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// Rows (tokens) seen at every layer.
    #[must_use]
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// Summed activation of a latent at each layer, `[L]`.
    #[must_use]
    pub fn totals(&self, latent: usize) -> &[f64] {
        &self.totals[latent * self.n_layers..(latent + 1) * self.n_layers]
    }

    /// Rows in which a latent was active at each layer, `[L]`.
    #[must_use]
    pub fn counts(&self, latent: usize) -> &[u64] {
        &self.counts[latent * self.n_layers..(latent + 1) * self.n_layers]
    }

    /// P(layer | latent) by activation, `[L]`; `None` for a latent that was never active.
    #[must_use]
    pub fn by_activation(&self, latent: usize) -> Option<Vec<f64>> {
        shares(self.totals(latent).iter().copied())
    }

    /// P(layer | latent) by count, `[L]`; `None` for a latent that was never active.
    #[must_use]
    pub fn by_count(&self, latent: usize) -> Option<Vec<f64>> {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        shares(self.counts(latent).iter().map(|&count| count as f64))
    }

    /// Number of layers at which a latent was active in at least `least` rows.
    #[must_use]
    pub fn layers_by_count(&self, latent: usize, least: u64) -> usize {
        self.counts(latent).iter().filter(|&&count| count >= least.max(1)).count()
    }

    /// Number of layers that have at least the share `least` of a latent's activation.
    #[must_use]
    pub fn layers_by_share(&self, latent: usize, least: f64) -> usize {
        let active = |share: &&f64| **share > 0.0 && **share >= least;
        self.by_activation(latent).map_or(0, |shares| shares.iter().filter(active).count())
    }

    /// Share of latents that were never active at `layer`, and at any; `None` without latents.
    #[must_use]
    pub fn dead(&self, layer: Option<usize>) -> Option<f64> {
        let silent = |latent: &usize| match layer {
            Some(layer) => self.counts(*latent)[layer] == 0,
            None => self.counts(*latent).iter().all(|&count| count == 0),
        };
        let n = self.n_latents();
        ratio((0..n).filter(silent).count() as u64, n as u64)
    }

    /// Mean number of active latents at `layer`.
    #[must_use]
    pub fn l0(&self, layer: usize) -> Option<f64> {
        ratio((0..self.n_latents()).map(|latent| self.counts(latent)[layer]).sum(), self.n_rows)
    }

    /// How much two layers share their latents over all tokens: `Σ_j min(q_l(j), q_m(j))` of the shares `q` that latents have of
    /// a layer's activation; 1 for the same use, 0 for none in common, `None` where one of them has none.
    #[must_use]
    pub fn shared_use(&self, l: usize, m: usize) -> Option<f64> {
        let sums = self.overall();
        let both = (0..self.n_latents()).map(|latent| {
            let totals = self.totals(latent);
            (totals[l] / sums[l]).min(totals[m] / sums[m])
        });
        (sums[l] > 0.0 && sums[m] > 0.0).then(|| both.sum())
    }

    /// Summed activation of all latents at each layer, `[L]`.
    #[must_use]
    pub fn overall(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.n_layers];
        for latent in 0..self.n_latents() {
            sums.iter_mut().zip(self.totals(latent)).for_each(|(sum, total)| *sum += total);
        }
        sums
    }
}

/// Mean, deviation and entropy of a distribution over layers.
#[must_use]
pub fn profile(shares: &[f64]) -> LayerProfile {
    let entropy = shares.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
    LayerProfile { mean: moment(shares, 1), deviation: variance(shares).max(0.0).sqrt(), entropy }
}

/// `V(q) = Σ_l l² q_l − (Σ_l l q_l)²`; a variance where q sums to 1.
#[must_use]
pub(super) fn variance(q: &[f64]) -> f64 {
    moment(q, 2) - moment(q, 1).powi(2)
}

fn moment(q: &[f64], power: i32) -> f64 {
    q.iter().zip(0u32..).map(|(q, layer)| f64::from(layer).powi(power) * q).sum()
}

fn shares(values: impl Iterator<Item = f64> + Clone) -> Option<Vec<f64>> {
    let total: f64 = values.clone().sum();
    (total > 0.0).then(|| values.map(|value| value / total).collect())
}

/// The number of rows that all of `layers` have.
pub(super) fn check_layers(layers: &[Codes], n_layers: usize, n_latents: usize) -> Result<usize, ShapeError> {
    if layers.len() != n_layers {
        return Err(ShapeError::Width { name: "layers", expected: n_layers, found: layers.len() });
    }
    let n_rows = layers.first().map_or(0, Codes::n_rows);
    for codes in layers {
        if codes.n_latents() != n_latents {
            return Err(ShapeError::Width { name: "codes", expected: n_latents, found: codes.n_latents() });
        }
        if codes.n_rows() != n_rows {
            return Err(ShapeError::Width {
                name: "rows of a layer",
                expected: n_rows,
                found: codes.n_rows(),
            });
        }
    }
    Ok(n_rows)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codes::CodesBuilder;

    /// Codes of `n` latents from (latent, value) lists, a row each.
    pub(in crate::metrics) fn codes(n: usize, rows: &[&[(u32, f32)]]) -> Codes {
        let mut builder = CodesBuilder::new(n);
        for row in rows {
            row.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row().unwrap();
        }
        builder.finish()
    }

    #[test]
    fn shares_profiles_and_counts_by_hand() {
        let mut layer_use = LayerUse::new(3, 3);
        let layers = [
            codes(3, &[&[(0, 1.0)], &[(0, 1.0)]]),
            codes(3, &[&[(0, 6.0), (1, 2.0)], &[]]),
            codes(3, &[&[], &[(1, 2.0)]]),
        ];
        layer_use.update(&layers).unwrap();
        assert_eq!(layer_use.by_activation(0), Some(vec![0.25, 0.75, 0.0]));
        assert_eq!(layer_use.by_count(0).unwrap()[0], 2.0 / 3.0);
        assert_eq!(layer_use.by_activation(2), None);
        let LayerProfile { mean, deviation, entropy } = profile(&layer_use.by_activation(1).unwrap());
        assert_eq!((mean, deviation), (1.5, 0.5));
        assert!((entropy - 2f64.ln()).abs() < 1e-12);
        assert_eq!(profile(&[0.0, 1.0, 0.0]), LayerProfile { mean: 1.0, deviation: 0.0, entropy: 0.0 });
        assert_eq!((layer_use.layers_by_count(0, 0), layer_use.layers_by_count(0, 2)), (2, 1));
        assert_eq!((layer_use.layers_by_share(0, 0.0), layer_use.layers_by_share(0, 0.5)), (2, 1));
        assert_eq!((layer_use.dead(None), layer_use.dead(Some(2))), (Some(1.0 / 3.0), Some(2.0 / 3.0)));
        assert_eq!((layer_use.l0(0), layer_use.l0(2)), (Some(1.0), Some(0.5)));
        assert_eq!(layer_use.overall(), [2.0, 8.0, 2.0]);
        assert_eq!(layer_use.shared_use(0, 1), Some(0.75));
        assert_eq!(layer_use.shared_use(1, 2), Some(0.25));
        assert_eq!(LayerUse::new(3, 2).shared_use(0, 1), None);
    }

    #[test]
    fn layers_that_do_not_belong_together_are_refused() {
        let mut layer_use = LayerUse::new(2, 2);
        let one = codes(2, &[&[(0, 1.0)]]);
        assert!(layer_use.update(std::slice::from_ref(&one)).is_err());
        assert!(layer_use.update(&[one.clone(), codes(3, &[&[]])]).is_err());
        assert!(layer_use.update(&[one.clone(), codes(2, &[&[], &[]])]).is_err());
        assert_eq!(layer_use.n_rows(), 0);
        layer_use.update(&[one.clone(), one]).unwrap();
    }
}
