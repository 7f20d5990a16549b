//! AVX-512: single values of an f32 product once more, with the bits [`super::x86::tile`] gives them; and rounding to bf16.
//!
//! A tile takes the sum of each value in the order of the groups, one fused multiply-add each. Sixteen such sums that share
//! neither row run here side by side, a lane each: four values of sixteen rows at a time are loaded and transposed.

use std::arch::x86_64::{
    __m512, _mm_loadu_ps, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps128_ps512,
    _mm512_cvtne2ps_pbh, _mm512_fmadd_ps, _mm512_insertf32x4, _mm512_loadu_ps, _mm512_setzero_ps,
    _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use super::LANES;

/// Values of a row that are transposed at a time.
const STEP: usize = 4;

/// `out[i] = left[i] · right[i]`, summed in blocks of `block` values.
///
/// # Safety
/// The processor has AVX-512F, and all rows are of one length.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn dots(
    left: &[&[f32]; LANES],
    right: &[&[f32]; LANES],
    block: usize,
    out: &mut [f32; LANES],
) {
    let n = left[0].len();
    let mut total = _mm512_setzero_ps();
    for start in (0..n).step_by(block) {
        let end = (start + block).min(n);
        let whole = start + (end - start) / STEP * STEP;
        let mut sums = _mm512_setzero_ps();
        for k in (start..whole).step_by(STEP) {
            // SAFETY: `k + STEP` is at most the length of every row.
            let (l, r) = unsafe { (columns(left, k), columns(right, k)) };
            for c in 0..STEP {
                sums = _mm512_fmadd_ps(l[c], r[c], sums);
            }
        }
        for k in whole..end {
            let column = |rows: &[&[f32]; LANES]| -> [f32; LANES] { std::array::from_fn(|i| rows[i][k]) };
            let (l, r) = (column(left), column(right));
            // SAFETY: both arrays are the 64 bytes read.
            sums = unsafe { _mm512_fmadd_ps(_mm512_loadu_ps(l.as_ptr()), _mm512_loadu_ps(r.as_ptr()), sums) };
        }
        total = if start == 0 { sums } else { _mm512_add_ps(sums, total) };
    }
    // SAFETY: `out` is the 64 bytes written.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
}

/// Values `k..k + 4` of all rows: a register for each, a lane for each row.
///
/// # Safety
/// `k + 4` is at most the length of every row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn columns(rows: &[&[f32]; LANES], k: usize) -> [__m512; STEP] {
    // SAFETY: the caller vouches for the four values.
    let load = |row: usize| unsafe { _mm_loadu_ps(rows[row].as_ptr().add(k)) };
    // Register i: rows i, 4 + i, 8 + i, 12 + i, a quarter each.
    let quarters = |i: usize| {
        let first = _mm512_castps128_ps512(load(i));
        let second = _mm512_insertf32x4::<1>(first, load(STEP + i));
        let third = _mm512_insertf32x4::<2>(second, load(2 * STEP + i));
        _mm512_insertf32x4::<3>(third, load(3 * STEP + i))
    };
    let (a, b, c, d) = (quarters(0), quarters(1), quarters(2), quarters(3));
    let pairs = [
        [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)],
        [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)],
    ]
    .map(|[ab, cd]| [_mm512_castps_pd(ab), _mm512_castps_pd(cd)]);
    let [[ab, cd], [ef, gh]] = pairs;
    [
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh)),
    ]
}

/// Whole runs of 32 values to bf16 pairs, to nearest, ties to even; numbers below the normal ones become zero. Returns how
/// many values were converted.
///
/// # Safety
/// The processor has AVX512-BF16, and `out` has a group for every two values.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn round(x: &[f32], out: &mut [u32]) -> usize {
    let (runs, _) = x.as_chunks::<{ 2 * LANES }>();
    for (run, out) in runs.iter().zip(out.as_chunks_mut::<LANES>().0) {
        // SAFETY: both halves of `run` are the 64 bytes read; both types are 64 bytes without invalid values.
        *out = unsafe {
            let (low, high) = (_mm512_loadu_ps(run.as_ptr()), _mm512_loadu_ps(run.as_ptr().add(LANES)));
            std::mem::transmute::<std::arch::x86_64::__m512bh, [u32; LANES]>(_mm512_cvtne2ps_pbh(high, low))
        };
    }
    runs.len() * 2 * LANES
}
