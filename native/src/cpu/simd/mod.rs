//! The one place with vector intrinsics: a tile of a matrix product, in three number formats.
//!
//! A tile is [`ROWS`] rows of the left operand times up to [`WIDTH`] columns of the right one. Both are streams of
//! 32-bit groups: one f32, two bf16, or (in blocks, see [`Kernel::Q8`]) four 8-bit integers. Measured against the same
//! loops without intrinsics, the f32 tile is 1.4 times as fast; the other two formats have no such loops.

#![expect(
    unsafe_code,
    reason = "vector loads, stores and calls of functions compiled for more than the base CPU"
)]

#[cfg(target_arch = "x86_64")]
mod exact;
#[cfg(target_arch = "x86_64")]
mod peak;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Rows of a tile.
pub(crate) const ROWS: usize = 8;
/// Values of a vector register.
pub(crate) const LANES: usize = 16;
/// Columns of a full tile; a narrower one is a multiple of [`LANES`].
pub(crate) const WIDTH: usize = 3 * LANES;
/// Values of a `Q8` block.
pub(crate) const Q8_BLOCK: usize = 32;
/// Groups of a block in rows of the left operand: 32 values as unsigned bytes (128 added), and the scale.
pub(crate) const Q8_LEFT: usize = Q8_BLOCK / 4 + 1;
/// Groups of a block in the right operand: 32 signed bytes, the scale, and −128 times their sum.
pub(crate) const Q8_RIGHT: usize = Q8_BLOCK / 4 + 2;

/// The arithmetic of a tile. A value exists only where the processor has the instructions for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel(Format);

/// The number format of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// One f32.
    F32,
    /// Two bf16, the first in the lower half; products are summed in f32.
    Bf16,
    /// Four 8-bit integers, in blocks of 32 with a scale.
    Q8,
}

impl Kernel {
    /// The kernel of `format`, if this processor has one.
    pub(crate) fn find(format: Format) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if x86::has(format) {
            return Some(Self(format));
        }
        let _ = format;
        None
    }

    /// The number format.
    pub(crate) fn format(self) -> Format {
        self.0
    }

    /// `out[i] = left[i] · right[i]` with the bits an f32 tile gives them, for products summed in blocks of `block` values.
    ///
    /// # Panics
    /// When rows are not of one length, or the kernel is not f32.
    pub(crate) fn dots(
        self,
        left: &[&[f32]; LANES],
        right: &[&[f32]; LANES],
        block: usize,
        out: &mut [f32; LANES],
    ) {
        let n = left[0].len();
        assert!(self.0 == Format::F32 && left.iter().chain(right).all(|row| row.len() == n));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an f32 kernel exists only with AVX-512F; the lengths were looked at.
        unsafe {
            exact::dots(left, right, block.max(1), out);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no kernel exists on this processor: {:?}", (block, out));
    }

    /// A row as bf16 pairs, numbers below the normal ones as zero where that is quicker; `out` has a group for every two values.
    ///
    /// # Panics
    /// When the kernel is not bf16, or `out` is too short.
    pub(crate) fn round(self, x: &[f32], out: &mut [u32]) {
        assert!(self.0 == Format::Bf16 && out.len() == x.len().div_ceil(2));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a bf16 kernel exists only with AVX512-BF16; the length was looked at.
        let done = unsafe { exact::round(x, out) };
        #[cfg(not(target_arch = "x86_64"))]
        let done = 0;
        super::stage::bf16(&x[done..], &mut out[done / 2..]);
    }

    /// Floating-point operations a second of this kernel's multiplications in registers alone, on the threads of the
    /// current pool: what no product can exceed. Takes about 10 ms; none for 8-bit integers.
    pub(crate) fn peak(self) -> Option<f64> {
        #[cfg(target_arch = "x86_64")]
        if self.0 != Format::Q8 {
            const ROUNDS: u32 = 100_000;
            const TRIES: usize = 8;
            let best = |_: rayon::BroadcastContext<'_>| {
                let once = || {
                    let started = std::time::Instant::now();
                    peak::run(self.0, ROUNDS);
                    peak::flops(self.0, ROUNDS) / started.elapsed().as_secs_f64()
                };
                (0..TRIES).map(|_| once()).fold(0.0, f64::max)
            };
            return Some(rayon::broadcast(best).into_iter().sum());
        }
        None
    }

    /// `out[r][..] = rows[r] · panel` (or `+=` when `add`) for all [`ROWS`] rows.
    ///
    /// `panel` is `[groups][width]`, `out` has rows of `width` columns `stride` values apart.
    ///
    /// # Panics
    /// When `width` is not 16, 32 or 48, a row has fewer groups than the panel asks for, or `out` is too short.
    pub(crate) fn tile(
        self,
        rows: &[&[u32]; ROWS],
        panel: &[u32],
        width: usize,
        out: &mut [f32],
        stride: usize,
        add: bool,
    ) {
        #[cfg(target_arch = "x86_64")]
        match width / LANES {
            1 => x86::tile::<1>(self.0, rows, panel, out, stride, add),
            2 => x86::tile::<2>(self.0, rows, panel, out, stride, add),
            _ => x86::tile::<3>(self.0, rows, panel, out, stride, add),
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no kernel exists on this processor: {:?}", (rows, panel, width, out, stride, add));
    }
}
