//! Top-k made exact: which of the estimated pre-activations are the reference's `k` largest.

use crate::certify::Margins;
use crate::reference;
use crate::sae::Sae;

/// The active latents of row `x` and their values, given estimates for every latent that may be among them.
///
/// A latent whose interval lies above all but `k` others' is among the `k` largest, and keeps its estimate. Those whose interval
/// reaches the `k`-th largest lower bound are computed again in f64, then the reference's rule decides: larger first, ties to the
/// lower latent, positive only.
#[must_use]
pub fn exact_top_k(
    sae: &Sae,
    margins: &Margins,
    k: usize,
    x: &[f32],
    x_norm: f32,
    estimates: &[(u32, f32)],
) -> Vec<(u32, f32)> {
    let margin = |latent: u32| margins.margin(latent as usize, x_norm);
    let (enters, certain) = bounds(k, estimates.iter().map(|&(latent, z)| (z, margin(latent))));
    let mut active = Vec::new();
    let mut open: Vec<(u32, f64)> = Vec::new();
    for &(latent, z) in estimates {
        let margin = margin(latent);
        if z - margin > certain.max(0.0) {
            active.push((latent, z));
        } else if z + margin >= enters {
            open.push((latent, reference::pre_activation(sae, x, latent as usize)));
        }
    }
    open.retain(|&(_, z)| z > 0.0);
    open.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    open.truncate(k.saturating_sub(active.len()));
    #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
    active.extend(open.into_iter().map(|(latent, z)| (latent, z as f32)));
    active
}

/// The `k`-th largest lower bound, below which an upper bound excludes, and the next largest upper bound after `k` of them, above which
/// a lower bound includes; of estimates and their margins.
#[must_use]
pub fn bounds(k: usize, estimates: impl Iterator<Item = (f32, f32)>) -> (f32, f32) {
    let (mut lower, mut upper): (Vec<f32>, Vec<f32>) =
        estimates.map(|(z, margin)| (z - margin, z + margin)).unzip();
    if lower.len() <= k {
        return (f32::NEG_INFINITY, f32::NEG_INFINITY);
    }
    let largest = |values: &mut [f32], i: usize| *values.select_nth_unstable_by(i, |a, b| b.total_cmp(a)).1;
    let enters = if k == 0 { f32::INFINITY } else { largest(&mut lower, k - 1) };
    (enters, largest(&mut upper, k))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::sae::{Activation, SaeParts};

    #[test]
    fn bounds_by_hand() {
        let estimates = [(3.0, 0.5), (1.0, 0.25), (2.0, 0.75), (0.5, 0.25)];
        // Lower bounds 2.5, 1.25, 0.75, 0.25; upper bounds 3.5, 2.75, 1.25, 0.75.
        assert_eq!(bounds(2, estimates.into_iter()), (1.25, 1.25));
        assert_eq!(bounds(1, estimates.into_iter()), (2.5, 2.75));
        assert_eq!(bounds(4, estimates.into_iter()), (f32::NEG_INFINITY, f32::NEG_INFINITY));
        assert_eq!(bounds(0, estimates.into_iter()).0, f32::INFINITY);
    }

    /// Estimates that say another order than exact arithmetic does, as far as their margins allow.
    #[test]
    fn what_rounding_may_have_swapped_is_decided_again() {
        // Pre-activations x = 1: latents 1 and 3 are the largest, 0 next to them by half a margin; 2 is below zero.
        let encoder = [0.5f32, 0.5 + 1e-7, -1.0, 0.75, 0.1];
        let sae = Sae::new(SaeParts {
            d_in: 1,
            d_out: 1,
            w_enc: encoder.to_vec(),
            b_enc: vec![0.0; 5],
            w_dec: vec![1.0; 5],
            b_dec: vec![0.0],
            activation: Activation::TopK { k: 2 },
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap();
        let margins = Margins::new(&sae);
        let top = |k: usize, spoil: f32| {
            let z = |latent: usize| encoder[latent] + if latent == 0 { spoil } else { -spoil };
            let estimates: Vec<(u32, f32)> = (0u32..5).map(|latent| (latent, z(latent as usize))).collect();
            let mut found = exact_top_k(&sae, &margins, k, &[1.0], 1.0, &estimates);
            found.sort_unstable_by_key(|&(latent, _)| latent);
            found.into_iter().map(|(latent, _)| latent).collect::<Vec<_>>()
        };
        let spoil = 0.9 * margins.margin(0, 1.0);
        assert!(encoder[0] + spoil > encoder[1] - spoil, "the estimates are in the right order");
        for spoil in [0.0, spoil, -spoil] {
            assert_eq!(top(2, spoil), [1, 3]);
            assert_eq!(top(1, spoil), [3]);
            assert_eq!(top(3, spoil), [0, 1, 3]);
            assert_eq!(top(5, spoil), [0, 1, 3, 4], "negative values are not active");
        }
    }
}
