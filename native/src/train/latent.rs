//! The backward half of a step for one latent: from its entries to its gradients, and on to its new parameters.

use shared::loss::{Objective, Parametrisation};

use super::adam::{Adam, Betas};
use super::forward::Forward;
use super::params::{Latents, Piece};
use super::simd::{add_scaled, dot};

/// Why a (row, latent) pair is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Part {
    /// The latent function: active, or inside the straight-through window.
    #[default]
    Main,
    /// Only multi-TopK reaches it.
    Multi,
    /// AuxK chose it.
    Aux,
}

/// A row in which a latent is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Entry {
    pub(super) row: u32,
    /// Pre-activation.
    pub(super) z: f32,
    pub(super) part: Part,
}

/// The arrays of one latent.
pub(super) struct Slices<'a> {
    encoder: &'a mut [f32],
    direction: &'a mut [f32],
    bias: &'a mut [f32],
    own: [&'a mut [f32]; 2],
}

impl Piece<'_> {
    pub(super) fn latent(&mut self, i: usize, d_in: usize, d_out: usize) -> Slices<'_> {
        let n_layers = self.own[0].len() / self.b_enc.len();
        let [first, second] = &mut self.own;
        Slices {
            encoder: &mut self.w_enc[i * d_in..(i + 1) * d_in],
            direction: &mut self.w_dec[i * d_out..(i + 1) * d_out],
            bias: &mut self.b_enc[i..=i],
            own: [&mut first[i * n_layers..(i + 1) * n_layers], &mut second[i..=i]],
        }
    }
}

/// One latent: parameters, moments, and the steps that last changed them.
pub(super) struct Latent<'a> {
    pub(super) number: usize,
    pub(super) params: Slices<'a>,
    pub(super) first: Option<Slices<'a>>,
    pub(super) second: Slices<'a>,
    pub(super) weights_step: &'a mut u64,
    pub(super) own_step: &'a mut u64,
}

/// Gradients of one latent at a time, and a piece's share of the gradient of `b_dec`.
pub(super) struct Scratch {
    g_encoder: Vec<f32>,
    g_direction: Vec<f32>,
    /// Of the first of the latent function's own parameters, layer by layer.
    g_own: Vec<f32>,
    pub(super) through_encoder: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(d_in: usize, d_out: usize, n_layers: usize) -> Self {
        Self {
            g_encoder: vec![0.0; d_in],
            g_direction: vec![0.0; d_out],
            g_own: vec![0.0; n_layers],
            through_encoder: vec![0.0; d_in],
        }
    }
}

/// Gradients of a latent's numbers.
#[derive(Debug, Default)]
struct Scalars {
    /// Of the product `w·x'`, summed over rows: what reaches `b_dec` through the pre-bias.
    product: f32,
    bias: f32,
    /// Of the second of the latent function's own parameters.
    own: f32,
    /// Whether weights, and whether own parameters, received anything.
    touched: bool,
    own_touched: bool,
}

/// What all latents share in a step.
pub(super) struct Batch<'a> {
    pub(super) forward: &'a Forward,
    pub(super) d_in: usize,
    pub(super) latents: Latents,
    /// Whether the encoder bias is trained.
    pub(super) trains_bias: bool,
    pub(super) objective: &'a Objective,
    pub(super) step: u64,
    pub(super) lr: f64,
    pub(super) own_lr: f64,
    pub(super) betas: Betas,
    pub(super) bandwidth: f32,
    pub(super) n_rows: f32,
    /// 2/(N ν), the factor of a residual in the gradient of the reconstruction error.
    pub(super) scale: f32,
    /// Channel and factor of multi-TopK, of the gate's own reconstruction, of AuxK.
    pub(super) multi: Option<(usize, f32)>,
    pub(super) gate: Option<(usize, f32)>,
    pub(super) aux: Option<(usize, f32)>,
    /// Whether AuxK decodes with `b_dec`.
    pub(super) aux_has_bias: bool,
    /// λ/N, of the effective λ on the L0 of each layer.
    pub(super) lambda_per_row: Vec<f32>,
    /// Σ_n x'_n, for the dead-latent loss.
    pub(super) input_sum: Vec<f32>,
}

impl Batch<'_> {
    /// Finds the gradients of `latent` and applies them.
    #[inline(always)]
    pub(super) fn update(&self, latent: &mut Latent<'_>, entries: &[Entry], scratch: &mut Scratch) {
        let pulled = self.objective.dead_pull.as_ref().filter(|pull| pull.dead[latent.number]);
        if entries.is_empty() && pulled.is_none() && latent.first.is_none() {
            return;
        }
        scratch.g_encoder.fill(0.0);
        scratch.g_direction.fill(0.0);
        scratch.g_own.fill(0.0);
        let mut g = Scalars::default();
        for entry in entries {
            match entry.part {
                Part::Main => self.main(latent, entry, scratch, &mut g),
                Part::Multi => {}
                Part::Aux => self.straight(latent, entry, self.aux, scratch, &mut g),
            }
            if entry.part != Part::Aux {
                self.straight(latent, entry, self.multi, scratch, &mut g);
            }
        }
        if let Some(pull) = pulled {
            #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
            self.pull(latent, pull.weight as f32, entries, scratch, &mut g);
        }
        self.apply(latent, scratch, &g);
    }

    /// What an entry of the latent function gives back, by the rule of each.
    #[inline(always)]
    fn main(&self, latent: &Latent<'_>, entry: &Entry, scratch: &mut Scratch, g: &mut Scalars) {
        let p = &latent.params;
        let residual =
            self.forward.channels.row(entry.row as usize, self.forward.channels.of_latent(latent.number));
        let g_f = self.scale * dot(residual, p.direction);
        match self.latents {
            Latents::Relu | Latents::TopK { .. } | Latents::BatchTopK { .. } => {
                let penalty = self.penalty(latent, entry.z, scratch);
                add_scaled(&mut scratch.g_direction, entry.z * self.scale, residual);
                self.encoder(entry, (g_f + penalty, g_f + penalty), scratch, g);
            }
            Latents::JumpRelu { .. } => {
                let layer = self.forward.layer(entry.row as usize);
                let theta = self.forward.theta(latent.number, entry.row as usize);
                if entry.z > theta {
                    let penalty = self.penalty(latent, entry.z, scratch);
                    add_scaled(&mut scratch.g_direction, entry.z * self.scale, residual);
                    self.encoder(entry, (g_f + penalty, g_f + penalty), scratch, g);
                }
                if (entry.z - theta).abs() < self.bandwidth / 2.0 {
                    scratch.g_own[layer] -= (theta * g_f + self.lambda_per_row[layer]) / self.bandwidth;
                    g.own_touched = true;
                }
            }
            Latents::Gated => {
                let scaled = p.own[0][0].exp() * (entry.z - p.bias[0]);
                let magnitude = scaled + p.own[1][0];
                let mut g_product = 0.0;
                if magnitude > 0.0 {
                    add_scaled(&mut scratch.g_direction, magnitude * self.scale, residual);
                    scratch.g_own[0] += g_f * scaled;
                    g.own += g_f;
                    g_product = g_f * p.own[0][0].exp();
                    g.own_touched = true;
                }
                let penalty = self.penalty(latent, entry.z, scratch);
                // The decoder is held fixed in the gate's own reconstruction.
                let g_gate = self.gate.map_or(0.0, |(channel, scale)| {
                    scale * dot(self.forward.channels.row(entry.row as usize, channel), p.direction)
                });
                self.encoder(entry, (g_product + g_gate + penalty, g_gate + penalty), scratch, g);
            }
        }
    }

    /// A term whose values are pre-activations: multi-TopK, AuxK.
    #[inline(always)]
    fn straight(
        &self,
        latent: &Latent<'_>,
        entry: &Entry,
        term: Option<(usize, f32)>,
        scratch: &mut Scratch,
        g: &mut Scalars,
    ) {
        let Some((channel, scale)) = term else { return };
        let residual = self.forward.channels.row(entry.row as usize, channel);
        let g_z = scale * dot(residual, latent.params.direction);
        add_scaled(&mut scratch.g_direction, entry.z * scale, residual);
        self.encoder(entry, (g_z, g_z), scratch, g);
    }

    /// The gradient of the product `w·x'` and of the bias reach the encoder.
    #[inline(always)]
    fn encoder(&self, entry: &Entry, (product, bias): (f32, f32), scratch: &mut Scratch, g: &mut Scalars) {
        let start = entry.row as usize * self.d_in;
        add_scaled(&mut scratch.g_encoder, product, &self.forward.input[start..start + self.d_in]);
        g.product += product;
        g.bias += bias;
        g.touched = true;
    }

    /// Gradient of the norm penalty in the value it counts; a direction of any length gets its own.
    #[inline(always)]
    fn penalty(&self, latent: &Latent<'_>, value: f32, scratch: &mut Scratch) -> f32 {
        let sparsity = &self.objective.sparsity;
        if !matches!(sparsity, shared::loss::Sparsity::Norm { .. }) {
            return 0.0;
        }
        let direction = &*latent.params.direction;
        let norm = if sparsity.unit_directions() { 1.0 } else { f64::from(dot(direction, direction)).sqrt() };
        let value = f64::from(value);
        #[expect(clippy::cast_possible_truncation, reason = "the step is computed in f32")]
        let narrow = |v: f64| v as f32;
        if !sparsity.unit_directions() && norm > 0.0 {
            let factor = sparsity.of_value(value, norm) / (norm * norm);
            add_scaled(&mut scratch.g_direction, narrow(factor) / self.n_rows, direction);
        }
        narrow(sparsity.value_derivative(value, norm)) / self.n_rows
    }

    /// The dead-latent loss: every row below the threshold pulls equally, so the sum over all rows, less the few above.
    #[inline(always)]
    fn pull(
        &self,
        latent: &Latent<'_>,
        weight: f32,
        entries: &[Entry],
        scratch: &mut Scratch,
        g: &mut Scalars,
    ) {
        let per_row = weight / self.n_rows;
        add_scaled(&mut scratch.g_encoder, -per_row, &self.input_sum);
        g.product -= weight;
        g.bias -= weight;
        for (g_own, rows) in scratch.g_own.iter_mut().zip(&self.forward.layer_rows) {
            *g_own += per_row * rows;
        }
        let above = |e: &&Entry| e.z >= self.forward.theta(latent.number, e.row as usize);
        for entry in entries.iter().filter(|e| e.part == Part::Main).filter(above) {
            self.encoder(entry, (per_row, per_row), scratch, g);
            scratch.g_own[self.forward.layer(entry.row as usize)] -= per_row;
        }
        (g.touched, g.own_touched) = (true, true);
    }

    /// Projection, Adam, renormalisation.
    #[inline(always)]
    fn apply(&self, latent: &mut Latent<'_>, scratch: &mut Scratch, g: &Scalars) {
        let (p, second) = (&mut latent.params, &mut latent.second);
        let momentum = latent.first.is_some();
        let mut none = [&mut [][..], &mut [], &mut [], &mut [], &mut []];
        let first = match &mut latent.first {
            Some(Slices { encoder, direction, bias, own: [a, b] }) => {
                [&mut **encoder, &mut **direction, &mut **bias, &mut **a, &mut **b]
            }
            None => none.each_mut().map(|s| &mut **s),
        };
        let [m_encoder, m_direction, m_bias, m_own, m_own_2] = first;
        if g.own_touched || momentum {
            if let Latents::JumpRelu { parametrisation: Parametrisation::Log, .. } = self.latents {
                let thetas = &self.forward.thetas[latent.number * self.forward.n_layers..];
                scratch.g_own.iter_mut().zip(thetas).for_each(|(g, theta)| *g *= theta);
            }
            let adam = Adam::new(self.betas, self.own_lr, self.step, *latent.own_step);
            adam.update(p.own[0], m_own, second.own[0], &scratch.g_own);
            if self.latents == Latents::Gated {
                adam.update(p.own[1], m_own_2, second.own[1], &[g.own]);
            }
            *latent.own_step = self.step;
        }
        if g.touched || momentum {
            add_scaled(&mut scratch.through_encoder, g.product, p.encoder);
            let unit = self.objective.sparsity.unit_directions();
            if unit {
                let along = dot(&scratch.g_direction, p.direction);
                add_scaled(&mut scratch.g_direction, -along, p.direction);
            }
            let adam = Adam::new(self.betas, self.lr, self.step, *latent.weights_step);
            adam.update(p.direction, m_direction, second.direction, &scratch.g_direction);
            adam.update(p.encoder, m_encoder, second.encoder, &scratch.g_encoder);
            if self.trains_bias {
                adam.update(p.bias, m_bias, second.bias, &[g.bias]);
            }
            if unit {
                normalise(p.direction);
            }
            *latent.weights_step = self.step;
        }
    }
}

#[inline(always)]
fn normalise(direction: &mut [f32]) {
    let norm = dot(direction, direction).sqrt();
    if norm > 0.0 {
        direction.iter_mut().for_each(|v| *v /= norm);
    }
}
