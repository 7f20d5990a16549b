//! Compact weights on processors without instructions for them: widened a few rows at a time for an f32 product.
//!
//! Operands are rounded exactly as for the kernels of [`super::simd`], so the two differ only in how f32 sums round.

use rayon::prelude::*;
use shared::ShapeError;

use super::gemm::{Matrix, product};
use super::simd::Format;

/// Rows of weights widened at a time.
const ROWS: usize = 64;

/// A weight matrix `[n_out, n_in]` in bf16 or 8-bit integers, row-major.
#[derive(Debug, Clone)]
pub(crate) struct WidenedMatrix {
    format: Format,
    n_out: usize,
    n_in: usize,
    data: Vec<u32>,
}

impl WidenedMatrix {
    pub(crate) fn new(format: Format, weight: &[f32], n_out: usize, n_in: usize) -> Result<Self, ShapeError> {
        Matrix::new(weight, n_out, n_in)?;
        let mut data = Vec::new();
        if n_in > 0 {
            format.stage(weight, n_in, 0, n_in, &mut data);
        }
        Ok(Self { format, n_out, n_in, data })
    }

    pub(crate) fn n_out(&self) -> usize {
        self.n_out
    }

    pub(crate) fn n_in(&self) -> usize {
        self.n_in
    }

    pub(crate) fn row(&self, i: usize, row: &mut [f32]) {
        let groups = self.format.groups(self.n_in);
        self.format.unstage(&self.data[i * groups..(i + 1) * groups], row);
    }

    /// As [`super::packed::PackedMatrix::product`].
    pub(crate) fn product(&self, x: &[f32], out: &mut [f32], add: bool) -> Result<(), ShapeError> {
        let m = x.len() / self.n_in.max(1);
        Matrix::new(x, m, self.n_in)?;
        Matrix::new(out, m, self.n_out)?;
        if x.is_empty() || out.is_empty() {
            return Ok(());
        }
        let (mut groups, mut rounded) = (Vec::new(), vec![0.0; x.len()]);
        self.format.stage(x, self.n_in, 0, self.n_in, &mut groups);
        let rows =
            rounded.chunks_exact_mut(self.n_in).zip(groups.chunks_exact(self.format.groups(self.n_in)));
        rows.for_each(|(row, groups)| self.format.unstage(groups, row));
        let starts: Vec<usize> = (0..self.n_out).step_by(ROWS).collect();
        let parts = starts.par_iter().map(|&start| {
            let n = ROWS.min(self.n_out - start);
            let (mut weight, mut part) = (vec![0.0; n * self.n_in], vec![0.0; m * n]);
            for (i, row) in weight.chunks_exact_mut(self.n_in).enumerate() {
                self.row(start + i, row);
            }
            let (x, w) = (Matrix::new(&rounded, m, self.n_in)?, Matrix::new(&weight, n, self.n_in)?);
            product(&mut part, x, w.transposed(), 1.0, false, 1)?;
            Ok(part)
        });
        let parts: Vec<Vec<f32>> = parts.collect::<Result<_, ShapeError>>()?;
        for (start, part) in starts.into_iter().zip(parts) {
            let n = part.len() / m;
            for (out, part) in out.chunks_exact_mut(self.n_out).zip(part.chunks_exact(n)) {
                for (out, part) in out[start..start + n].iter_mut().zip(part) {
                    *out = if add { *out + part } else { *part };
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::PackedMatrix;
    use super::super::simd::Kernel;
    use super::*;

    #[test]
    fn agrees_with_the_kernels() {
        let (m, k, n) = (11, 150, 131);
        let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.73).cos()).collect();
        for format in [Format::Bf16, Format::Q8] {
            let widened = WidenedMatrix::new(format, &w, n, k).unwrap();
            let mut out = vec![1.0; m * n];
            widened.product(&x, &mut out, true).unwrap();
            let mut row = vec![0.0; k];
            widened.row(130, &mut row);
            assert!(row.iter().zip(&w[130 * k..]).all(|(a, b)| (a - b).abs() < 0.01) && row != w[130 * k..]);
            let Some(kernel) = Kernel::find(format) else { continue };
            let mut wanted = vec![1.0; m * n];
            PackedMatrix::new(kernel, &w, n, k).unwrap().product(&x, &mut wanted, true).unwrap();
            assert!(out.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 2e-5), "{format:?}");
        }
        assert!(WidenedMatrix::new(Format::Bf16, &w, 3, 3).is_err());
    }
}
