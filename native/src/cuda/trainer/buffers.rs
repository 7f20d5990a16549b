//! What a trainer keeps on the device.

use anyhow::Result;
use shared::loss::Objective;

use super::super::device::Buffer;
use super::super::geometry;
use super::super::step::ROW_SUMS;
use super::dense::Dense;
use super::describe::channels;
use super::{CudaTrainer, ROWS_OF_PART, Shared};
use crate::train::{Latents, Tensors};

/// Arrays shaped as the parameters, on the device.
#[derive(Debug)]
pub(super) struct Arrays {
    pub(super) w_enc: Buffer,
    pub(super) b_enc: Buffer,
    pub(super) w_dec: Buffer,
    pub(super) b_dec: Buffer,
    pub(super) own: [Buffer; 2],
    pub(super) w_skip: Buffer,
}

impl Arrays {
    pub(super) fn of(device: &Shared, tensors: &Tensors) -> Result<Self> {
        let of = |values: &[f32]| Buffer::of(device, values);
        Ok(Self {
            w_enc: of(&tensors.w_enc)?,
            b_enc: of(&tensors.b_enc)?,
            w_dec: of(&tensors.w_dec)?,
            b_dec: of(&tensors.b_dec)?,
            own: [of(&tensors.own[0])?, of(&tensors.own[1])?],
            w_skip: of(&tensors.w_skip)?,
        })
    }

    pub(super) fn write(&self, tensors: &Tensors) -> Result<()> {
        self.w_enc.write(&tensors.w_enc)?;
        self.b_enc.write(&tensors.b_enc)?;
        self.w_dec.write(&tensors.w_dec)?;
        self.b_dec.write(&tensors.b_dec)?;
        self.own[0].write(&tensors.own[0])?;
        self.own[1].write(&tensors.own[1])?;
        self.w_skip.write(&tensors.w_skip)
    }

    pub(super) fn read_into(&self, tensors: &mut Tensors) -> Result<()> {
        self.w_enc.read_into(&mut tensors.w_enc)?;
        self.b_enc.read_into(&mut tensors.b_enc)?;
        self.w_dec.read_into(&mut tensors.w_dec)?;
        self.b_dec.read_into(&mut tensors.b_dec)?;
        self.own[0].read_into(&mut tensors.own[0])?;
        self.own[1].read_into(&mut tensors.own[1])?;
        self.w_skip.read_into(&mut tensors.w_skip)
    }
}

/// Buffers that depend on the number of rows, of channels, and on how much is kept.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) n_rows: usize,
    pub(super) n_channels: usize,
    pub(super) capacity: usize,
    pub(super) dead_capacity: usize,
    pub(super) n_entries: usize,
    /// Latents of which pre-activations are computed at a time.
    pub(super) at_once: usize,
    pub(super) input: Buffer,
    pub(super) base: Buffer,
    pub(super) products: Buffer,
    /// Factors as bf16, high and low halves: of inputs, and of the encoder rows at hand.
    pub(super) halves: [[Buffer; 2]; 2],
    pub(super) kept_latents: Buffer,
    pub(super) kept_z: Buffer,
    pub(super) kept_counts: Buffer,
    pub(super) dead_latents: Buffer,
    pub(super) dead_z: Buffer,
    pub(super) dead_counts: Buffer,
    pub(super) floors: Buffer,
    pub(super) equal: Buffer,
    pub(super) channels: Buffer,
    pub(super) row_sums: Buffer,
    pub(super) layers: Buffer,
    pub(super) row_weights: Buffer,
    pub(super) deviations: Buffer,
    pub(super) partial_bias: Buffer,
    pub(super) residuals: Buffer,
    pub(super) keys: [Buffer; 2],
    pub(super) values: [Buffer; 2],
    /// What the dense route takes besides, where it may be taken.
    pub(super) dense: Option<Dense>,
}

/// Buffers that depend on the dictionary alone.
#[derive(Debug)]
pub(super) struct Fixed {
    pub(super) thetas: Buffer,
    pub(super) cuts: Buffer,
    pub(super) layer_rows: Buffer,
    pub(super) lambda_per_row: Buffer,
    pub(super) offsets: Buffer,
    pub(super) cursors: Buffer,
    /// What the host asks of every pass, in one piece: totals (f64), and which latents fired (a byte each).
    pub(super) found: Buffer,
    pub(super) dead: Buffer,
    pub(super) pull_dead: Buffer,
    pub(super) lengths: Buffer,
    pub(super) terms: Buffer,
    pub(super) partial_through: Buffer,
    pub(super) input_sum: Buffer,
    pub(super) column_sums: Buffer,
    pub(super) overflow: Buffer,
    pub(super) histogram: Buffer,
    pub(super) stretch_ends: Buffer,
    pub(super) stretch_weights: Buffer,
    pub(super) g_skip: Buffer,
}

/// Bytes of the totals.
pub(super) const TOTALS: usize = ROW_SUMS * size_of::<f64>();

impl CudaTrainer {
    /// Buffers for `n_rows` rows: those of the last step, where they fit.
    pub(super) fn workspace(&mut self, n_rows: usize, objective: &Objective) -> Result<Workspace> {
        let n_channels = channels(&self.about, objective).count;
        let threads = self.shape.threads;
        let capacity = match self.about.latents {
            Latents::TopK { k } => {
                let widest = objective.multi.map_or(k, |multi| multi.k.max(k));
                geometry::capacity_of_largest(widest, threads)
            }
            _ => self.capacity,
        };
        let dead_k = objective.aux_k.as_ref().map_or(0, |aux| aux.k);
        let dead_capacity = if dead_k > 0 { geometry::capacity_of_largest(dead_k, threads) } else { 0 };
        if let Some(work) = self.workspace.take() {
            let shape = (work.n_rows, work.n_channels, work.capacity, work.dead_capacity);
            if shape == (n_rows, n_channels, capacity, dead_capacity) {
                return Ok(work);
            }
        }
        let device = &self.device;
        let (d_in, d_out) = (self.about.d_in, self.about.d_out);
        let floats = |n: usize| Buffer::new::<f32>(device, n);
        let counts = |n: usize| Buffer::new::<u32>(device, n);
        let skip = if self.has_skip() { n_rows * d_out } else { 0 };
        Ok(Workspace {
            input: floats(if self.about.pre_bias { n_rows * d_in } else { 0 })?,
            base: floats(skip)?,
            products: floats(n_rows * self.at_once(n_rows))?,
            halves: self.halves(n_rows)?,
            kept_latents: counts(n_rows * capacity)?,
            kept_z: floats(n_rows * capacity)?,
            kept_counts: counts(n_rows)?,
            dead_latents: counts(n_rows * dead_capacity)?,
            dead_z: floats(n_rows * dead_capacity)?,
            dead_counts: counts(n_rows)?,
            floors: floats(2 * n_rows)?,
            equal: counts(2 * n_rows + 1)?,
            channels: floats(n_rows * n_channels * d_out)?,
            row_sums: Buffer::new::<f64>(device, n_rows * ROW_SUMS)?,
            layers: counts(n_rows)?,
            row_weights: floats(n_rows)?,
            deviations: floats(n_rows)?,
            partial_bias: floats(n_rows.div_ceil(ROWS_OF_PART) * d_out)?,
            residuals: floats(skip)?,
            keys: [counts(0)?, counts(0)?],
            values: [floats(0)?, floats(0)?],
            dense: self.dense(n_rows, objective)?,
            n_entries: 0,
            at_once: self.at_once(n_rows),
            n_rows,
            n_channels,
            capacity,
            dead_capacity,
        })
    }
}
