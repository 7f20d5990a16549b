//! The dense route of a step: for small dictionaries or many active latents, decoding and the gradients of both weights as matrix
//! products of some latents at a time. What is active, the straight-through terms and Adam are those of the sparse route; sums are in
//! another order, and of products in the precision that is asked for.

use anyhow::Result;
use shared::loss::Objective;

use super::super::device::{Argument, Buffer, MatrixAt, Product};
use super::super::geometry;
use super::super::kernels::Kernel;
use super::super::step::Address;
use super::buffers::Workspace;
use super::describe::channels;
use super::{CudaTrainer, Shared};
use crate::train::Params;

/// What the dense route keeps on the device besides: of some latents at a time.
#[derive(Debug)]
pub(super) struct Dense {
    /// Products of residuals and directions `[n_rows, at_once]`.
    g_features: Buffer,
    /// Gradients of directions `[at_once, d_out]` and of encoder rows `[at_once, d_in]`.
    g_dec: Buffer,
    g_enc: Buffer,
}

impl Dense {
    pub(super) fn new(
        device: &Shared,
        [d_in, d_out]: [usize; 2],
        n_rows: usize,
        at_once: usize,
    ) -> Result<Self> {
        let floats = |n: usize| Buffer::new::<f32>(device, n);
        Ok(Self {
            g_features: floats(n_rows * at_once)?,
            g_dec: floats(at_once * d_out)?,
            g_enc: floats(at_once * d_in)?,
        })
    }
}

/// Whether an objective has a dense route: all its terms must learn from one residual.
#[must_use]
pub fn has_dense_route(about: &Params, objective: &Objective) -> bool {
    channels(about, objective).count == 1
}

/// A matrix whose rows have as many values as lie from one to the next.
fn rows(at: Address, leading: usize) -> MatrixAt {
    MatrixAt { at, leading, transposed: false }
}

fn transposed(at: Address, leading: usize) -> MatrixAt {
    MatrixAt { at, leading, transposed: true }
}

impl CudaTrainer {
    /// Room for the dense route; none where it is never taken, does not have the objective, or has too little memory.
    pub(super) fn dense(&self, n_rows: usize, objective: &Objective) -> Result<Option<Dense>> {
        let n = self.about.n_latents();
        if self.options.dense_from > n as f64 || !has_dense_route(&self.about, objective) {
            return Ok(None);
        }
        let widths = [self.about.d_in, self.about.d_out];
        let needed = geometry::dense_bytes(n, widths, n_rows);
        let (free, _) = self.device.memory()?;
        if needed > free {
            tracing::info!(
                "steps take the sparse route: the dense one needs {needed} bytes more, {free} are free"
            );
            return Ok(None);
        }
        Dense::new(&self.device, widths, n_rows, self.at_once(n_rows)).map(Some)
    }

    /// Latents that one block of the dense route updates: no more blocks than there are parts of the sum over latents.
    pub(super) fn piece_of_dense(&self, at_once: usize) -> usize {
        let n = self.about.n_latents();
        let n_parts = n.div_ceil(geometry::latents_of_block(n));
        at_once.min(n).div_ceil(n_parts).max(1)
    }

    /// Calls `of(first, width)` for some latents at a time.
    fn each_stretch(&self, work: &Workspace, of: impl Fn(usize, usize) -> Result<()>) -> Result<()> {
        let n = self.about.n_latents();
        (0..n).step_by(work.at_once).try_for_each(|first| of(first, work.at_once.min(n - first)))
    }

    /// Activations of some latents, in the place of the encoder products.
    fn dense_activations(&self, work: &Workspace, first: usize, width: usize) -> Result<()> {
        let [first, width, leading] = [first, width, work.at_once].map(|n| Argument::U32(n as u32));
        let dense = Argument::Address(work.products.at());
        self.launch(Kernel::DenseActivations, work.n_rows, &[first, width, leading, dense])
    }

    fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        a: MatrixAt,
        b: MatrixAt,
        c: MatrixAt,
        adds: bool,
    ) -> Result<()> {
        self.device.product(&Product { m, n, k, a, b, c, factors: self.factors(), adds })
    }

    fn directions(&self, first: usize) -> Address {
        self.params.w_dec.at() + 4 * (first * self.about.d_out) as u64
    }

    /// Residuals of all rows, and their squared errors.
    pub(super) fn decode_dense(&self, work: &Workspace) -> Result<()> {
        let (n_rows, d_out) = (work.n_rows, self.about.d_out);
        self.launch(Kernel::DenseBase, n_rows, &[])?;
        self.each_stretch(work, |first, width| {
            self.dense_activations(work, first, width)?;
            let (z, directions) =
                (rows(work.products.at(), work.at_once), rows(self.directions(first), d_out));
            self.multiply([n_rows, d_out, width], z, directions, rows(work.channels.at(), d_out), true)
        })?;
        self.launch(Kernel::DenseErrors, n_rows, &[])
    }

    /// Gradients and Adam of every latent.
    pub(super) fn update_dense(&self, work: &Workspace, dense: &Dense) -> Result<()> {
        let (n_rows, d_in, d_out, leading) = (work.n_rows, self.about.d_in, self.about.d_out, work.at_once);
        let (products, residuals) = (work.products.at(), work.channels.at());
        let [features, g_dec, g_enc] = [&dense.g_features, &dense.g_dec, &dense.g_enc].map(Buffer::at);
        let piece = self.piece_of_dense(leading);
        self.each_stretch(work, |first, width| {
            self.dense_activations(work, first, width)?;
            let directions = transposed(self.directions(first), d_out);
            let residuals = rows(residuals, d_out);
            self.multiply([n_rows, width, d_out], residuals, directions, rows(features, leading), false)?;
            let z = transposed(products, leading);
            self.multiply([width, d_out, n_rows], z, residuals, rows(g_dec, d_out), false)?;
            let place = [first, width, leading].map(|n| Argument::U32(n as u32));
            let lengths = Argument::Address(self.fixed.lengths.at());
            let [of_z, of_features] = [products, features].map(Argument::Address);
            self.launch(Kernel::DenseSignals, n_rows, &[&place[..], &[of_z, of_features, lengths]].concat())?;
            let input = rows(self.told.input, d_in);
            self.multiply([width, d_in, n_rows], z, input, rows(g_enc, d_in), false)?;
            let gradients = [features, g_dec, g_enc].map(Argument::Address);
            let piece_argument = Argument::U32(piece as u32);
            let arguments = [&place[..], &[piece_argument], &gradients, &[lengths]].concat();
            self.launch(Kernel::UpdateFromProducts, width.div_ceil(piece), &arguments)
        })
    }
}
