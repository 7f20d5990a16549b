//! What the kernels are told in a forward pass, and which channel is whose.

use shared::loss::{AuxForm, Objective, Parametrisation, Sparsity};

use super::super::batch::Resident;
use super::super::device::Buffer;
use super::super::step::Step;
use super::buffers::{Arrays, TOTALS, Workspace};
use super::{CudaTrainer, ROWS_OF_PART, SEARCH_FROM};
use crate::train::{Latents, Params};

impl CudaTrainer {
    /// Everything a kernel is told in a forward pass.
    pub(super) fn describe(&self, work: &Workspace, batch: &Resident, objective: &Objective) -> Step {
        let (params, second, fixed) = (&self.params, &self.second, &self.fixed);
        let first = |of: fn(&Arrays) -> &Buffer| self.first.as_ref().map_or(0, |first| of(first).at());
        let layout = channels(&self.about, objective);
        let (norm, lambda, power, decoder_norm) = match objective.sparsity {
            Sparsity::Norm { lambda, p, decoder_norm } => (true, lambda, p, decoder_norm),
            _ => (false, 0.0, 1.0, false),
        };
        let (log_threshold, bandwidth) = match self.about.latents {
            Latents::JumpRelu { parametrisation, bandwidth } => {
                (parametrisation == Parametrisation::Log, bandwidth)
            }
            _ => (false, 0.0),
        };
        let (largest, cut) = match self.about.latents {
            Latents::TopK { k } => (objective.multi.map_or(k, |multi| multi.k.max(k)), 0.0),
            Latents::BatchTopK { .. } => (0, SEARCH_FROM * self.smallest),
            _ => (0, 0.0),
        };
        let present = |present: bool, buffer: &Buffer| if present { buffer.at() } else { 0 };
        Step {
            x: batch.x(),
            y: batch.y(),
            input: if self.about.pre_bias { work.input.at() } else { batch.x() },
            base: present(self.has_skip(), &work.base),
            w_enc: params.w_enc.at(),
            b_enc: params.b_enc.at(),
            w_dec: params.w_dec.at(),
            b_dec: params.b_dec.at(),
            own0: params.own[0].at(),
            own1: params.own[1].at(),
            v_w_enc: second.w_enc.at(),
            v_b_enc: second.b_enc.at(),
            v_w_dec: second.w_dec.at(),
            v_b_dec: second.b_dec.at(),
            v_own0: second.own[0].at(),
            v_own1: second.own[1].at(),
            m_w_enc: first(|first| &first.w_enc),
            m_b_enc: first(|first| &first.b_enc),
            m_w_dec: first(|first| &first.w_dec),
            m_b_dec: first(|first| &first.b_dec),
            m_own0: first(|first| &first.own[0]),
            m_own1: first(|first| &first.own[1]),
            weights_step: self.weights_step.at(),
            own_step: self.own_step.at(),
            thetas: fixed.thetas.at(),
            cuts: fixed.cuts.at(),
            products: work.products.at(),
            kept_latents: work.kept_latents.at(),
            kept_z: work.kept_z.at(),
            kept_counts: work.kept_counts.at(),
            dead_latents: work.dead_latents.at(),
            dead_z: work.dead_z.at(),
            dead_counts: work.dead_counts.at(),
            floors: work.floors.at(),
            overflow: fixed.overflow.at(),
            dead: present(objective.aux_k.is_some(), &fixed.dead),
            pull_dead: present(objective.dead_pull.is_some(), &fixed.pull_dead),
            stretch_ends: fixed.stretch_ends.at(),
            stretch_weights: fixed.stretch_weights.at(),
            channels: work.channels.at(),
            row_sums: work.row_sums.at(),
            fired: fixed.found.at() + TOTALS as u64,
            offsets: fixed.offsets.at(),
            cursors: fixed.cursors.at(),
            partial_bias: work.partial_bias.at(),
            partial_through: fixed.partial_through.at(),
            input_sum: fixed.input_sum.at(),
            totals: fixed.found.at(),
            layers: present(self.about.n_layers() > 1, &work.layers),
            row_weights: present(!objective.examples.weights.is_empty(), &work.row_weights),
            deviations: present(!objective.examples.deviations.is_empty(), &work.deviations),
            layer_rows: fixed.layer_rows.at(),
            lambda_per_row: fixed.lambda_per_row.at(),
            n_layers: self.about.n_layers() as u32,
            encoder_bias: u32::from(self.about.encoder_bias),
            aux_mlsae: u32::from(is_mlsae(objective)),
            n_rows: work.n_rows as u32,
            n_latents: self.about.n_latents() as u32,
            capacity: work.capacity as u32,
            dead_capacity: work.dead_capacity as u32,
            kind: match self.about.latents {
                Latents::Relu => 0,
                Latents::JumpRelu { .. } => 1,
                Latents::Gated => 2,
                Latents::TopK { .. } => 3,
                Latents::BatchTopK { .. } => 4,
            },
            pre_bias: u32::from(self.about.pre_bias),
            n_channels: layout.count as u32,
            n_stretches: objective.prefixes.len().max(1) as u32,
            multi: layout.multi,
            gate: layout.gate,
            aux: layout.aux,
            whole: layout.whole,
            largest: largest as u32,
            largest_dead: objective.aux_k.as_ref().map_or(0, |aux| aux.k as u32),
            log_threshold: u32::from(log_threshold),
            lambda: lambda as f32,
            power: power as f32,
            mean_power_a: self.powers[0] as f32,
            mean_power_b: self.powers[1] as f32,
            has_norm: u32::from(norm),
            decoder_norm: u32::from(decoder_norm),
            unit_directions: u32::from(objective.sparsity.unit_directions()),
            bandwidth,
            rows: work.n_rows as f32,
            cut,
            n_parts: work.n_rows.div_ceil(ROWS_OF_PART) as u32,
            pull_weight: objective.dead_pull.as_ref().map_or(0.0, |pull| pull.weight as f32),
            ..Step::default()
        }
    }
}

/// Which channel is whose: the layout of `crate::train`'s forward pass.
pub(super) struct Layout {
    pub(super) count: usize,
    pub(super) multi: i32,
    pub(super) gate: i32,
    pub(super) aux: i32,
    pub(super) whole: i32,
}

/// Whether AuxK is that of multi-layer SAEs.
pub(super) fn is_mlsae(objective: &Objective) -> bool {
    objective.aux_k.as_ref().is_some_and(|aux| aux.form == AuxForm::Mlsae)
}

pub(super) fn channels(about: &Params, objective: &Objective) -> Layout {
    let mut count = objective.prefixes.len().max(1);
    let mut next = |wanted: bool| {
        count += usize::from(wanted);
        if wanted { count as i32 - 1 } else { -1 }
    };
    let multi = next(objective.multi.is_some());
    let gate = next(about.latents == Latents::Gated);
    let aux = next(objective.aux_k.is_some());
    let apart =
        !objective.prefixes.is_empty() || !objective.examples.weights.is_empty() || is_mlsae(objective);
    let whole = next(apart).max(0);
    Layout { count, multi, gate, aux, whole }
}
