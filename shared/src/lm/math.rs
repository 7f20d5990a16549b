//! Elementary functions as straight-line f32 arithmetic, so that loops over them become vector instructions.

/// eˣ to about 1 ulp; 0 below −87.33, saturating near 88.72.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n·ln2 + r with |r| ≤ ln2/2: adding and taking away 1.5·2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_3e-1;
    let fraction = p * r * r + r + 1.0;
    // 2ⁿ in two factors, so that n = 128 and n = −126 stay representable.
    let (n, half) = (n as i32, n as i32 >> 1);
    let power = |k: i32| f32::from_bits(((k + 127) << 23) as u32);
    let value = fraction * power(half) * power(n - half);
    if x < -87.336_54 { 0.0 } else { value }
}

/// tanh x, with a series near zero so that small arguments keep their relative accuracy.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    // Below 0.625: the odd minimax polynomial of Cephes' tanhf.
    let mut p = -5.704_988_7e-3;
    p = p * square + 2.063_909e-2;
    p = p * square - 5.373_971_6e-2;
    p = p * square + 1.333_144_2e-1;
    p = p * square - 3.333_328e-1;
    let small = p * square * x + x;
    // `exp` saturates, so large sizes give exactly 1; a NaN stays one.
    let large = 1.0 - 2.0 / (exp(2.0 * size) + 1.0);
    if size < 0.625 { small } else { large.copysign(x) }
}
