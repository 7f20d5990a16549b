//! Safe matrix products over the `gemm` crate: lengths are checked, then its raw-pointer entry is called.

use shared::ShapeError;

/// How a dense operand lies in memory: `(rows, cols)` read with these strides.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major `[rows, cols]`.
    ///
    /// # Errors
    /// If `data` does not hold exactly `rows · cols` values.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        check("matrix", rows, cols, data.len())?;
        Ok(Self { data, rows, cols, row_stride: cols, col_stride: 1 })
    }

    /// The transposed view, `[cols, rows]`.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `out = alpha · a b` (or `out += alpha · a b` when `accumulate`), row-major `out [a.rows, b.cols]`, on `threads`
/// threads of the rayon pool (1 stays on this thread).
///
/// # Errors
/// If the inner dimensions disagree or `out` has another length.
pub fn product(
    out: &mut [f32],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
    threads: usize,
) -> Result<(), ShapeError> {
    if a.cols != b.rows {
        return Err(ShapeError::Width { name: "product", expected: a.cols, found: b.rows });
    }
    check("product", a.rows, b.cols, out.len())?;
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    #[expect(clippy::cast_possible_wrap, reason = "strides of slices are at most isize::MAX")]
    let strides = [b.cols, a.col_stride, a.row_stride, b.col_stride, b.row_stride].map(|s| s as isize);
    #[expect(
        unsafe_code,
        reason = "the gemm crate has only a raw-pointer entry; every length is checked above"
    )]
    // SAFETY: `Matrix` holds exactly rows·cols values under strides that address each once, `out` holds exactly
    // a.rows·b.cols, the inner dimensions agree, and a `&mut` slice overlaps neither operand.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            strides[0],
            accumulate,
            a.data.as_ptr(),
            strides[1],
            strides[2],
            b.data.as_ptr(),
            strides[3],
            strides[4],
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
    Ok(())
}

fn check(name: &'static str, rows: usize, cols: usize, found: usize) -> Result<(), ShapeError> {
    match rows.checked_mul(cols) {
        Some(expected) if expected == found => Ok(()),
        expected => Err(ShapeError::Length {
            name,
            shape: vec![rows, cols],
            expected: expected.unwrap_or(usize::MAX),
            found,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
        (0..m * n).map(|i| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum()).collect()
    }

    #[test]
    fn all_four_transpositions_scale_and_accumulate() {
        let (m, k, n) = (3, 5, 4);
        let a: Vec<f32> = (0..15).map(|i| i as f32 - 6.0).collect();
        let b: Vec<f32> = (0..20).map(|i| (i * i % 7) as f32 - 2.0).collect();
        let at: Vec<f32> = (0..15).map(|i| a[(i % m) * k + i / m]).collect();
        let bt: Vec<f32> = (0..20).map(|i| b[(i % k) * n + i / k]).collect();
        let want: Vec<f32> = naive(&a, &b, (m, k, n)).iter().map(|v| 1.0 + 2.0 * v).collect();
        let (a, at) = (Matrix::new(&a, m, k).unwrap(), Matrix::new(&at, k, m).unwrap().transposed());
        let (b, bt) = (Matrix::new(&b, k, n).unwrap(), Matrix::new(&bt, n, k).unwrap().transposed());
        for (a, b) in [(a, b), (at, b), (a, bt), (at, bt)] {
            let mut out = vec![1.0; m * n];
            product(&mut out, a, b, 2.0, true, 1).unwrap();
            assert_eq!(out, want);
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        assert!(Matrix::new(&[1.0; 5], 2, 3).is_err());
        assert!(Matrix::new(&[], usize::MAX, 2).is_err());
        let a = Matrix::new(&[1.0; 6], 2, 3).unwrap();
        assert!(product(&mut [0.0; 4], a, a, 1.0, false, 1).is_err());
        assert!(product(&mut [0.0; 5], a, a.transposed(), 1.0, false, 1).is_err());
    }
}
