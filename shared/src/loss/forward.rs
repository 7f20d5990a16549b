//! The forward pass: latents, the terms they are decoded into, the loss.

use super::gated::Paths;
use super::topk::{largest, largest_of_rows};
use super::{AuxForm, AuxK, Examples, Latents, Levels, Losses, Objective, TrainSae, add_scaled, dot, to_f64};
use crate::error::ShapeError;
use crate::jumprelu::jumprelu;
use crate::rows::Rows;

/// How the gradient of a term's values goes back to pre-activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Through the latent function.
    Latents,
    /// Straight: the values are pre-activations.
    Direct,
    /// As [`Path::Direct`], with the decoder held fixed (arXiv 2404.16014 eq. 8).
    Frozen,
}

/// A part of the loss that decodes values: `weight · mean ‖decoded − target‖²`.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    /// What is decoded, `[N, n]`.
    pub values: Vec<f64>,
    /// Decoded minus target, `[N, d_out]`.
    pub residual: Vec<f64>,
    /// Weight of the mean squared residual.
    pub weight: f64,
    /// Weight of each row in that mean `[N]`; empty for 1.
    pub rows: Vec<f64>,
    /// The latents that are decoded are the first so many.
    pub(super) n_latents: usize,
    /// Whether decoding adds `b_dec` and the skip connection, and trains them.
    pub(super) affine: bool,
    pub(super) path: Path,
}

impl Term {
    /// `mean ‖residual‖²` over `n_rows` rows, by their weights.
    #[must_use]
    pub fn mse(&self, n_rows: usize) -> f64 {
        if self.rows.is_empty() {
            return dot(&self.residual, &self.residual) / to_f64(n_rows);
        }
        let rows = self.residual.chunks_exact((self.residual.len() / n_rows.max(1)).max(1));
        rows.zip(&self.rows).map(|(row, weight)| weight * dot(row, row)).sum::<f64>() / to_f64(n_rows)
    }

    /// The weight of the squared residual of row `row`.
    #[must_use]
    pub fn weight_of(&self, row: usize) -> f64 {
        self.weight * self.rows.get(row).copied().unwrap_or(1.0)
    }
}

/// Everything the forward pass computes, kept for the backward pass and for tests.
#[derive(Debug, Clone, PartialEq)]
pub struct Pass {
    /// Pre-activations `[N, n]`; with a gate, those of the gate.
    pub z: Vec<f64>,
    /// Latent activations `[N, n]`.
    pub f: Vec<f64>,
    /// Error of the whole dictionary `x̂ − y`, `[N, d_out]`.
    pub residual: Vec<f64>,
    /// The decoding terms of the loss.
    pub terms: Vec<Term>,
    /// What terms that are no sum of squares have as their gradient in the reconstruction, `[N, d_out]`; empty without one.
    pub beside: Vec<f64>,
    /// Mean L0.
    pub levels: Levels,
    /// The loss.
    pub losses: Losses,
}

impl TrainSae {
    /// Forward pass over rows `x [N, d_in]` with targets `y [N, d_out]`.
    ///
    /// # Errors
    /// If shapes disagree or there are no rows.
    pub fn forward(&self, x: Rows<'_>, y: Rows<'_>, objective: &Objective) -> Result<Pass, ShapeError> {
        self.check(x, y, objective)?;
        let n = self.n_latents();
        let mut z = Vec::with_capacity(x.n_rows() * n);
        for row in x {
            let input = self.encoder_input(row);
            z.extend((0..n).map(|i| dot(self.encoder(i), &input) + self.b_enc[i]));
        }
        let f = self.activate(&z, x.n_rows(), &objective.examples);
        let nu = objective.normaliser;
        let weights = &objective.examples.weights;
        let whole = self.affine_term(&f, x, y, 1.0 / nu, weights);
        let residual = whole.residual.clone();
        let mut terms = Vec::new();
        for prefix in &objective.prefixes {
            let cut = |(i, &f): (usize, &f64)| if i % n < prefix.n_latents { f } else { 0.0 };
            let values: Vec<f64> = f.iter().enumerate().map(cut).collect();
            let term = self.affine_term(&values, x, y, prefix.weight / nu, weights);
            terms.push(Term { n_latents: prefix.n_latents, ..term });
        }
        if terms.is_empty() {
            terms.push(whole);
        }
        if let Some(multi) = &objective.multi {
            let chosen = largest_of_rows(&z, n, multi.k, |_| true);
            let term = self.affine_term(&select(&z, &chosen), x, y, multi.weight / nu, weights);
            terms.push(Term { path: Path::Direct, ..term });
        }
        let n_reconstructions = terms.len();
        if let Latents::Gated { .. } = self.latents {
            let values: Vec<f64> = z.iter().map(|z| z.max(0.0)).collect();
            let term = self.affine_term(&values, x, y, 1.0 / nu, weights);
            terms.push(Term { path: Path::Frozen, ..term });
        }
        let (aux, beside) = self.aux_term(&z, &residual, objective).unzip();
        terms.extend(aux);
        let error = |terms: &[Term]| terms.iter().map(|t| t.weight * t.mse(x.n_rows())).sum::<f64>();
        let (reconstruction, decoded) =
            (error(&terms[..n_reconstructions]), error(&terms[n_reconstructions..]));
        let (rows, l0) = (to_f64(x.n_rows()), to_f64(f.iter().filter(|f| **f > 0.0).count()));
        let levels = objective.levels(f.chunks_exact(n).map(|f| f.iter().filter(|f| **f > 0.0).count()));
        let losses = Losses {
            mse: dot(&residual, &residual) / rows,
            reconstruction,
            sparsity: levels.term(&objective.sparsity) + self.norm_penalty(&z, &f, objective) / rows,
            auxiliary: decoded + self.dead_pull(&z, objective) / rows,
            l0: l0 / rows,
        };
        Ok(Pass { z, f, residual, terms, beside: beside.unwrap_or_default(), levels, losses })
    }

    fn activate(&self, z: &[f64], n_rows: usize, examples: &Examples) -> Vec<f64> {
        let n = self.n_latents();
        match &self.latents {
            Latents::Relu => z.iter().map(|z| z.max(0.0)).collect(),
            Latents::JumpRelu { .. } => z
                .iter()
                .enumerate()
                .map(|(i, &z)| jumprelu(z, self.theta(i % n, examples.layer(i / n))))
                .collect(),
            Latents::Gated { .. } => {
                z.iter().enumerate().map(|(i, &z)| self.paths(z, i % n).value()).collect()
            }
            Latents::TopK { k } => select(z, &largest_of_rows(z, n, *k, |_| true)),
            Latents::BatchTopK { k } => select(z, &largest(z, k * n_rows, |_| true)),
        }
    }

    /// θ of one latent of a JumpReLU at a layer; 0 for every other latent function.
    #[must_use]
    pub fn theta(&self, latent: usize, layer: usize) -> f64 {
        match &self.latents {
            Latents::JumpRelu { threshold, parametrisation, .. } => {
                parametrisation.threshold(threshold[self.threshold_at(latent, layer)])
            }
            _ => 0.0,
        }
    }

    /// Both paths of a gated latent; a latent function without gate has its pre-activation on both.
    pub(super) fn paths(&self, z: f64, latent: usize) -> Paths {
        match &self.latents {
            Latents::Gated { r_mag, b_mag } => {
                Paths::new(z, self.b_enc[latent], r_mag[latent], b_mag[latent])
            }
            _ => Paths::new(z, 0.0, 0.0, 0.0),
        }
    }

    /// The term of `values` decoded with bias and skip connection, against `y`.
    fn affine_term(&self, values: &[f64], x: Rows<'_>, y: Rows<'_>, weight: f64, rows: &[f64]) -> Term {
        let n = self.n_latents();
        let mut residual = Vec::with_capacity(y.data().len());
        for ((values, x), y) in values.chunks_exact(n).zip(x).zip(y) {
            let mut error: Vec<f64> = y.iter().zip(&self.b_dec).map(|(&y, &b)| b - f64::from(y)).collect();
            for (i, &value) in values.iter().enumerate() {
                add_scaled(&mut error, value, self.direction(i));
            }
            if let Some(skip) = &self.w_skip {
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                error.iter_mut().zip(skip.chunks_exact(self.d_in)).for_each(|(e, row)| *e += dot(row, &x));
            }
            residual.extend(error);
        }
        Term {
            values: values.to_vec(),
            residual,
            weight,
            rows: rows.to_vec(),
            n_latents: n,
            affine: true,
            path: Path::Latents,
        }
    }

    /// AuxK: the largest dead latents decoded against what the dictionary leaves, in the form asked for, with its gradient in the
    /// reconstruction. Its weight is divided by the variance of what is left; where nothing is left or no latent is dead, there
    /// is no term.
    fn aux_term(&self, z: &[f64], residual: &[f64], objective: &Objective) -> Option<(Term, Vec<f64>)> {
        let aux = objective.aux_k.as_ref()?;
        let (n, d) = (self.n_latents(), self.d_out);
        let chosen = largest_of_rows(z, n, aux.k, |i| aux.dead[i]);
        let values = select(z, &chosen);
        if aux.form == AuxForm::Mlsae {
            return self.mlsae_aux(values, residual, aux, &objective.examples);
        }
        let variance = variance(residual, d);
        if !aux.dead.contains(&true) || variance <= 0.0 {
            return None;
        }
        let mut left = Vec::with_capacity(residual.len());
        for (values, residual) in values.chunks_exact(n).zip(residual.chunks_exact(d)) {
            // The target is y − x̂ = −residual.
            let mut error = residual.to_vec();
            for (i, &value) in values.iter().enumerate() {
                add_scaled(&mut error, value, self.direction(i));
            }
            left.extend(error);
        }
        let weight = aux.weight / variance;
        let (rows, path) = (Vec::new(), Path::Direct);
        Some((Term { values, residual: left, weight, rows, n_latents: n, affine: false, path }, Vec::new()))
    }

    /// [`AuxForm::Mlsae`]: with `r = x̂ − y = −e` and `c = σ r + ê`, `A = Σ ‖c‖²` and `B = Σ σ² ‖r − r̄‖²`, the term is `w A / B`, and its
    /// gradient in x̂ `2w (σ c / B − A/B² σ² (r − r̄))`.
    fn mlsae_aux(
        &self,
        values: Vec<f64>,
        residual: &[f64],
        aux: &AuxK,
        examples: &Examples,
    ) -> Option<(Term, Vec<f64>)> {
        let (n, d) = (self.n_latents(), self.d_out);
        let (mut apart, mut centred) = (Vec::new(), Vec::new());
        for (row, (values, r)) in values.chunks_exact(n).zip(residual.chunks_exact(d)).enumerate() {
            let deviation = examples.deviation(row);
            let mut c = self.b_dec.clone();
            add_scaled(&mut c, deviation, r);
            for (i, &value) in values.iter().enumerate() {
                add_scaled(&mut c, value, self.direction(i));
            }
            let mean = r.iter().sum::<f64>() / to_f64(d);
            centred.extend(r.iter().map(|r| deviation * (r - mean)));
            apart.extend(c);
        }
        let (above, below) = (dot(&apart, &apart), dot(&centred, &centred));
        if !aux.dead.contains(&true) || below <= 0.0 {
            return None;
        }
        let gradient = |(at, (c, centred)): (usize, (&f64, &f64))| {
            let deviation = examples.deviation(at / d);
            2.0 * aux.weight * deviation * (c / below - above / (below * below) * centred)
        };
        let beside = apart.iter().zip(&centred).enumerate().map(gradient).collect();
        let weight = aux.weight / below * to_f64(apart.len() / d);
        let (rows, path) = (Vec::new(), Path::Direct);
        Some((Term { values, residual: apart, weight, rows, n_latents: n, affine: true, path }, beside))
    }

    /// Σ over rows and latents of the norm penalty.
    fn norm_penalty(&self, z: &[f64], f: &[f64], objective: &Objective) -> f64 {
        let n = self.n_latents();
        let penalised = |(i, (&z, &f)): (usize, (&f64, &f64))| {
            let value = self.penalised_value(z, f);
            if value > 0.0 { objective.sparsity.of_value(value, self.norm(i % n)) } else { 0.0 }
        };
        z.iter().zip(f).enumerate().map(penalised).sum()
    }

    /// The value a norm penalty counts.
    pub(super) fn penalised_value(&self, z: f64, f: f64) -> f64 {
        if matches!(self.latents, Latents::Gated { .. }) { z.max(0.0) } else { f }
    }

    pub(super) fn norm(&self, latent: usize) -> f64 {
        dot(self.direction(latent), self.direction(latent)).sqrt()
    }

    fn dead_pull(&self, z: &[f64], objective: &Objective) -> f64 {
        let Some(pull) = &objective.dead_pull else { return 0.0 };
        let n = self.n_latents();
        let pulled = |(i, &z): (usize, &f64)| {
            let theta = self.theta(i % n, objective.examples.layer(i / n));
            if pull.dead[i % n] { pull.weight * (theta - z).max(0.0) } else { 0.0 }
        };
        z.iter().enumerate().map(pulled).sum()
    }
}

/// Values where marked, zero elsewhere.
fn select(z: &[f64], chosen: &[bool]) -> Vec<f64> {
    z.iter().zip(chosen).map(|(&z, &chosen)| if chosen { z } else { 0.0 }).collect()
}

/// mean ‖row − mean row‖².
fn variance(rows: &[f64], width: usize) -> f64 {
    let n = to_f64(rows.len() / width);
    let mut mean = vec![0.0; width];
    rows.chunks_exact(width).for_each(|row| add_scaled(&mut mean, 1.0 / n, row));
    (dot(rows, rows) / n - dot(&mean, &mean)).max(0.0)
}
