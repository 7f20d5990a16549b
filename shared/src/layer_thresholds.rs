//! Encoding vectors of several layers that have thresholds of their own, with one dictionary in memory.
//!
//! The dictionary is held with each latent's lowest threshold of any layer. What a backend finds with it is a superset of what is
//! active at a layer; the layer's own thresholds then decide, with the certainty of [`crate::certify`].

use crate::certify::{self, Margins};
use crate::codes::{Codes, CodesBuilder};
use crate::error::{ShapeError, check_len};
use crate::rows::Rows;
use crate::sae::{Activation, Sae};

/// `sae` with each latent's lowest threshold in `thresholds [L, n]`; as it is where there are none.
///
/// # Errors
/// If they are not whole rows, or a threshold is negative or not finite.
pub fn lowest(sae: Sae, thresholds: &[f32]) -> Result<Sae, ShapeError> {
    if thresholds.is_empty() {
        return Ok(sae);
    }
    let n = sae.dims().n_latents;
    check_len("thresholds of layers", &[thresholds.len().div_ceil(n), n], thresholds.len())?;
    let mut threshold = thresholds[..n].to_vec();
    for layer in thresholds.chunks_exact(n) {
        threshold.iter_mut().zip(layer).for_each(|(lowest, own)| *lowest = lowest.min(*own));
    }
    Sae::new(crate::sae::SaeParts { activation: Activation::JumpRelu { threshold }, ..sae.into_parts() })
}

/// Decides by the thresholds of layers what was found with the lowest.
#[derive(Debug)]
pub struct Thinner<'a> {
    sae: &'a Sae,
    margins: Margins,
}

impl<'a> Thinner<'a> {
    /// For codes made with `sae`, the dictionary of the lowest thresholds.
    #[must_use]
    pub fn new(sae: &'a Sae) -> Self {
        Self { sae, margins: Margins::new(sae) }
    }

    /// Of `codes` of the vectors `x`, by any backend, those above `thresholds [n]`.
    ///
    /// # Errors
    /// If there are other numbers of rows or thresholds.
    pub fn above(&self, thresholds: &[f32], x: Rows<'_>, codes: &Codes) -> Result<Codes, ShapeError> {
        let dims = self.sae.dims();
        x.expect_width("x", dims.d_in)?;
        check_len("thresholds", &[dims.n_latents], thresholds.len())?;
        check_len("rows", &[codes.n_rows()], x.n_rows())?;
        let scaled = self.sae.rows().scaled(x);
        let mut builder = CodesBuilder::new(dims.n_latents);
        for (row, (latents, values)) in Rows::new(&scaled, dims.d_in)?.iter().zip(codes.iter()) {
            let norm = certify::norm(row);
            for (&latent, &value) in latents.iter().zip(values) {
                let i = latent as usize;
                let margin = self.margins.margin(i, norm);
                if let Some(value) = certify::decide(self.sae, row, i, value, margin, thresholds[i]) {
                    builder.push(latent, value);
                }
            }
            builder.end_row()?;
        }
        Ok(builder.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::sae::SaeParts;
    use crate::{cpu::ScalarBackend, reference};

    fn sae(threshold: Vec<f32>, rows: RowScaling) -> Sae {
        let w_enc = (0..6 * 4u16).map(|i| f32::from(i * 37 % 19) / 9.0 - 1.0).collect();
        Sae::new(SaeParts {
            d_in: 4,
            d_out: 1,
            w_enc,
            b_enc: vec![0.25, -0.125, 0.0, 0.5, 0.0, -0.25],
            w_dec: vec![1.0; 6],
            b_dec: vec![0.0],
            activation: Activation::JumpRelu { threshold },
            w_skip: None,
            rows,
        })
        .unwrap()
    }

    #[test]
    fn each_layer_has_the_reference_active_set_of_its_own_thresholds() {
        let x: Vec<f32> = (0..40u16).map(|i| f32::from(i * 23 % 17) / 8.0 - 1.0).collect();
        let x = Rows::new(&x, 4).unwrap();
        for rows in [RowScaling::None, RowScaling::LAYER_NORM] {
            // One row of latent 0 lies exactly on its threshold at the last layer.
            let scaled = rows.scaled(x);
            let exact = reference::pre_activation(&sae(vec![0.0; 6], rows), &scaled[..4], 0).abs() as f32;
            let mut thresholds: Vec<f32> = (0..18u16).map(|i| f32::from(i * 11 % 7) / 4.0).collect();
            thresholds[12] = exact;
            let all = sae(vec![9.0; 6], rows);
            let found = lowest(all, &thresholds).unwrap();
            let codes = ScalarBackend::new(found.clone());
            let codes = pollster::block_on(crate::Forward::encode(&codes, x)).unwrap();
            let mut n = Vec::new();
            for layer in thresholds.chunks(6) {
                let thin = Thinner::new(&found).above(layer, x, &codes).unwrap();
                let wanted = reference::encode(&sae(layer.to_vec(), rows), x).unwrap();
                assert!(thin.iter().zip(wanted.iter()).all(|(a, b)| a.0 == b.0), "{rows:?}");
                n.push(thin.n_active());
            }
            assert!(n[0] != n[1] && n.iter().all(|&n| n > 0 && n <= codes.n_active()), "{n:?}");
        }
    }

    #[test]
    fn misfits_are_refused() {
        let sae = sae(vec![0.5; 6], RowScaling::None);
        assert_eq!(lowest(sae.clone(), &[]).unwrap(), sae);
        assert!(lowest(sae.clone(), &[1.0; 7]).is_err());
        assert!(lowest(sae.clone(), &[-1.0; 6]).is_err());
        let (x, codes) = (Rows::new(&[1.0; 4], 4).unwrap(), CodesBuilder::new(6).finish());
        assert!(Thinner::new(&sae).above(&[0.5; 6], x, &codes).is_err(), "another number of rows");
        assert!(Thinner::new(&sae).above(&[0.5; 5], x, &codes).is_err());
    }
}
