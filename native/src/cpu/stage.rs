//! Rows of f32 in the number format of a matrix product, as 32-bit groups (see [`super::simd`]), and back.

use super::simd::{Format, Q8_BLOCK, Q8_LEFT};
use crate::train::simd::vectorised;

/// Adding it to a small f32 leaves the nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

impl Format {
    /// Values of the smallest piece that can be converted by itself.
    pub(crate) fn unit(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Q8 => Q8_BLOCK,
        }
    }

    /// Groups of a unit in rows of activations.
    pub(crate) fn left(self) -> usize {
        if self == Self::Q8 { Q8_LEFT } else { 1 }
    }

    /// Groups of `n` values in rows of activations.
    pub(crate) fn groups(self, n: usize) -> usize {
        n.div_ceil(self.unit()) * self.left()
    }

    /// Columns `first..first + n` of rows `x [_, width]` as groups, row after row; a last incomplete unit is filled with
    /// zeros. Integers are unsigned, 128 too large.
    pub(crate) fn stage(self, x: &[f32], width: usize, first: usize, n: usize, out: &mut Vec<u32>) {
        let groups = self.groups(n);
        out.resize(x.len() / width * groups, 0);
        vectorised(
            #[inline(always)]
            || {
                for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(groups)) {
                    let x = &x[first..first + n];
                    match self {
                        Self::F32 => out.iter_mut().zip(x).for_each(|(out, x)| *out = x.to_bits()),
                        Self::Bf16 => bf16(x, out),
                        Self::Q8 => q8(x, out),
                    }
                }
            },
        );
    }

    /// The values that groups stand for.
    pub(crate) fn unstage(self, groups: &[u32], out: &mut [f32]) {
        match self {
            Self::F32 => groups.iter().zip(out).for_each(|(group, out)| *out = f32::from_bits(*group)),
            Self::Bf16 => {
                for (out, group) in out.chunks_mut(2).zip(groups) {
                    let pair = [group << 16, group & 0xffff_0000];
                    out.iter_mut().zip(pair).for_each(|(out, bits)| *out = f32::from_bits(bits));
                }
            }
            Self::Q8 => {
                for (out, block) in out.chunks_mut(Q8_BLOCK).zip(groups.as_chunks::<Q8_LEFT>().0) {
                    let [bytes @ .., scale] = block;
                    let bytes = bytes.iter().flat_map(|group| group.to_le_bytes());
                    for (out, byte) in out.iter_mut().zip(bytes) {
                        *out = f32::from(i16::from(byte) - 128) * f32::from_bits(*scale);
                    }
                }
            }
        }
    }
}

/// Round to nearest, ties to even; a NaN stays one.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) | 0x40 } else { rounded }
}

/// A row as bf16 pairs.
#[inline(always)]
pub(super) fn bf16(x: &[f32], out: &mut [u32]) {
    let (pairs, last) = x.as_chunks::<2>();
    for (out, pair) in out.iter_mut().zip(pairs) {
        *out = round_bf16(pair[0]) | (round_bf16(pair[1]) << 16);
    }
    if let ([x], Some(out)) = (last, out.last_mut()) {
        *out = round_bf16(*x);
    }
}

#[inline(always)]
fn q8(x: &[f32], out: &mut [u32]) {
    let (blocks, rest) = x.as_chunks::<Q8_BLOCK>();
    let (out, _) = out.as_chunks_mut::<Q8_LEFT>();
    for (block, out) in blocks.iter().zip(out.iter_mut()) {
        q8_block(block, out);
    }
    if let (false, Some(out)) = (rest.is_empty(), out.last_mut()) {
        let mut block = [0.0; Q8_BLOCK];
        block[..rest.len()].copy_from_slice(rest);
        q8_block(&block, out);
    }
}

/// The largest magnitude becomes ±127. Where a value is not finite the scale is NaN, and so is every product.
#[inline(always)]
fn q8_block(x: &[f32; Q8_BLOCK], out: &mut [u32; Q8_LEFT]) {
    const INFINITE: u32 = 0x7f80_0000;
    let mut largest = [0u32; 16];
    for i in 0..16 {
        // Magnitudes of floats are ordered as their bits are.
        let (a, b) = (x[i].to_bits() & 0x7fff_ffff, x[i + 16].to_bits() & 0x7fff_ffff);
        largest[i] = if a > b { a } else { b };
    }
    let largest = largest.iter().copied().fold(0, |m, x| if x > m { x } else { m });
    let scale = if largest >= INFINITE { f32::NAN } else { f32::from_bits(largest) / 127.0 };
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // The scale of a block of the tiniest numbers has an infinite inverse; as zeros they are nearer than as NaN.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut bytes = [0u8; Q8_BLOCK];
    for i in 0..Q8_BLOCK {
        bytes[i] = ((x[i] * inverse + ROUND).to_bits() as u8) ^ 0x80;
    }
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *out = u32::from_le_bytes(*bytes);
    }
    out[Q8_LEFT - 1] = scale.to_bits();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(format: Format, x: &[f32]) -> Vec<f32> {
        let (mut groups, mut out) = (Vec::new(), vec![0.0; x.len()]);
        format.stage(x, x.len(), 0, x.len(), &mut groups);
        format.unstage(&groups, &mut out);
        out
    }

    #[test]
    fn bf16_rounds_to_the_nearest_even() {
        let x = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -3.333, f32::INFINITY, 1e-40, 0.1];
        let wanted: Vec<f32> = x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(there_and_back(Format::Bf16, &x), wanted);
        assert_eq!(wanted[1], 1.0);
        assert!(
            there_and_back(Format::Bf16, &[f32::from_bits(0x7fff_ffff), -f32::NAN])
                .iter()
                .all(|x| x.is_nan())
        );
    }

    #[test]
    fn q8_is_off_by_at_most_half_a_step() {
        let x: Vec<f32> =
            (0..75).map(|i| ((i * 37) % 101) as f32 * if i < 40 { 0.01 } else { -3.0 }).collect();
        for (x, found) in x.chunks(32).zip(there_and_back(Format::Q8, &x).chunks(32)) {
            let step = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            assert!(x.iter().zip(found).all(|(x, y)| (x - y).abs() <= step * 0.5001));
        }
        assert_eq!(there_and_back(Format::Q8, &[0.0; 40]), [0.0; 40]);
        assert_eq!(there_and_back(Format::Q8, &[1e-44; 3]), [0.0; 3]);
        let broken = there_and_back(Format::Q8, &[1.0, f32::NAN, f32::INFINITY]);
        assert!(broken.iter().all(|x| x.is_nan()));
    }
}
