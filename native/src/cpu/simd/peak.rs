//! AVX-512: how fast this processor multiplies when nothing but its registers takes part.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_epi32, _mm512_set1_ps,
};
use std::array::from_fn;
use std::hint::black_box;

use super::{Format, LANES};

/// Independent sums, as many as a full tile keeps.
const SUMS: usize = 24;

/// Floating-point operations of `rounds` of [`run`]; none where the format has no loop.
pub(super) fn flops(format: Format, rounds: u32) -> f64 {
    let per_lane = match format {
        Format::F32 => 2.0,
        Format::Bf16 => 4.0,
        Format::Q8 => 0.0,
    };
    per_lane * (LANES * SUMS) as f64 * f64::from(rounds)
}

/// Multiplies and adds in registers, `rounds` times [`SUMS`] instructions.
pub(super) fn run(format: Format, rounds: u32) {
    // SAFETY: a `Kernel` of this format exists only where the processor has these instructions; nothing else calls this.
    unsafe {
        match format {
            Format::F32 => run_f32(rounds),
            Format::Bf16 => run_bf16(rounds),
            Format::Q8 => {}
        }
    }
}

#[target_feature(enable = "avx512f")]
fn run_f32(rounds: u32) {
    let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
    let mut sums = from_fn::<_, SUMS, _>(|_| b);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn run_bf16(rounds: u32) {
    // SAFETY: both types are 64 bytes without invalid values.
    let pair =
        |bits: i32| unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(bits))) };
    let (a, b) = (pair(0x3f00_3f00), pair(0x3e80_3e80));
    let mut sums = from_fn::<_, SUMS, _>(|_| _mm512_set1_ps(0.25));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, b);
        }
    }
    black_box(sums);
}
