//! The dense f64 optimiser that training steps are judged by.

use anyhow::{Result, ensure};
use shared::Rows;
use shared::loss::{Gradients, Latents as Reference, Objective, TrainSae, normalise, remove_parallel};

use super::cases::{D, N_LATENTS, N_ROWS};
use crate::train::{Betas, Latents, Params, Settings};

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&v| f64::from(v)).collect()
}

/// The dense f64 optimiser: every value, every step.
#[derive(Debug)]
pub struct Textbook {
    /// The parameters.
    pub sae: TrainSae,
    /// First and second moments of each array, in the order of [`arrays`].
    moments: Vec<[Vec<f64>; 2]>,
    step: i32,
    encoder_bias: bool,
}

/// Every trained array with its gradient, and whether it takes the rate of the latent function.
fn arrays<'a>(sae: &'a mut TrainSae, g: &'a Gradients) -> Vec<(&'a mut Vec<f64>, &'a Vec<f64>, bool)> {
    let mut arrays = vec![
        (&mut sae.w_enc, &g.w_enc, false),
        (&mut sae.b_enc, &g.b_enc, false),
        (&mut sae.w_dec, &g.w_dec, false),
        (&mut sae.b_dec, &g.b_dec, false),
    ];
    match &mut sae.latents {
        Reference::JumpRelu { threshold, .. } => arrays.push((threshold, &g.threshold, true)),
        Reference::Gated { r_mag, b_mag } => {
            arrays.extend([(r_mag, &g.r_mag, true), (b_mag, &g.b_mag, true)]);
        }
        _ => {}
    }
    arrays.extend(sae.w_skip.as_mut().map(|skip| (skip, &g.w_skip, false)));
    arrays
}

impl Textbook {
    /// From the parameters that a trainer starts from.
    #[must_use]
    pub fn new(params: &Params) -> Self {
        let t = &params.tensors;
        let latents = match params.latents {
            Latents::Relu => Reference::Relu,
            Latents::JumpRelu { parametrisation, bandwidth } => Reference::JumpRelu {
                threshold: wide(&t.own[0]),
                parametrisation,
                bandwidth: f64::from(bandwidth),
            },
            Latents::Gated => Reference::Gated { r_mag: wide(&t.own[0]), b_mag: wide(&t.own[1]) },
            Latents::TopK { k } => Reference::TopK { k },
            Latents::BatchTopK { k, .. } => Reference::BatchTopK { k },
        };
        let sae = TrainSae {
            d_in: D,
            d_out: params.d_out,
            w_enc: wide(&t.w_enc),
            b_enc: wide(&t.b_enc),
            w_dec: wide(&t.w_dec),
            b_dec: wide(&t.b_dec),
            latents,
            pre_bias: params.pre_bias,
            w_skip: (!t.w_skip.is_empty()).then(|| wide(&t.w_skip)),
        };
        Self { sae, moments: Vec::new(), step: 0, encoder_bias: params.encoder_bias }
    }

    /// Takes a step; returns the loss before it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn step(&mut self, x: Rows<'_>, y: Rows<'_>, settings: &Settings<'_>) -> Result<f64> {
        self.step += 1;
        let (losses, mut g) = self.sae.backward(x, y, settings.objective)?;
        if !self.encoder_bias {
            g.b_enc.fill(0.0);
        }
        let (d_out, unit) = (self.sae.d_out, settings.objective.sparsity.unit_directions());
        if unit {
            let directions = self.sae.w_dec.chunks_exact(d_out);
            g.w_dec.chunks_exact_mut(d_out).zip(directions).for_each(|(g, d)| remove_parallel(g, d));
        }
        let Betas { first, second, eps } = settings.betas;
        let corrections = [first, second].map(|beta| 1.0 - beta.powi(self.step));
        for (k, (values, g, own)) in arrays(&mut self.sae, &g).into_iter().enumerate() {
            if self.moments.len() <= k {
                self.moments.push([vec![0.0; g.len()], vec![0.0; g.len()]]);
            }
            let lr = if own { settings.own_lr } else { settings.lr };
            let [m, v] = &mut self.moments[k];
            for (((p, m), v), g) in values.iter_mut().zip(m).zip(v).zip(g) {
                *m = first * *m + (1.0 - first) * g;
                *v = second * *v + (1.0 - second) * g * g;
                *p -= lr * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + eps);
            }
        }
        if unit {
            self.sae.w_dec.chunks_exact_mut(d_out).for_each(normalise);
        }
        Ok(losses.total())
    }

    /// The smallest distance of a decision from being another one: of a pre-activation from a threshold or the edge of a
    /// window, or of the last chosen from the first that is not. Where it is tiny, f32 may rightly decide otherwise, and the
    /// comparison would mean nothing.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn margin(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> Result<f64> {
        let pass = self.sae.forward(x, y, objective)?;
        let gap = |z: &[f64], k: usize| {
            let mut sorted: Vec<f64> = z.iter().copied().filter(|z| *z > 0.0).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            if k == 0 || sorted.len() <= k { f64::INFINITY } else { sorted[k - 1] - sorted[k] }
        };
        let rows = |k: usize| pass.z.chunks_exact(N_LATENTS).map(|z| gap(z, k)).fold(f64::INFINITY, f64::min);
        let mut margin = pass.z.iter().map(|z| z.abs()).fold(f64::INFINITY, f64::min);
        margin = margin.min(match &self.sae.latents {
            Reference::TopK { k } => rows(*k),
            Reference::BatchTopK { k } => gap(&pass.z, k * N_ROWS),
            Reference::JumpRelu { bandwidth, .. } => {
                let layer = |k: usize| objective.examples.layer(k / N_LATENTS);
                let theta = |k: usize| self.sae.theta(k % N_LATENTS, layer(k));
                let distances = pass.z.iter().enumerate().map(|(k, z)| (z - theta(k)).abs());
                distances.map(|d| d.min((d - bandwidth / 2.0).abs())).fold(f64::INFINITY, f64::min)
            }
            _ => f64::INFINITY,
        });
        if let Some(multi) = &objective.multi {
            margin = margin.min(rows(multi.k));
        }
        if let Some(aux) = &objective.aux_k {
            for z in pass.z.chunks_exact(N_LATENTS) {
                let dead: Vec<f64> =
                    z.iter().zip(&aux.dead).filter(|(_, dead)| **dead).map(|(z, _)| *z).collect();
                margin = margin.min(gap(&dead, aux.k));
            }
        }
        Ok(margin)
    }
}

/// ‖got − want‖ over how far `want` moved from `from`.
///
/// # Errors
/// If sizes differ, or nothing moved.
pub fn drift(got: &[f32], want: &[f64], from: &[f32]) -> Result<f64> {
    ensure!(got.len() == want.len() && got.len() == from.len() && !got.is_empty(), "sizes differ");
    let error: f64 = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum();
    let moved: f64 = from.iter().zip(want).map(|(&f, w)| (f64::from(f) - w).powi(2)).sum();
    ensure!(moved > 0.0 && error.is_finite(), "moved by {moved}, error {error}");
    Ok((error / moved).sqrt())
}
