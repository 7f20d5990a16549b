//! The loss of a forward pass, and those of its terms that are known only when all rows are.

use shared::loss::{AuxForm, AuxK, Losses, Objective, Sparsity};

use super::forward::{Errors, Forward};
use super::params::Params;
use super::simd::dot;

/// The loss, of the squared errors of the batch.
pub(super) fn losses(
    params: &Params,
    forward: &mut Forward,
    errors: Errors,
    objective: &Objective,
) -> Losses {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let (n, active) = (forward.n_rows as f64, forward.n_active() as f64);
    let (nu, l0) = (objective.normaliser, active / n);
    let multi = objective.multi.map_or(0.0, |multi| multi.weight * errors.multi);
    let mut auxiliary = errors.gate / n / nu + dead_pull(params, forward, objective);
    if let Some(aux) = &objective.aux_k {
        forward.left_variance = match aux.form {
            AuxForm::Gao => variance(forward, params.d_out),
            AuxForm::Mlsae => own_variance(forward, objective),
        };
        if forward.left_variance > 0.0 && aux.dead.contains(&true) {
            auxiliary += aux.weight * errors.aux / n / forward.left_variance;
            if aux.form == AuxForm::Mlsae {
                push_back(forward, aux, errors.aux / n, objective);
            }
        }
    }
    Losses {
        mse: errors.whole / n,
        reconstruction: (errors.prefixes + multi) / n / nu,
        sparsity: forward.levels.term(&objective.sparsity)
            + norm_penalty(params, forward, &objective.sparsity) / n,
        auxiliary,
        l0,
    }
}

/// mean σ² ‖r − r̄‖² of the whole dictionary's residuals, r̄ the mean of a row's own elements.
fn own_variance(forward: &Forward, objective: &Objective) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let n = forward.n_rows as f64;
    let of_row = |row: usize| {
        let residual = forward.residual(row);
        let mean = own_mean(residual);
        let squares: f64 = residual.iter().map(|&r| (f64::from(r) - mean).powi(2)).sum();
        objective.examples.deviation(row).powi(2) * squares
    };
    (0..forward.n_rows).map(of_row).sum::<f64>() / n
}

/// The mean of a row's elements.
fn own_mean(row: &[f32]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
    let d = row.len() as f64;
    row.iter().map(|&v| f64::from(v)).sum::<f64>() / d
}

/// What [`AuxForm::Mlsae`], whose error is not constant, has as its gradient in the reconstruction is added to what all latents
/// learn from: with the mean squares A of `c = σ r + ê` and B of what is left, `w (σ c / B − A/B² σ² (r − r̄))`, twice over N. The
/// residuals that latents learn from are multiplied by `2 / (N ν)` later.
fn push_back(forward: &mut Forward, aux: &AuxK, above: f64, objective: &Objective) {
    let Some(aux_channel) = forward.channels.aux else { return };
    let (below, weight) = (forward.left_variance, aux.weight * objective.normaliser);
    for row in 0..forward.n_rows {
        let deviation = objective.examples.deviation(row);
        let mean = own_mean(forward.residual(row));
        let terms = forward.channels.row(row, aux_channel).iter().zip(forward.residual(row));
        #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
        let pushed = terms.map(|(&c, &r)| {
            let (c, r) = (f64::from(c), f64::from(r));
            let back = deviation * c / below - above / (below * below) * deviation * deviation * (r - mean);
            (weight * back) as f32
        });
        let pushed: Vec<f32> = pushed.collect();
        forward.channels.add_to_all(row, &pushed);
    }
}

/// mean ‖r − mean r‖² of the whole dictionary's residuals.
fn variance(forward: &Forward, d: usize) -> f64 {
    let (mut mean, mut squares) = (vec![0.0f64; d], 0.0);
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let n = forward.n_rows as f64;
    for row in 0..forward.n_rows {
        for (mean, &r) in mean.iter_mut().zip(forward.residual(row)) {
            *mean += f64::from(r) / n;
            squares += f64::from(r) * f64::from(r) / n;
        }
    }
    (squares - mean.iter().map(|m| m * m).sum::<f64>()).max(0.0)
}

fn norm_penalty(params: &Params, forward: &Forward, sparsity: &Sparsity) -> f64 {
    if !matches!(sparsity, Sparsity::Norm { .. }) {
        return 0.0;
    }
    let terms = forward.candidates().map(|(row, at, candidate)| {
        let value = f64::from(forward.penalised(params, row, at, candidate));
        let norm = if sparsity.unit_directions() { 1.0 } else { norm(params, candidate.latent as usize) };
        if value > 0.0 { sparsity.of_value(value, norm) } else { 0.0 }
    });
    terms.sum()
}

/// ‖d_i‖.
pub(super) fn norm(params: &Params, latent: usize) -> f64 {
    let direction = &params.tensors.w_dec[latent * params.d_out..(latent + 1) * params.d_out];
    f64::from(dot(direction, direction)).sqrt()
}

/// `weight · mean_n Σ_dead max(θ − z, 0)`: the sum of all θ − z, less those of the few rows above the threshold.
fn dead_pull(params: &Params, forward: &Forward, objective: &Objective) -> f64 {
    let Some(pull) = &objective.dead_pull else { return 0.0 };
    let d = params.d_in;
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let n = forward.n_rows as f64;
    let total = input_sum(forward, d);
    let mut sum = 0.0;
    for (latent, _) in pull.dead.iter().enumerate().filter(|(_, dead)| **dead) {
        let bias = f64::from(params.tensors.b_enc[latent]);
        let product = dot(&params.tensors.w_enc[latent * d..(latent + 1) * d], &total);
        let thetas = forward.thetas[latent * forward.n_layers..].iter().zip(&forward.layer_rows);
        let thetas: f64 = thetas.map(|(&theta, &rows)| f64::from(theta) * f64::from(rows)).sum();
        sum += thetas - n * bias - f64::from(product);
    }
    for (row, _, candidate) in forward.candidates().filter(|(_, _, c)| pull.dead[c.latent as usize]) {
        sum += f64::from((candidate.z - forward.theta(candidate.latent as usize, row)).max(0.0));
    }
    pull.weight * sum / n
}

/// Σ_n x'_n.
pub(super) fn input_sum(forward: &Forward, d: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; d];
    for row in forward.input.chunks_exact(d) {
        sum.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
    }
    #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
    sum.into_iter().map(|sum| sum as f32).collect()
}
