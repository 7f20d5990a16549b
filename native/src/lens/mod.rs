//! Lenses on files, and their maps on many vectors at once; what they are is [`shared::lens`]. [`fit`] makes one.

pub mod fit;

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use shared::Rows;
use shared::format::tensors::TensorFile;
use shared::format::tuned_lens::{self, Lens};
use shared::lens::Translator;

use crate::cpu::gemm::{Matrix, product};

/// Reads the lens at `path`: a folder with `lens.safetensors`, as `stratascope lens` writes, or `params.pt`, as published.
///
/// # Errors
/// If neither is there, or it does not parse.
pub fn read(path: &Path) -> Result<Lens> {
    let (own, published) = (path.join(tuned_lens::LENS), path.join(tuned_lens::PARAMS));
    let wrong = || format!("cannot use the lens at {}", path.display());
    if own.is_file() {
        let bytes = std::fs::read(&own).with_context(wrong)?;
        let file = TensorFile::open(tuned_lens::LENS, &bytes).with_context(wrong)?;
        return tuned_lens::read_tensors(tuned_lens::LENS, &file, "").with_context(wrong);
    }
    if published.is_file() {
        return tuned_lens::read_params(File::open(&published).with_context(wrong)?).with_context(wrong);
    }
    bail!("{} holds neither {} nor {}", path.display(), tuned_lens::LENS, tuned_lens::PARAMS)
}

/// `x + W x + b` of every row `[N, d]`; the rows as they are without a map.
///
/// # Errors
/// If rows have another width.
pub fn forward<'a>(map: Option<&Translator>, x: Rows<'a>) -> Result<Cow<'a, [f32]>> {
    let Some(map) = map else { return Ok(Cow::Borrowed(x.data())) };
    let d = map.width();
    x.expect_width("vectors of a lens", d)?;
    let mut out: Vec<f32> = x.iter().flat_map(|row| row.iter().zip(map.bias()).map(|(x, b)| x + b)).collect();
    multiply(&mut out, x, map.weight(), true)?;
    Ok(Cow::Owned(out))
}

/// The rows that [`forward`] makes `y` `[N, d]` of.
///
/// # Errors
/// If rows have another width.
pub fn backward(map: Option<&Translator>, y: Vec<f32>) -> Result<Vec<f32>> {
    let Some(map) = map else { return Ok(y) };
    let d = map.width();
    let mut less = y;
    less.chunks_mut(d.max(1)).for_each(|row| row.iter_mut().zip(map.bias()).for_each(|(y, b)| *y -= b));
    let mut out = vec![0.0; less.len()];
    multiply(&mut out, Rows::new(&less, d)?, map.inverse(), false)?;
    Ok(out)
}

/// `out = x Aᵀ`, or that added to it, for `a` `[d, d]`.
fn multiply(out: &mut [f32], x: Rows<'_>, a: &[f32], adds: bool) -> Result<()> {
    let d = x.width();
    if x.n_rows() > 0 {
        let (x, a) = (Matrix::new(x.data(), x.n_rows(), d)?, Matrix::new(a, d, d)?.transposed());
        product(out, x, a, 1.0, adds, rayon::current_num_threads())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_vectors_at_once_are_each_what_the_definition_says() {
        let d = 7;
        let noise = |i: usize| ((i * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.4;
        let map = Translator::new((0..d * d).map(noise).collect(), (0..d).map(noise).collect()).unwrap();
        let x: Vec<f32> = (0..5 * d).map(|i| 3.0 * noise(i * i + 1)).collect();
        let x = Rows::new(&x, d).unwrap();
        let there = forward(Some(&map), x).unwrap();
        let back = backward(Some(&map), there.to_vec()).unwrap();
        for (i, row) in x.iter().enumerate() {
            let wanted = map.forward(row);
            for c in 0..d {
                assert!(
                    (there[i * d + c] - wanted[c]).abs() < 1e-5 && (back[i * d + c] - row[c]).abs() < 1e-5
                );
            }
        }
        assert!(matches!(forward(None, x).unwrap(), Cow::Borrowed(_)));
        assert_eq!(backward(None, vec![1.0]).unwrap(), [1.0]);
        assert!(forward(Some(&map), Rows::new(&[0.0; 3], 3).unwrap()).is_err());
        assert!(read(Path::new("nowhere")).unwrap_err().to_string().contains("neither"));
    }
}
