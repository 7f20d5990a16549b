//! Vector operations on f32 slices, compiled once for every instruction set and chosen at run time.
//!
//! [`vectorised`] runs a closure with the widest instructions this processor has; the operations below are
//! inlined into it, which is what lets the compiler vectorise them for those instructions.

/// Runs `work` compiled for the widest vector instructions available.
#[inline(always)]
pub(crate) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Inner product, in a fixed order of sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 32;
    let mut sums = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + rest
}

/// `to += factor · v`.
#[inline(always)]
pub(crate) fn add_scaled(to: &mut [f32], factor: f32, v: &[f32]) {
    for (to, v) in to.iter_mut().zip(v) {
        *to += factor * v;
    }
}

/// Whether any value is above `limit`, without an early exit so that it vectorises.
#[inline(always)]
pub(crate) fn any_above(values: &[f32], limit: f32) -> bool {
    values.iter().fold(0u32, |hit, &v| hit | u32::from(v > limit)) != 0
}

/// Whether any value is above the limit at its place.
#[inline(always)]
pub(crate) fn any_exceeds(values: &[f32], limits: &[f32]) -> bool {
    values.iter().zip(limits).fold(0u32, |hit, (&v, &limit)| hit | u32::from(v > limit)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_equal_their_definitions() {
        for n in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            let want: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(vectorised(|| dot(&a, &b))) - want).abs() < 1e-5);
            let mut sum = a.clone();
            vectorised(|| add_scaled(&mut sum, 2.0, &b));
            assert!(sum.iter().zip(a.iter().zip(&b)).all(|(s, (a, b))| (s - (a + 2.0 * b)).abs() < 1e-6));
            let top = a.iter().copied().fold(f32::MIN, f32::max);
            assert_eq!(vectorised(|| any_above(&a, 0.9)), top > 0.9);
            assert!(!vectorised(|| any_above(&a, top)));
            assert_eq!(vectorised(|| any_exceeds(&a, &b)), a.iter().zip(&b).any(|(a, b)| a > b));
        }
    }
}
