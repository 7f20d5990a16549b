//! One training step on a device: what `crate::train::step` does on the processor, with the same parameters, moments and result but
//! for the order of sums.
//!
//! The encoder product is computed for some latents at a time and thinned out at once; everything after it touches what was kept.
//! With the same batch and device the result has the same bits: sums have a fixed order.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use shared::config::train::Products;
use shared::loss::{Levels, Losses};

use super::batch::Resident;
use super::device::{Argument, Buffer, Device};
use super::geometry;
use super::kernels::{Kernel, Shape};
use super::step::{MAX_LAYERS, Step};
use crate::train::{Moments, Params, Tensors};
use buffers::{Arrays, Fixed, TOTALS, Workspace};

mod buffers;
mod dense;
mod describe;
mod forward;
mod multiply;
mod update;

pub use dense::has_dense_route;

/// Rows of a part of the sum over rows.
const ROWS_OF_PART: usize = 32;
/// A share of the last batch's smallest chosen value above which BatchTopK looks for its largest values first.
const SEARCH_FROM: f32 = 0.9;
/// Weight of the newest batch in the running threshold of BatchTopK.
const NEWEST: f32 = 0.01;

type Shared = Arc<dyn Device + Send + Sync>;

/// How a device takes a step, where there is a choice: what the step means does not depend on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CudaOptions {
    /// How matrices are multiplied.
    pub products: Products,
    /// Whether all sums have a fixed order. Otherwise a latent's rows come as atomics found them.
    pub deterministic: bool,
    /// Pairs kept of a row from which a step takes the dense route, where its objective allows that; see [`super::route`].
    pub dense_from: f64,
    /// Bytes of pre-activations at a time.
    pub bytes_at_once: usize,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            products: Products::default(),
            deterministic: true,
            dense_from: f64::INFINITY,
            bytes_at_once: geometry::PRODUCTS,
        }
    }
}

impl From<Products> for CudaOptions {
    fn from(products: Products) -> Self {
        Self { products, ..Self::default() }
    }
}

/// What a forward pass found; the rest of it is on the device until the next one.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaForward {
    /// The losses of the batch.
    pub losses: Losses,
    /// Active (row, latent) pairs.
    pub n_active: usize,
    /// Pairs that were kept: also those within the window of a threshold, and of auxiliary terms.
    pub n_kept: usize,
    /// Whether the step takes the dense route.
    pub dense: bool,
    /// The latents that fired, ascending.
    pub fired: Vec<u32>,
    /// `mean_n Σ_i v_i^p` for the two powers asked for.
    pub mean_powers: [f64; 2],
    /// Mean L0, of each layer where the objective asks for that.
    levels: Levels,
    /// Variance of what the dictionary leaves.
    left_variance: f64,
    /// The smallest value that BatchTopK chose.
    smallest: Option<f32>,
    /// The step before which it was taken.
    step: u64,
}

/// Parameters and moments on a device, and the number of steps taken.
#[derive(Debug)]
pub struct CudaTrainer {
    device: Shared,
    shape: Shape,
    /// Widths, the latent function and the pre-bias; the numbers are on the device.
    about: Params,
    skip: bool,
    params: Arrays,
    first: Option<Arrays>,
    second: Arrays,
    weights_step: Buffer,
    own_step: Buffer,
    fixed: Fixed,
    workspace: Option<Workspace>,
    /// What the last forward pass read.
    batch: Option<Arc<Resident>>,
    capacity: usize,
    options: CudaOptions,
    /// The smallest value that BatchTopK chose of the last batch learned from; 0 where there is none.
    smallest: f32,
    /// What the kernels of the last forward pass were told.
    told: Step,
    /// Steps taken.
    pub step: u64,
    /// The powers that the next forward pass takes means of.
    pub powers: [f64; 2],
}

impl CudaTrainer {
    /// Goes on after `step` steps with these parameters and moments.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn new(
        device: Shared,
        params: &Params,
        moments: &Moments,
        step: u64,
        options: impl Into<CudaOptions>,
    ) -> Result<Self> {
        let (n, d_in, d_out) = (params.n_latents(), params.d_in, params.d_out);
        let n_layers = params.n_layers();
        ensure!(n > 0 && n < 1 << 31, "a dictionary of {n} latents");
        ensure!(
            n_layers <= MAX_LAYERS,
            "thresholds of {n_layers} layers; at most {MAX_LAYERS} are supported"
        );
        let shape = Shape::new(d_in, d_out);
        let n_parts = n.div_ceil(geometry::latents_of_block(n));
        let floats = |n: usize| Buffer::zeros::<f32>(&device, n);
        let fixed = Fixed {
            thetas: floats(n * n_layers)?,
            cuts: floats(n * n_layers)?,
            layer_rows: floats(MAX_LAYERS)?,
            lambda_per_row: floats(MAX_LAYERS)?,
            offsets: Buffer::zeros::<u32>(&device, n + 1)?,
            cursors: Buffer::zeros::<u32>(&device, n)?,
            found: Buffer::zeros::<u8>(&device, TOTALS + n)?,
            dead: Buffer::zeros::<u8>(&device, n)?,
            pull_dead: Buffer::zeros::<u8>(&device, n)?,
            lengths: floats(n)?,
            terms: Buffer::zeros::<f64>(&device, n)?,
            partial_through: floats(if params.pre_bias { n_parts * d_in } else { 0 })?,
            input_sum: floats(d_in)?,
            column_sums: Buffer::zeros::<f64>(&device, d_out)?,
            overflow: Buffer::zeros::<u32>(&device, 1)?,
            histogram: Buffer::zeros::<u32>(&device, 256)?,
            stretch_ends: Buffer::zeros::<u32>(&device, 64)?,
            stretch_weights: floats(64)?,
            g_skip: floats(params.tensors.w_skip.len())?,
        };
        Ok(Self {
            params: Arrays::of(&device, &params.tensors)?,
            first: moments.first.as_ref().map(|first| Arrays::of(&device, first)).transpose()?,
            second: Arrays::of(&device, &moments.second)?,
            weights_step: Buffer::of(&device, &narrow(&moments.weights_step))?,
            own_step: Buffer::of(&device, &narrow(&moments.own_step))?,
            capacity: geometry::first_capacity(n),
            workspace: None,
            batch: None,
            told: Step::default(),
            powers: [1.0, 1.0],
            skip: !params.tensors.w_skip.is_empty(),
            device,
            shape,
            about: about(params),
            fixed,
            options: options.into(),
            smallest: 0.0,
            step,
        })
    }

    /// Parameters and moments as they stand.
    ///
    /// # Errors
    /// If the device fails.
    pub fn download(&self) -> Result<(Params, Moments)> {
        let (n, d_in, d_out) = (self.about.n_latents(), self.about.d_in, self.about.d_out);
        let zeros = || Tensors::zeros(n, d_in, d_out, self.has_skip()).with_thresholds(self.about.n_layers());
        let mut params = Params { tensors: zeros(), ..self.about.clone() };
        self.params.read_into(&mut params.tensors)?;
        let mut moments = Moments::new(&params, self.first.is_some());
        self.second.read_into(&mut moments.second)?;
        if let (Some(first), Some(into)) = (&self.first, &mut moments.first) {
            first.read_into(into)?;
        }
        let steps = |buffer: &Buffer| -> Result<Vec<u64>> {
            Ok(buffer.read::<u32>(n)?.into_iter().map(u64::from).collect())
        };
        (moments.weights_step, moments.own_step) = (steps(&self.weights_step)?, steps(&self.own_step)?);
        Ok((params, moments))
    }

    /// Goes on from other parameters and moments of the same shapes, in the same memory.
    ///
    /// # Errors
    /// If shapes differ, or the device fails.
    pub fn upload(&mut self, params: &Params, moments: &Moments, step: u64) -> Result<()> {
        let shape = |params: &Params| (params.n_latents(), params.n_layers(), params.d_in, params.d_out);
        let same = shape(params) == shape(&self.about) && moments.first.is_some() == self.first.is_some();
        ensure!(same, "parameters of another shape than those that are trained");
        self.params.write(&params.tensors)?;
        self.second.write(&moments.second)?;
        if let (Some(first), Some(values)) = (&self.first, &moments.first) {
            first.write(values)?;
        }
        self.weights_step.write(&narrow(&moments.weights_step))?;
        self.own_step.write(&narrow(&moments.own_step))?;
        self.about = about(params);
        (self.batch, self.told, self.smallest, self.step) = (None, Step::default(), 0.0, step);
        Ok(())
    }

    /// What the encoder read of the rows of the last forward pass `[N, d_in]`, and the residuals of the whole dictionary `[N, d_out]`,
    /// `x̂ − y`.
    ///
    /// # Errors
    /// If there was no pass, or the device fails.
    pub fn rest(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let pass = self.workspace.as_ref().zip(self.batch.as_ref());
        let (work, batch) = pass.context("there was no forward pass")?;
        let (d_in, d_out) = (self.about.d_in, self.about.d_out);
        let inputs = if self.about.pre_bias { work.input.read(work.n_rows * d_in)? } else { batch.rows()? };
        let channels = work.channels.read::<f32>(work.n_rows * work.n_channels * d_out)?;
        let whole = usize::try_from(self.told.whole)? * d_out;
        let rows = channels.chunks_exact(work.n_channels * d_out);
        let residuals = rows.flat_map(|row| &row[whole..whole + d_out]).copied().collect();
        Ok((inputs, residuals))
    }

    /// The device it is on.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device + Send + Sync> {
        &self.device
    }

    fn has_skip(&self) -> bool {
        self.skip
    }

    /// Launches a kernel that is told everything, and `more`.
    fn launch(&self, kernel: Kernel, blocks: usize, more: &[Argument<'_>]) -> Result<()> {
        let told = [Argument::Bytes(bytemuck::bytes_of(&self.told))];
        self.device.launch(kernel, self.shape, blocks, &[&told, more].concat())
    }
}

/// What is said of a dictionary besides its numbers; lengths say how many latents and layers there are.
fn about(params: &Params) -> Params {
    let (n, n_layers) = (params.n_latents(), params.n_layers());
    let own = [vec![0.0; n * n_layers], Vec::new()];
    let tensors = Tensors { b_enc: vec![0.0; n], own, ..Tensors::zeros(0, 0, 0, false) };
    let Params { d_in, d_out, latents, pre_bias, encoder_bias, .. } = *params;
    Params { d_in, d_out, tensors, latents, pre_bias, encoder_bias }
}

/// Numbers of steps as the kernels have them.
fn narrow(steps: &[u64]) -> Vec<u32> {
    steps.iter().map(|&step| u32::try_from(step).unwrap_or(u32::MAX)).collect()
}
