//! What a latent writes: nearest latents by decoder cosine, and the logits it raises and lowers.

use anyhow::{Context, Result};
use rayon::prelude::*;
use shared::lm::LanguageModel;
use shared::{Rows, Sae, reference};

use crate::cpu::gemm::{Matrix, product};
use crate::progress;

/// Latents whose cosines or logits are in memory at a time, against all others or the whole vocabulary.
const BLOCK: usize = 128;

/// The ends of a list of values: `(index, value)` with the largest first and with the smallest first.
pub type Extremes = (Vec<(u32, f32)>, Vec<(u32, f32)>);

/// The `k` largest values, descending, ties to the lower index; NaN is never chosen.
#[must_use]
pub fn largest(values: impl Iterator<Item = (u32, f32)>, k: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    let mut floor = f32::NEG_INFINITY;
    for (index, value) in values {
        if (best.len() == k && value <= floor) || value.is_nan() || k == 0 {
            continue;
        }
        let at = best.partition_point(|b| b.1 >= value);
        best.insert(at, (index, value));
        best.truncate(k);
        floor = best.last().map_or(floor, |b| b.1);
    }
    best
}

/// The `k` nearest other latents of each latent by cosine of decoder directions, descending.
/// A direction of length zero has cosine zero with everything.
///
/// # Errors
/// If sizes overflow.
pub fn neighbours(sae: &Sae, k: usize) -> Result<Vec<Vec<(u32, f32)>>> {
    let (n, d) = (sae.dims().n_latents, sae.dims().d_out);
    let mut unit = sae.w_dec().to_vec();
    for row in unit.chunks_exact_mut(d) {
        let norm = reference::dot(row, row).sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "directions are f32")]
        let scale = if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 };
        row.iter_mut().for_each(|v| *v *= scale);
    }
    let columns = Matrix::new(&unit, n, d)?.transposed();
    let mut out = Vec::with_capacity(n);
    let mut cosines = vec![0.0f32; BLOCK.min(n) * n];
    for block in unit.chunks(BLOCK * d) {
        let rows = block.len() / d;
        let cosines = &mut cosines[..rows * n];
        product(cosines, Matrix::new(block, rows, d)?, columns, 1.0, false, rayon::current_num_threads())?;
        let first = out.len();
        let nearest = cosines.par_chunks(n).enumerate().map(|(i, row)| {
            largest((0u32..).zip(row.iter().copied()).filter(|&(j, _)| j as usize != first + i), k)
        });
        out.extend(nearest.collect::<Vec<_>>());
    }
    Ok(out)
}

/// For each latent the `k` tokens whose logits a unit of it raises most and lowers most, through the final
/// norm's gain and the unembedding. `None` when directions do not live in the residual stream.
///
/// # Errors
/// If the model refuses the directions.
pub fn logits(sae: &Sae, model: &LanguageModel, k: usize) -> Result<Option<Vec<Extremes>>> {
    let (n, d) = (sae.dims().n_latents, sae.dims().d_out);
    if d != model.spec().d_model {
        return Ok(None);
    }
    let bar = progress::bar(n as u64, "logits", "latents");
    let mut out: Vec<Extremes> = Vec::with_capacity(n);
    for block in sae.w_dec().chunks(BLOCK * d) {
        let all = model.direct_logits(Rows::new(block, d)?).context("cannot compute direct logits")?;
        let vocabulary = all.len() / (block.len() / d).max(1);
        let ends = all.par_chunks(vocabulary.max(1)).map(|row| {
            let each = || (0u32..).zip(row.iter().copied());
            let lowest = largest(each().map(|(i, v)| (i, -v)), k);
            (largest(each(), k), lowest.into_iter().map(|(i, v)| (i, -v)).collect())
        });
        out.extend(ends.collect::<Vec<Extremes>>());
        bar.set_position(out.len() as u64);
    }
    bar.finish_and_clear();
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::{Activation, RowScaling, SaeParts};

    #[test]
    fn largest_is_sorted_and_ignores_nan() {
        let values = [1.0, f32::NAN, 3.0, 3.0, -2.0, 2.0];
        let each = || (0u32..).zip(values);
        assert_eq!(largest(each(), 3), [(2, 3.0), (3, 3.0), (5, 2.0)]);
        assert_eq!(largest(each(), 0), []);
        assert_eq!(largest(each(), 9).len(), 5);
    }

    #[test]
    fn neighbours_are_those_of_a_plain_double_loop() {
        let (n, d) = (300usize, 5);
        let mut w_dec: Vec<f32> = (0..n * d).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect();
        w_dec[5 * 7..5 * 8].fill(0.0);
        let parts = SaeParts {
            d_in: 1,
            d_out: d,
            w_enc: vec![0.0; n],
            b_enc: vec![0.0; n],
            w_dec,
            b_dec: vec![0.0; d],
            activation: Activation::Relu,
            w_skip: None,
            rows: RowScaling::None,
        };
        let sae = Sae::new(parts).unwrap();
        let fast = neighbours(&sae, 3).unwrap();
        let direction = |i| sae.decoder_direction(i);
        let cosine = |a: usize, b: usize| {
            let norms =
                reference::dot(direction(a), direction(a)) * reference::dot(direction(b), direction(b));
            if norms > 0.0 { reference::dot(direction(a), direction(b)) / norms.sqrt() } else { 0.0 }
        };
        for (i, near) in fast.iter().enumerate() {
            let mut slow: Vec<f64> = (0..n).filter(|&j| j != i).map(|j| cosine(i, j)).collect();
            slow.sort_by(|a, b| b.total_cmp(a));
            assert_eq!(near.len(), 3);
            for (&(j, found), wanted) in near.iter().zip(&slow) {
                assert!(j as usize != i);
                assert!(
                    (f64::from(found) - wanted).abs() < 1e-5
                        && (f64::from(found) - cosine(i, j as usize)).abs() < 1e-5
                );
            }
        }
    }
}
