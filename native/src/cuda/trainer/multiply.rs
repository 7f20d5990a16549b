//! Matrix products of a step, in the precision that is asked for.

use anyhow::Result;
use shared::config::train::Products;

use super::super::device::{Argument, Buffer, Factors, MatrixAt, Product};
use super::super::geometry;
use super::super::kernels::Kernel;
use super::super::route;
use super::super::step::Address;
use super::CudaTrainer;
use super::buffers::Workspace;

impl CudaTrainer {
    /// What products of f32 arrays are: those of the skip connection, and the encoder's where it is not split.
    pub(super) fn factors(&self) -> Factors {
        route::factors(self.options.products)
    }

    /// How many latents' pre-activations of `n_rows` rows are computed at a time.
    pub(super) fn at_once(&self, n_rows: usize) -> usize {
        geometry::latents_at_once(n_rows, self.about.n_latents(), self.options.bytes_at_once)
    }

    /// How many halves of its factors the encoder product needs.
    fn n_halves(&self) -> usize {
        match self.options.products {
            Products::F32 | Products::Tf32 => 0,
            Products::Bf16 => 1,
            Products::Bf16x3 => 2,
        }
    }

    /// Room for halves of inputs and encoder rows; none where they are not split.
    pub(super) fn halves(&self, n_rows: usize) -> Result<[[Buffer; 2]; 2]> {
        let at_once = self.at_once(n_rows);
        let room = |rows: usize, half: usize| {
            let n = if half < self.n_halves() { rows * self.about.d_in } else { 0 };
            Buffer::new::<u16>(&self.device, n)
        };
        Ok([[room(n_rows, 0)?, room(n_rows, 1)?], [room(at_once, 0)?, room(at_once, 1)?]])
    }

    /// Splits what the encoder reads, where that is needed.
    pub(super) fn split_inputs(&self, work: &Workspace) -> Result<()> {
        self.split(self.told.input, &work.halves[0], work.n_rows)
    }

    fn split(&self, from: Address, halves: &[Buffer; 2], rows: usize) -> Result<()> {
        if self.n_halves() == 0 {
            return Ok(());
        }
        let n = rows * self.about.d_in;
        let low = if self.n_halves() > 1 { halves[1].at() } else { 0 };
        let [from, high, low] = [from, halves[0].at(), low].map(Argument::Address);
        let arguments = [from, high, low, Argument::U64(n as u64)];
        self.device.launch(Kernel::Split, self.shape, self.shape.blocks(n), &arguments)
    }

    /// Pre-activations, less the bias, of latents `first .. first + width`: `[n_rows, width]` in rows of `leading` values.
    pub(super) fn encoder_product(
        &self,
        work: &Workspace,
        first: usize,
        width: usize,
        leading: usize,
    ) -> Result<()> {
        let d_in = self.about.d_in;
        let weights = self.params.w_enc.at() + 4 * (first * d_in) as u64;
        let multiply = |a: Address, b: Address, factors: Factors, adds: bool| {
            self.device.product(&Product {
                m: work.n_rows,
                n: width,
                k: d_in,
                a: MatrixAt { at: a, leading: d_in, transposed: false },
                b: MatrixAt { at: b, leading: d_in, transposed: true },
                c: MatrixAt { at: work.products.at(), leading, transposed: false },
                factors,
                adds,
            })
        };
        if self.n_halves() == 0 {
            return multiply(self.told.input, weights, self.factors(), false);
        }
        let [inputs, encoder] = &work.halves;
        self.split(weights, encoder, width)?;
        multiply(inputs[0].at(), encoder[0].at(), Factors::Bf16, false)?;
        if self.n_halves() > 1 {
            // The product of both low halves is below the last bit of the others.
            multiply(inputs[0].at(), encoder[1].at(), Factors::Bf16, true)?;
            multiply(inputs[1].at(), encoder[0].at(), Factors::Bf16, true)?;
        }
        Ok(())
    }
}
