//! The elementwise blocks on host slices: one piece of work each, written so that the compiler vectorises it.
//!
//! Sums run in sixteen lanes. `pulp` compiles every kernel for the vector units it may meet and picks one at run time.

use super::math::{exp, tanh};
use super::{MlpActivation, NormKind};

const LANES: usize = 16;

/// Runs a kernel with the widest vector instructions the machine has.
pub(super) fn vectorised<R>(kernel: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(kernel)
}

#[inline(always)]
fn sum_of_squares(row: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    lanes.iter().sum()
}

#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    lanes.iter().sum()
}

/// `out` = the rows of `x`, `width` values each, normalised.
#[inline(always)]
pub(super) fn normalise(x: &[f32], out: &mut [f32], width: usize, kind: NormKind, eps: f32) {
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        match kind {
            NormKind::Rms => out.copy_from_slice(row),
            NormKind::Layer => {
                let mean = sum(row) / width as f32;
                for (out, x) in out.iter_mut().zip(row) {
                    *out = x - mean;
                }
            }
        }
        let scale = 1.0 / (sum_of_squares(out) / width as f32 + eps).sqrt();
        for out in out {
            *out *= scale;
        }
    }
}

/// `x = x · gain + bias`, row after row.
#[inline(always)]
pub(super) fn affine(x: &mut [f32], gain: &[f32], bias: Option<&[f32]>) {
    for row in x.chunks_exact_mut(gain.len()) {
        for (x, gain) in row.iter_mut().zip(gain) {
            *x *= gain;
        }
        if let Some(bias) = bias {
            add(row, bias);
        }
    }
}

/// `x += y`.
#[inline(always)]
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `out = act(gate) ∘ up` for rows of concatenated gate and up halves.
#[inline(always)]
pub(super) fn gated(gate_up: &[f32], out: &mut [f32], d_ff: usize, activation: MlpActivation) {
    for (row, out) in gate_up.chunks_exact(2 * d_ff).zip(out.chunks_exact_mut(d_ff)) {
        let (gate, up) = row.split_at(d_ff);
        match activation {
            MlpActivation::Silu => apply(gate, up, out, |x| x / (1.0 + exp(-x))),
            MlpActivation::GeluTanh => apply(gate, up, out, gelu_tanh),
            MlpActivation::Gelu => apply(gate, up, out, gelu),
            MlpActivation::Relu => apply(gate, up, out, |x| x.max(0.0)),
        }
    }
}

/// `x = act(x)`.
#[inline(always)]
pub(super) fn activate(x: &mut [f32], activation: MlpActivation) {
    match activation {
        MlpActivation::Silu => x.iter_mut().for_each(|x| *x /= 1.0 + exp(-*x)),
        MlpActivation::GeluTanh => x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
        MlpActivation::Gelu => x.iter_mut().for_each(|x| *x = gelu(*x)),
        MlpActivation::Relu => x.iter_mut().for_each(|x| *x = x.max(0.0)),
    }
}

#[inline(always)]
fn apply(gate: &[f32], up: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = f(gate) * up;
    }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)))
}

fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// `cap · tanh(x / cap)` in place.
#[inline(always)]
pub(super) fn softcap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = tanh(*x / cap) * cap;
    }
}

/// Softmax of `scale · scores` (soft-capped when asked for) over `visible`; zero elsewhere. Callers compile it for the
/// widest vectors they have.
#[inline(always)]
pub fn masked_softmax(row: &mut [f32], visible: std::ops::Range<usize>, scale: f32, cap: Option<f32>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    for s in row.iter_mut() {
        *s *= scale;
    }
    if let Some(cap) = cap {
        softcap(row, cap);
    }
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            largest[i] = if chunk[i] > largest[i] { chunk[i] } else { largest[i] };
        }
    }
    let largest = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - largest);
            sums[i] += chunk[i];
        }
    }
    for (sum, s) in sums.iter_mut().zip(rest) {
        *s = exp(*s - largest);
        *sum += *s;
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for s in row {
        *s *= inverse;
    }
}

/// Rotates one head: pairs `(i, i + half)` by the angle whose cosine and sine are given; the rest stays.
#[inline(always)]
pub(super) fn rotate(head: &[f32], out: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (turned, kept) = head.split_at(2 * half);
    let (out, out_kept) = out.split_at_mut(2 * half);
    out_kept.copy_from_slice(kept);
    let (a, b) = turned.split_at(half);
    let (out_a, out_b) = out.split_at_mut(half);
    for i in 0..half {
        out_a[i] = a[i] * cos[i] - b[i] * sin[i];
        out_b[i] = b[i] * cos[i] + a[i] * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_are_accurate_to_a_few_ulps() {
        for i in -200_000..200_000 {
            let x = i as f32 * 5e-4;
            let (wanted, found) = (f64::from(x).exp(), f64::from(exp(x)));
            if x > -87.0 && x < 88.0 {
                assert!((found / wanted - 1.0).abs() < 2.5e-7, "exp({x}) = {found}, wanted {wanted}");
            } else {
                assert!(found.is_finite() || x > 88.0, "exp({x}) = {found}");
            }
            let (wanted, found) = (f64::from(x).tanh(), f64::from(tanh(x)));
            assert!((found - wanted).abs() <= 3e-7 * wanted.abs(), "tanh({x}) = {found}, wanted {wanted}");
        }
        assert_eq!((exp(-1e9), tanh(0.0), tanh(1e9), tanh(-1e9)), (0.0, 0.0, 1.0, -1.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    #[test]
    fn norms_match_their_definitions() {
        let width = 37;
        let x: Vec<f32> = (0..2 * width).map(|i| (i * 29 % 53) as f32 * 0.3 - 4.0).collect();
        let gain: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 * 0.1).collect();
        let bias: Vec<f32> = (0..width).map(|i| i as f32 - 9.0).collect();
        for kind in [NormKind::Rms, NormKind::Layer] {
            let mut out = vec![0.0; x.len()];
            vectorised(|| normalise(&x, &mut out, width, kind, 0.25));
            vectorised(|| affine(&mut out, &gain, Some(&bias)));
            for (row, out) in x.chunks(width).zip(out.chunks(width)) {
                let mean = if kind == NormKind::Layer {
                    row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64
                } else {
                    0.0
                };
                let square = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let wanted = (f64::from(row[i]) - mean) / (square + 0.25).sqrt() * f64::from(gain[i])
                        + f64::from(bias[i]);
                    assert!((f64::from(out[i]) - wanted).abs() < 3e-6, "{kind:?}: {} for {wanted}", out[i]);
                }
            }
        }
    }

    #[test]
    fn softmax_sees_only_the_visible_range() {
        let mut row: Vec<f32> = (0..40).map(|i| (i % 7) as f32).collect();
        row[2] = f32::NAN;
        vectorised(|| masked_softmax(&mut row, 5..38, 0.5, Some(3.0)));
        assert!(row[..5].iter().chain(&row[38..]).all(|&p| p == 0.0));
        let weight = |i: usize| (3.0 * ((i % 7) as f64 * 0.5 / 3.0).tanh()).exp();
        let total: f64 = (5..38).map(weight).sum();
        for (i, &p) in row.iter().enumerate().take(38).skip(5) {
            assert!((f64::from(p) - weight(i) / total).abs() < 1e-7, "{i}");
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        let gate: Vec<f32> = (-40..40).map(|i| i as f32 * 0.2).collect();
        let mut gate_up = gate.clone();
        gate_up.extend(std::iter::repeat_n(2.0, gate.len()));
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let cubic = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        let wanted = |activation, x: f64| match activation {
            MlpActivation::Silu => x * sigmoid(x),
            MlpActivation::GeluTanh => 0.5 * x * (1.0 + cubic(x).tanh()),
            MlpActivation::Gelu => 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt())),
            MlpActivation::Relu => x.max(0.0),
        };
        for activation in
            [MlpActivation::Silu, MlpActivation::GeluTanh, MlpActivation::Gelu, MlpActivation::Relu]
        {
            let mut out = vec![0.0; gate.len()];
            vectorised(|| gated(&gate_up, &mut out, gate.len(), activation));
            for (&x, &y) in gate.iter().zip(&out) {
                let wanted = 2.0 * wanted(activation, f64::from(x));
                assert!((f64::from(y) - wanted).abs() < 1e-6, "{activation:?}({x}) = {y}, wanted {wanted}");
            }
            let mut alone = gate.clone();
            vectorised(|| activate(&mut alone, activation));
            assert!(alone.iter().zip(&out).all(|(alone, gated)| 2.0 * alone == *gated));
        }
    }
}
