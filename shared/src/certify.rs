//! How a fast f32 backend reaches exactly the active set of the f64 reference.
//!
//! A backend computes `ẑ ≈ w·x + b` in f32, in whatever order suits it. The classical bound on a sum
//! of `n` products (Higham, *Accuracy and Stability of Numerical Algorithms*, §3.1, with
//! Cauchy–Schwarz for Σ|wᵢxᵢ|) gives a margin `δ` with `|ẑ − z| ≤ δ`. Pre-activations farther than `δ`
//! from the threshold are decided by `ẑ`; the few inside are decided by [`crate::reference`], in f64.
//!
//! Every `x` here is what the encoder reads: where a dictionary scales rows ([`crate::row_scaling`]), the scaled vector.
//!
//! [`Screen`] goes one step further for backends on the host: whatever passes the screen is summed again in f64,
//! so that values too are those of the reference. Few latents pass, so it costs little.

use crate::reference;
use crate::sae::{Activation, Sae};

/// Unit roundoff of f32, `2⁻²⁴`.
const UNIT_ROUNDOFF: f32 = 5.960_464_5e-8;

/// Margins of a dictionary: `δ = scale_i · ‖x‖ + offset_i` bounds the f32 error of latent `i`.
#[derive(Debug, Clone, PartialEq)]
pub struct Margins {
    scale: Vec<f32>,
    offset: Vec<f32>,
}

impl Margins {
    /// Precomputes per-latent margins from encoder row norms and biases.
    #[must_use]
    pub fn new(sae: &Sae) -> Self {
        let n_terms = sae.dims().d_in + 1;
        // Twice γₙ ≈ n·u: once for the sum, once more for devices that round products before adding
        // and for the rounding of the margin itself.
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let gamma = 2.0 * n_terms as f32 * UNIT_ROUNDOFF;
        let scale = (0..sae.dims().n_latents).map(|i| gamma * norm(sae.encoder_row(i))).collect();
        // Devices may flush every product that underflows to zero.
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let underflow = n_terms as f32 * f32::MIN_POSITIVE;
        let offset = sae.b_enc().iter().map(|b| gamma * b.abs() + underflow).collect();
        Self { scale, offset }
    }

    /// The margin of `latent` for an input of norm `x_norm`.
    #[must_use]
    pub fn margin(&self, latent: usize, x_norm: f32) -> f32 {
        self.scale[latent] * x_norm + self.offset[latent]
    }

    /// Per-latent factors of the input's norm, `[n]`, for backends that screen on a device.
    #[must_use]
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Per-latent constant parts, `[n]`, for backends that screen on a device.
    #[must_use]
    pub fn offset(&self) -> &[f32] {
        &self.offset
    }
}

/// Decides latent `latent` of a thresholded dictionary given its f32 estimate `z_estimate`:
/// the value to store when active, `None` when not. Inside the margin the f64 reference decides.
#[must_use]
pub fn decide(
    sae: &Sae,
    x: &[f32],
    latent: usize,
    z_estimate: f32,
    margin: f32,
    threshold: f32,
) -> Option<f32> {
    if z_estimate > threshold + margin {
        return Some(z_estimate);
    }
    if z_estimate <= threshold - margin {
        return None;
    }
    let z = reference::pre_activation(sae, x, latent);
    #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
    (z > f64::from(threshold)).then_some(z as f32)
}

/// Euclidean norm, summed in f64 and rounded up a little so that it can stand in a bound.
#[must_use]
pub fn norm(v: &[f32]) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "rounded up by the factor")]
    let norm = (reference::dot(v, v).sqrt() * (1.0 + 1e-6)) as f32;
    norm
}

/// Turns f32 estimates of a row into the reference's codes of that row, block of latents by block.
///
/// One screen serves one dictionary; all methods take the dictionary it was made from.
#[derive(Debug, Clone)]
pub struct Screen {
    margins: Margins,
    /// A pre-activation at most this, less the margin, is certainly silent: the threshold, 0 for top-k.
    floor: Vec<f32>,
    /// Above this input norm f32 sums could overflow, and estimates mean nothing.
    largest_norm: f32,
    k: Option<usize>,
}

/// Latents of one row that may be active, with bounds, on their way to being ranked. Only top-k needs it.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    latents: Vec<u32>,
    upper: Vec<f32>,
    lower: Vec<f32>,
}

impl Screen {
    /// Precomputes margins and floors.
    #[must_use]
    pub fn new(sae: &Sae) -> Self {
        let n = sae.dims().n_latents;
        let largest = (0..n).map(|i| norm(sae.encoder_row(i))).fold(f32::MIN_POSITIVE, f32::max);
        let k = match sae.activation() {
            Activation::TopK { k } => Some(*k),
            Activation::JumpRelu { .. } | Activation::Relu => None,
        };
        Self {
            margins: Margins::new(sae),
            floor: (0..n).map(|i| sae.activation().threshold(i).unwrap_or(0.0)).collect(),
            largest_norm: 1e30 / largest.max(1.0),
            k,
        }
    }

    /// The margins.
    #[must_use]
    pub fn margins(&self) -> &Margins {
        &self.margins
    }

    /// Whether f32 estimates of inputs of this norm can be trusted; if not, the row belongs to [`Screen::row_in_f64`].
    #[must_use]
    pub fn trusts(&self, x_norm: f32) -> bool {
        x_norm < self.largest_norm
    }

    /// How many latents top-k keeps; `None` when latents are decided one by one.
    #[must_use]
    pub fn k(&self) -> Option<usize> {
        self.k
    }

    /// Decides latents `first..first + products.len()` of one row, given `products[i] ≈ w_{first+i} · x` without the
    /// bias. Calls `active` with latents ascending. For dictionaries with thresholds.
    pub fn decide(
        &self,
        sae: &Sae,
        x: &[f32],
        x_norm: f32,
        first: usize,
        products: &[f32],
        mut active: impl FnMut(u32, f32),
    ) {
        self.survivors(sae, x_norm, first, products, |latent, _, _| {
            let z = exact(sae, x, latent);
            if z > f64::from(self.floor[latent]) {
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "checked at construction; values are f32"
                )]
                active(latent as u32, z as f32);
            }
        });
    }

    /// Collects the latents of one row that may be among the `k` largest; otherwise as [`Screen::decide`].
    pub fn collect(
        &self,
        sae: &Sae,
        x_norm: f32,
        first: usize,
        products: &[f32],
        candidates: &mut Candidates,
    ) {
        self.survivors(sae, x_norm, first, products, |latent, z, margin| {
            #[expect(clippy::cast_possible_truncation, reason = "checked at construction")]
            candidates.latents.push(latent as u32);
            candidates.upper.push(z + margin);
            candidates.lower.push(z - margin);
        });
        if let Some(k) = self.k
            && candidates.latents.len() > 4 * k + 64
        {
            candidates.prune(k);
        }
    }

    /// Ranks the candidates of one row in f64; calls `active` in no particular order.
    pub fn rank(&self, sae: &Sae, x: &[f32], mut candidates: Candidates, mut active: impl FnMut(u32, f32)) {
        let Some(k) = self.k else { return };
        candidates.prune(k);
        let mut ranked: Vec<(f64, u32)> =
            candidates.latents.iter().map(|&latent| (exact(sae, x, latent as usize), latent)).collect();
        ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (z, latent) in ranked.into_iter().take(k).filter(|&(z, _)| z > 0.0) {
            #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
            active(latent, z as f32);
        }
    }

    /// One whole row by the reference, for inputs no f32 sum can be trusted with.
    pub fn row_in_f64(&self, sae: &Sae, x: &[f32], mut active: impl FnMut(u32, f32)) {
        let z: Vec<f64> = (0..self.floor.len()).map(|i| reference::pre_activation(sae, x, i)).collect();
        for latent in reference::active_latents(sae.activation(), &z) {
            #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
            active(latent, z[latent as usize] as f32);
        }
    }

    /// Calls `keep(latent, estimate, margin)` for latents that are not certainly silent.
    #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN must survive, to be decided in f64")]
    fn survivors(
        &self,
        sae: &Sae,
        x_norm: f32,
        first: usize,
        products: &[f32],
        mut keep: impl FnMut(usize, f32, f32),
    ) {
        // Eight at a time: the test of a whole group vectorises, and most groups hold nothing.
        const GROUP: usize = 8;
        let last = first + products.len();
        let (bias, floor) = (&sae.b_enc()[first..last], &self.floor[first..last]);
        let (scale, offset) = (&self.margins.scale[first..last], &self.margins.offset[first..last]);
        let mut test = |i: usize| {
            let (z, margin) = (products[i] + bias[i], scale[i] * x_norm + offset[i]);
            if !(z <= floor[i] - margin) {
                keep(first + i, z, margin);
            }
        };
        let whole = products.len() / GROUP * GROUP;
        for start in (0..whole).step_by(GROUP) {
            let group = |values: &[f32]| -> [f32; GROUP] { std::array::from_fn(|i| values[start + i]) };
            let (p, b, f, s, o) = (group(products), group(bias), group(floor), group(scale), group(offset));
            let mut any = false;
            for i in 0..GROUP {
                any |= !(p[i] + b[i] <= f[i] - (s[i] * x_norm + o[i]));
            }
            if any {
                (start..start + GROUP).for_each(&mut test);
            }
        }
        (whole..products.len()).for_each(test);
    }
}

impl Candidates {
    /// Forgets latents that cannot be among the `k` largest: those below the `k`-th largest lower bound.
    #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN must stay, to be ranked in f64")]
    fn prune(&mut self, k: usize) {
        if k == 0 || self.latents.len() <= k {
            return;
        }
        let mut lower = self.lower.clone();
        let (_, &mut bar, _) = lower.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let mut kept = 0;
        for i in 0..self.latents.len() {
            if !(self.upper[i] < bar) {
                self.latents[kept] = self.latents[i];
                self.upper[kept] = self.upper[i];
                self.lower[kept] = self.lower[i];
                kept += 1;
            }
        }
        self.latents.truncate(kept);
        self.upper.truncate(kept);
        self.lower.truncate(kept);
    }

    /// Adds the candidates of other latents of the same row.
    pub fn append(&mut self, mut other: Self) {
        self.latents.append(&mut other.latents);
        self.upper.append(&mut other.upper);
        self.lower.append(&mut other.lower);
    }
}

/// [`reference::pre_activation`] in an order that vectorises; where that order could matter to a decision at
/// zero or at the threshold, the reference itself.
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN belongs to the reference")]
fn exact(sae: &Sae, x: &[f32], latent: usize) -> f64 {
    const LANES: usize = 8;
    let row = sae.encoder_row(latent);
    let (mut sums, mut sizes) = ([0.0f64; LANES], [0.0f64; LANES]);
    let (rows, row_rest) = row.as_chunks::<LANES>();
    let (xs, x_rest) = x.as_chunks::<LANES>();
    for (w, x) in rows.iter().zip(xs) {
        for i in 0..LANES {
            let product = f64::from(w[i]) * f64::from(x[i]);
            sums[i] += product;
            sizes[i] += product.abs();
        }
    }
    let bias = f64::from(sae.b_enc()[latent]);
    let z = sums.iter().sum::<f64>() + reference::dot(row_rest, x_rest) + bias;
    let size = sizes.iter().sum::<f64>() + reference::dot(row_rest, x_rest).abs() + bias.abs();
    let threshold = f64::from(sae.activation().threshold(latent).unwrap_or(0.0));
    // Far more than d_in · 2⁻⁵³ of the sum of magnitudes; ranking ties need the same value for the same row, so
    // top-k always takes the reference.
    let ranked = matches!(sae.activation(), Activation::TopK { .. });
    if ranked || !((z - threshold).abs() > 1e-10 * size) {
        reference::pre_activation(sae, x, latent)
    } else {
        z
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::sae::SaeParts;

    fn sae(activation: Activation) -> Sae {
        let wave = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<_>>();
        Sae::new(SaeParts {
            d_in: 5,
            d_out: 5,
            w_enc: wave(95, 0.1),
            b_enc: wave(19, 0.2),
            w_dec: wave(95, 0.3),
            b_dec: wave(5, 0.4),
            activation,
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap()
    }

    /// Codes of one row through the screen, with estimates spoiled by up to `noise` of their margin.
    fn screened(sae: &Sae, x: &[f32], noise: f32) -> Vec<(u32, f32)> {
        let (screen, margins) = (Screen::new(sae), Margins::new(sae));
        let x_norm = norm(x);
        #[expect(clippy::cast_possible_truncation, reason = "estimates are f32")]
        let products: Vec<f32> = (0..19)
            .map(|i| {
                let sign = if i % 2 == 0 { noise } else { -noise };
                reference::dot(sae.encoder_row(i), x) as f32 + sign * margins.margin(i, x_norm)
            })
            .collect();
        let mut found = Vec::new();
        if screen.k().is_some() {
            let (mut low, mut high) = (Candidates::default(), Candidates::default());
            screen.collect(sae, x_norm, 0, &products[..11], &mut low);
            screen.collect(sae, x_norm, 11, &products[11..], &mut high);
            low.append(high);
            screen.rank(sae, x, low, |latent, value| found.push((latent, value)));
        } else {
            screen.decide(sae, x, x_norm, 0, &products[..11], |latent, value| found.push((latent, value)));
            screen.decide(sae, x, x_norm, 11, &products[11..], |latent, value| found.push((latent, value)));
        }
        found.sort_unstable_by_key(|&(latent, _)| latent);
        found
    }

    #[test]
    fn estimates_wrong_by_their_margin_still_give_the_reference() {
        let x = [0.3f32, -0.7, 1.1, 0.2, -0.4];
        for activation in [
            Activation::Relu,
            Activation::JumpRelu { threshold: vec![0.4; 19] },
            Activation::TopK { k: 1 },
            Activation::TopK { k: 4 },
            Activation::TopK { k: 19 },
        ] {
            let sae = sae(activation);
            let wanted = reference::encode(&sae, crate::Rows::new(&x, 5).unwrap()).unwrap();
            let (latents, values) = wanted.row(0);
            let wanted: Vec<_> = latents.iter().copied().zip(values.iter().copied()).collect();
            for noise in [0.0, 0.9, -0.9] {
                assert_eq!(screened(&sae, &x, noise), wanted, "{:?} with noise {noise}", sae.activation());
            }
        }
    }

    #[test]
    fn rows_too_large_for_f32_sums_are_left_to_the_reference() {
        let sae = sae(Activation::Relu);
        let screen = Screen::new(&sae);
        assert!(
            screen.trusts(norm(&[1e20; 5])) && !screen.trusts(norm(&[3e38; 5])) && !screen.trusts(f32::NAN)
        );
        let mut found = Vec::new();
        screen.row_in_f64(&sae, &[3e38; 5], |latent, _| found.push(latent));
        assert_eq!(
            found,
            reference::encode(&sae, crate::Rows::new(&[3e38; 5], 5).unwrap()).unwrap().row(0).0
        );
    }
}
