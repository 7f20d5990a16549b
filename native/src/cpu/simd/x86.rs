//! AVX-512: f32 products, bf16 pairs (`vdpbf16ps`), and 8-bit integers (`vpdpbusd`).
//!
//! Sums of an output value are taken in the order of the groups, whatever tile it falls into.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::array::from_fn;

use super::{Format, LANES, Q8_LEFT, Q8_RIGHT, ROWS};

/// The columns of one group, `N` registers of them.
type Group<const N: usize> = [[u32; LANES]; N];

/// Whether this processor has the instructions `format` needs.
pub(super) fn has(format: Format) -> bool {
    is_x86_feature_detected!("avx512f")
        && match format {
            Format::F32 => true,
            Format::Bf16 => is_x86_feature_detected!("avx512bf16"),
            Format::Q8 => is_x86_feature_detected!("avx512vnni"),
        }
}

/// [`super::Kernel::tile`] for `N` registers of columns.
pub(super) fn tile<const N: usize>(
    format: Format,
    rows: &[&[u32]; ROWS],
    panel: &[u32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let panel = panel.as_chunks::<LANES>().0.as_chunks::<N>().0;
    // SAFETY: a `Kernel` of this format exists only where `has` found these instructions; nothing else calls this.
    unsafe {
        match format {
            Format::F32 => f32_tile(rows, panel, out, stride, add),
            Format::Bf16 => bf16_tile(rows, panel, out, stride, add),
            Format::Q8 => q8_tile(rows, panel, out, stride, add),
        }
    }
}

#[inline(always)]
fn load(x: &[u32; LANES]) -> __m512i {
    // SAFETY: the reference covers the 64 bytes read; no alignment is asked for; callers have AVX-512.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[inline(always)]
fn load_bf16(x: &[u32; LANES]) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid values.
    unsafe { std::mem::transmute(load(x)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast_bf16(pair: u32) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid values.
    unsafe { std::mem::transmute(_mm512_set1_epi32(pair.cast_signed())) }
}

/// Writes (or adds) the sums of consecutive rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish<const N: usize>(sums: &[[__m512; N]], out: &mut [f32], stride: usize, add: bool) {
    for (r, sums) in sums.iter().enumerate() {
        let row = out[r * stride..r * stride + LANES * N].as_chunks_mut::<LANES>().0;
        for j in 0..N {
            // SAFETY: `row[j]` is the 64 bytes read and written; no alignment is asked for.
            unsafe {
                let to = row[j].as_mut_ptr();
                let sum = if add { _mm512_add_ps(sums[j], _mm512_loadu_ps(to)) } else { sums[j] };
                _mm512_storeu_ps(to, sum);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn f32_tile<const N: usize>(
    rows: &[&[u32]; ROWS],
    panel: &[Group<N>],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let rows: [&[u32]; ROWS] = from_fn(|r| &rows[r][..panel.len()]);
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    for (i, group) in panel.iter().enumerate() {
        let columns: [__m512; N] = from_fn(|j| _mm512_castsi512_ps(load(&group[j])));
        for r in 0..ROWS {
            let x = _mm512_set1_ps(f32::from_bits(rows[r][i]));
            for j in 0..N {
                sums[r][j] = _mm512_fmadd_ps(x, columns[j], sums[r][j]);
            }
        }
    }
    finish(&sums, out, stride, add);
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_tile<const N: usize>(
    rows: &[&[u32]; ROWS],
    panel: &[Group<N>],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let rows: [&[u32]; ROWS] = from_fn(|r| &rows[r][..panel.len()]);
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    for (i, group) in panel.iter().enumerate() {
        let columns: [__m512bh; N] = from_fn(|j| load_bf16(&group[j]));
        for r in 0..ROWS {
            let x = broadcast_bf16(rows[r][i]);
            for j in 0..N {
                sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, columns[j]);
            }
        }
    }
    finish(&sums, out, stride, add);
}

/// Two halves of four rows: integer and f32 sums of eight would not fit the registers.
#[target_feature(enable = "avx512f,avx512vnni")]
fn q8_tile<const N: usize>(
    rows: &[&[u32]; ROWS],
    panel: &[Group<N>],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    const HALF: usize = ROWS / 2;
    const BYTES: usize = Q8_LEFT - 1;
    let panel = panel.as_chunks::<Q8_RIGHT>().0;
    for first in [0, HALF] {
        let rows: [&[[u32; Q8_LEFT]]; HALF] =
            from_fn(|r| &rows[first + r].as_chunks::<Q8_LEFT>().0[..panel.len()]);
        let mut sums = [[_mm512_setzero_ps(); N]; HALF];
        for (i, block) in panel.iter().enumerate() {
            // Rows are unsigned bytes, 128 too large: the dot products begin at −128 · Σ columns.
            let begin: [__m512i; N] = from_fn(|j| load(&block[BYTES + 1][j]));
            let mut dots = [begin; HALF];
            for q in 0..BYTES {
                let columns: [__m512i; N] = from_fn(|j| load(&block[q][j]));
                for r in 0..HALF {
                    let x = _mm512_set1_epi32(rows[r][i][q].cast_signed());
                    for j in 0..N {
                        dots[r][j] = _mm512_dpbusd_epi32(dots[r][j], x, columns[j]);
                    }
                }
            }
            let scales: [__m512; N] = from_fn(|j| _mm512_castsi512_ps(load(&block[BYTES][j])));
            for r in 0..HALF {
                let x = _mm512_set1_ps(f32::from_bits(rows[r][i][BYTES]));
                for j in 0..N {
                    let dot = _mm512_cvtepi32_ps(dots[r][j]);
                    sums[r][j] = _mm512_fmadd_ps(dot, _mm512_mul_ps(x, scales[j]), sums[r][j]);
                }
            }
        }
        finish(&sums, &mut out[first * stride..], stride, add);
    }
}
