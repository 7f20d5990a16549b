//! The backward pass: from the terms of the loss to the gradient of every parameter.

use super::forward::Path;
use super::{Latents, Losses, Objective, Pass, TrainSae, add_scaled, dot, to_f64};
use crate::error::ShapeError;
use crate::jumprelu::{in_window, step};
use crate::rows::Rows;

/// Gradients of the objective, shaped as the parameters of [`TrainSae`]; empty where a variant has no such parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[n, d_in]`.
    pub w_enc: Vec<f64>,
    /// `[n]`.
    pub b_enc: Vec<f64>,
    /// `[n, d_out]`, before the part along each direction is removed.
    pub w_dec: Vec<f64>,
    /// `[d_out]`.
    pub b_dec: Vec<f64>,
    /// `[n]` or `[n, L]`, of the threshold parameters (pseudo-gradient).
    pub threshold: Vec<f64>,
    /// `[n]`.
    pub r_mag: Vec<f64>,
    /// `[n]`.
    pub b_mag: Vec<f64>,
    /// `[d_out, d_in]`.
    pub w_skip: Vec<f64>,
}

impl Gradients {
    fn zero(sae: &TrainSae) -> Self {
        let n = sae.n_latents();
        let (jump, gated) =
            (matches!(sae.latents, Latents::JumpRelu { .. }), matches!(sae.latents, Latents::Gated { .. }));
        let scalars = |wanted: bool| vec![0.0; if wanted { n } else { 0 }];
        Self {
            w_enc: vec![0.0; sae.w_enc.len()],
            b_enc: vec![0.0; n],
            w_dec: vec![0.0; sae.w_dec.len()],
            b_dec: vec![0.0; sae.b_dec.len()],
            threshold: vec![0.0; if jump { n * sae.n_layers() } else { 0 }],
            r_mag: scalars(gated),
            b_mag: scalars(gated),
            w_skip: vec![0.0; sae.w_skip.as_ref().map_or(0, Vec::len)],
        }
    }
}

/// What a latent's value of one row gives back.
struct Back {
    /// Gradient of the dot product `w_i · x'`.
    product: f64,
    /// Gradient of `b_enc`.
    bias: f64,
}

impl TrainSae {
    /// Forward and backward pass over rows `x [N, d_in]` with targets `y [N, d_out]`.
    ///
    /// # Errors
    /// If shapes disagree or there are no rows.
    pub fn backward(
        &self,
        x: Rows<'_>,
        y: Rows<'_>,
        objective: &Objective,
    ) -> Result<(Losses, Gradients), ShapeError> {
        let pass = self.forward(x, y, objective)?;
        let mut gradients = Gradients::zero(self);
        // Gradients of latents, and of pre-activations reached past the latent function.
        let (through, direct) = self.decoder_gradients(&pass, x, &mut gradients);
        let n = self.n_latents();
        for (row_index, row) in x.iter().enumerate() {
            let input = self.encoder_input(row);
            for i in 0..n {
                let at = row_index * n + i;
                let (g_f, g_direct) = (through[at], direct[at]);
                let back = self.latent_gradient(&pass, objective, (at, i), (g_f, g_direct), &mut gradients);
                add_scaled(&mut gradients.w_enc[i * self.d_in..(i + 1) * self.d_in], back.product, &input);
                gradients.b_enc[i] += back.bias;
                if self.pre_bias {
                    add_scaled(&mut gradients.b_dec, -back.product, self.encoder(i));
                }
            }
        }
        Ok((pass.losses, gradients))
    }

    /// Back through decoding: directions, `b_dec` and the skip connection get their gradients; returned are those of latents
    /// `[N, n]` and, for terms that pass them by, of pre-activations `[N, n]`.
    fn decoder_gradients(&self, pass: &Pass, x: Rows<'_>, gradients: &mut Gradients) -> (Vec<f64>, Vec<f64>) {
        let (n, d, n_rows) = (self.n_latents(), self.d_out, to_f64(x.n_rows()));
        let (mut through, mut direct) = (vec![0.0; pass.f.len()], vec![0.0; pass.f.len()]);
        for term in &pass.terms {
            for (row_index, residual) in term.residual.chunks_exact(d).enumerate() {
                // G_X̂ = (2/N) w R
                let g_out: Vec<f64> =
                    residual.iter().map(|r| 2.0 * term.weight_of(row_index) / n_rows * r).collect();
                let trains_decoder = term.path != Path::Frozen;
                if term.affine && trains_decoder {
                    add_scaled(&mut gradients.b_dec, 1.0, &g_out);
                    for (row, g) in gradients.w_skip.chunks_exact_mut(self.d_in).zip(&g_out) {
                        row.iter_mut().zip(x.row(row_index)).for_each(|(w, &x)| *w += g * f64::from(x));
                    }
                }
                for i in 0..n {
                    let (at, g_value) = (row_index * n + i, dot(&g_out, self.direction(i)));
                    if trains_decoder {
                        add_scaled(&mut gradients.w_dec[i * d..(i + 1) * d], term.values[at], &g_out);
                    }
                    match term.path {
                        // Inactive latents too: a threshold near them learns from it.
                        Path::Latents if i < term.n_latents => through[at] += g_value,
                        Path::Direct | Path::Frozen if term.values[at] > 0.0 => direct[at] += g_value,
                        _ => {}
                    }
                }
            }
        }
        for (row_index, g_out) in pass.beside.chunks_exact(d).enumerate() {
            add_scaled(&mut gradients.b_dec, 1.0, g_out);
            for i in 0..n {
                let at = row_index * n + i;
                add_scaled(&mut gradients.w_dec[i * d..(i + 1) * d], pass.f[at], g_out);
                through[at] += dot(g_out, self.direction(i));
            }
        }
        (through, direct)
    }

    /// Back through the latent function: from the gradient of latent `i` at `at = row·n + i` to those of its pre-activation and
    /// own parameters.
    fn latent_gradient(
        &self,
        pass: &Pass,
        objective: &Objective,
        (at, i): (usize, usize),
        (g_f, g_direct): (f64, f64),
        gradients: &mut Gradients,
    ) -> Back {
        let n_rows = to_f64(pass.f.len() / self.n_latents());
        let (z, f) = (pass.z[at], pass.f[at]);
        let penalised = self.penalised_value(z, f);
        let g_penalty = if penalised > 0.0 {
            self.penalty_gradient(objective, penalised, i, n_rows, gradients)
        } else {
            0.0
        };
        let same = |g: f64| Back { product: g, bias: g };
        match &self.latents {
            Latents::Relu | Latents::TopK { .. } | Latents::BatchTopK { .. } => {
                same(g_direct + if f > 0.0 { g_f + g_penalty } else { 0.0 })
            }
            Latents::JumpRelu { parametrisation, bandwidth, .. } => {
                let layer = objective.examples.layer(at / self.n_latents());
                let theta = self.theta(i, layer);
                let pulled = objective.dead_pull.as_ref().filter(|pull| pull.dead[i] && z < theta);
                let pull = pulled.map_or(0.0, |pull| pull.weight / n_rows);
                let mut g_theta = pull;
                if in_window(z, theta, *bandwidth) {
                    let lambda = pass.levels.lambda(&objective.sparsity, layer);
                    g_theta -= (theta * g_f + lambda / n_rows) / bandwidth;
                }
                gradients.threshold[self.threshold_at(i, layer)] +=
                    parametrisation.derivative(theta) * g_theta;
                same(g_direct - pull + (g_f + g_penalty) * step(z, theta))
            }
            Latents::Gated { r_mag, .. } => {
                let paths = self.paths(z, i);
                let g_magnitude = if paths.is_active() { g_f } else { 0.0 };
                gradients.r_mag[i] += g_magnitude * paths.scaled;
                gradients.b_mag[i] += g_magnitude;
                let g_gate = g_direct + g_penalty;
                Back { product: g_gate + g_magnitude * r_mag[i].exp(), bias: g_gate }
            }
        }
    }

    /// Gradient of the norm penalty in the value it counts; where directions have any length, they get theirs.
    fn penalty_gradient(
        &self,
        objective: &Objective,
        value: f64,
        i: usize,
        n_rows: f64,
        gradients: &mut Gradients,
    ) -> f64 {
        let (sparsity, norm, d) = (objective.sparsity, self.norm(i), self.d_out);
        if !sparsity.unit_directions() && norm > 0.0 {
            // d‖d_i‖/dd_i = d_i/‖d_i‖, and the term is linear in ‖d_i‖.
            let factor = sparsity.of_value(value, norm) / (norm * norm) / n_rows;
            add_scaled(&mut gradients.w_dec[i * d..(i + 1) * d], factor, self.direction(i));
        }
        sparsity.value_derivative(value, norm) / n_rows
    }
}
