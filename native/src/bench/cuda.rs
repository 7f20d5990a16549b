//! Training steps on a device, beside what it can do at best.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;
use shared::Rows;
use shared::config::train::{Products, Route};
use shared::loss::{Objective, Parametrisation, Sparsity};

use crate::cuda::{CudaOptions, CudaTrainer, Device, Factors, Rates, Resident, Work, route};
use crate::train::{Betas, Latents, Moments, Params, Settings, Tensors};

/// Draws that say where a threshold lies.
const DRAWS: usize = 1 << 20;
/// Width of the window, as a share of the threshold.
const WINDOW: f32 = 0.05;
/// So small that L0 stays where it is from step to step.
const LR: f64 = 1e-7;
/// Columns of the product whose speed is the best there is.
const COLUMNS: usize = 8192;

type Shared = Arc<dyn Device + Send + Sync>;

/// A device to be timed.
#[derive(Debug)]
pub struct CudaBench {
    device: Shared,
    products: Products,
}

/// What a device can do at best.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CudaPeaks {
    /// Its name.
    pub device: String,
    /// Bytes read and written a second by a copy.
    pub bandwidth: f64,
    /// Floating-point operations a second of one large product.
    pub flops: f64,
}

/// How a step of one width went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CudaStep {
    /// Rows of a batch.
    pub n_rows: usize,
    /// Latents.
    pub n_latents: usize,
    /// Mean active latents of a row.
    pub l0: f64,
    /// Seconds of the median step, upload of the batch included.
    pub seconds: f64,
    /// Of its forward pass.
    pub forward_seconds: f64,
    /// Seconds of the encoder product at the best speed.
    pub product_floor: f64,
    /// Seconds of the bytes that must move at the best bandwidth.
    pub bytes_floor: f64,
    /// Bytes of memory in use.
    pub memory: u64,
}

impl CudaStep {
    /// The head of a table of steps.
    pub const HEAD: &str =
        "  latents     L0   step ms  forward ms  floor ms (product + bytes) step/floor  vectors/s  memory GB";
}

impl fmt::Display for CudaStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let floor = self.product_floor + self.bytes_floor;
        write!(
            f,
            "{:>9} {:>6.1} {:>9.2} {:>11.2} {:>9.2} ({:>6.2} + {:>5.2}) {:>11.2} {:>10.0} {:>10.2}",
            self.n_latents,
            self.l0,
            1e3 * self.seconds,
            1e3 * self.forward_seconds,
            1e3 * floor,
            1e3 * self.product_floor,
            1e3 * self.bytes_floor,
            self.seconds / floor,
            self.n_rows as f64 / self.seconds,
            self.memory as f64 / 1e9
        )
    }
}

/// A step on either route.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CudaRoutes {
    /// Latents.
    pub n_latents: usize,
    /// Mean active latents of a row.
    pub l0: f64,
    /// Seconds of the median step of the sparse route.
    pub sparse_seconds: f64,
    /// Of the dense route.
    pub dense_seconds: f64,
    /// Latents kept of a row from which the dense one is estimated to be sooner.
    pub crossover: f64,
    /// What is taken without being asked for.
    pub auto: Route,
}

impl CudaRoutes {
    /// The head of a table of routes.
    pub const HEAD: &str = "  latents     L0  sparse ms   dense ms  dense/sparse  crossover    auto";
}

impl fmt::Display for CudaRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>9} {:>6.1} {:>10.2} {:>10.2} {:>13.2} {:>10.0} {:>7}",
            self.n_latents,
            self.l0,
            1e3 * self.sparse_seconds,
            1e3 * self.dense_seconds,
            self.dense_seconds / self.sparse_seconds,
            self.crossover,
            if self.auto == Route::Dense { "dense" } else { "sparse" }
        )
    }
}

impl CudaBench {
    /// Times `device`, whose products are computed as `products` says.
    #[must_use]
    pub fn new(device: Shared, products: Products) -> Self {
        Self { device, products }
    }

    /// The speed of copies of `floats` values, and of a product of `n_rows` rows of width `d`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn peaks(&self, d: usize, n_rows: usize, floats: usize) -> Result<CudaPeaks> {
        let factors = match self.products {
            Products::F32 => Factors::F32,
            Products::Tf32 => Factors::Tf32,
            Products::Bf16 | Products::Bf16x3 => Factors::Bf16,
        };
        let Rates { bandwidth, flops } = Rates::measure(&self.device, factors, [n_rows, COLUMNS, d], floats)?;
        Ok(CudaPeaks { device: self.device.name(), bandwidth, flops })
    }

    /// The median of `steps` steps of a JumpReLU autoencoder on made-up vectors.
    ///
    /// # Errors
    /// If a size is zero, `l0` is not below `n`, or the device fails or is too small.
    pub fn step(
        &self,
        peaks: &CudaPeaks,
        d: usize,
        n: usize,
        n_rows: usize,
        l0: usize,
        steps: usize,
    ) -> Result<CudaStep> {
        let before = self.device.memory()?.0;
        let timed = self.timed([d, n, n_rows, l0, steps], self.products.into())?;
        let memory = before.saturating_sub(timed.free);
        let moved = 32 * timed.touched * d + 4 * n_rows * 4 * d;
        Ok(CudaStep {
            n_rows,
            n_latents: n,
            l0: timed.l0,
            seconds: timed.seconds,
            forward_seconds: timed.forward_seconds,
            product_floor: 2.0 * (n_rows * n * d) as f64 / peaks.flops,
            bytes_floor: moved as f64 / peaks.bandwidth,
            memory,
        })
    }

    /// The median step on either route, as [`CudaBench::step`] takes them, and which of them `route = "auto"` takes with these rates.
    ///
    /// # Errors
    /// As [`CudaBench::step`].
    pub fn routes(&self, rates: &Rates, [d, n, n_rows, l0, steps]: [usize; 5]) -> Result<CudaRoutes> {
        let of = |dense_from: f64| {
            let options = CudaOptions { dense_from, ..self.products.into() };
            self.timed([d, n, n_rows, l0, steps], options)
        };
        let (sparse, dense) = (of(f64::INFINITY)?, of(0.0)?);
        ensure!(dense.dense && !sparse.dense, "there was no room for the dense route");
        let crossover = Work { n_rows, n_latents: n, widths: [d, d] }.crossover(rates);
        Ok(CudaRoutes {
            n_latents: n,
            l0: sparse.l0,
            sparse_seconds: sparse.seconds,
            dense_seconds: dense.seconds,
            crossover,
            auto: if sparse.kept >= crossover { Route::Dense } else { Route::Sparse },
        })
    }

    /// The two rates by which `route = "auto"` decides about steps of this size.
    ///
    /// # Errors
    /// If the device fails.
    pub fn rates(&self, d: usize, n: usize, n_rows: usize) -> Result<Rates> {
        let work = Work { n_rows, n_latents: n, widths: [d, d] };
        Rates::remembered(&self.device, route::factors(self.products), &work, None)
    }

    fn timed(&self, [d, n, n_rows, l0, steps]: [usize; 5], options: CudaOptions) -> Result<Timed> {
        ensure!(d > 0 && n_rows > 0 && steps > 0 && (1..n).contains(&l0), "nothing to time");
        let params = made_up(d, n, l0);
        let moments = Moments::new(&params, false);
        let mut trainer = CudaTrainer::new(Arc::clone(&self.device), &params, &moments, 0, options)?;
        drop((params, moments));
        let mut batch = vec![0.0f32; n_rows * d];
        fill(&mut batch, d, 1);
        let rows = Rows::new(&batch, d)?;
        let objective = Objective::plain(Sparsity::L0 { lambda: 1.0 });
        let betas = Betas { first: 0.0, second: 0.999, eps: 1e-8 };
        let settings = Settings { lr: LR, own_lr: LR, betas, objective: &objective };
        let mut seconds: Vec<[f64; 2]> = Vec::new();
        let mut timed = Timed::default();
        for step in 0..steps + 2 {
            let started = Instant::now();
            let forward = trainer.forward(&Resident::of(&self.device, rows, rows)?, &objective)?;
            let after_forward = started.elapsed().as_secs_f64();
            trainer.update(&forward, &settings)?;
            self.device.wait()?;
            if step >= 2 {
                seconds.push([started.elapsed().as_secs_f64(), after_forward]);
            }
            timed.l0 = forward.losses.l0;
            timed.kept = forward.n_kept as f64 / n_rows as f64;
            (timed.touched, timed.dense) = (forward.fired.len(), forward.dense);
        }
        seconds.sort_by(|a, b| a[0].total_cmp(&b[0]));
        [timed.seconds, timed.forward_seconds] = seconds[seconds.len() / 2];
        timed.free = self.device.memory()?.0;
        Ok(timed)
    }
}

/// How the steps of one trainer went.
#[derive(Default)]
struct Timed {
    seconds: f64,
    forward_seconds: f64,
    l0: f64,
    /// Pairs kept of a row.
    kept: f64,
    touched: usize,
    dense: bool,
    /// Bytes free with the trainer in memory.
    free: u64,
}

/// Unit directions that serve as encoder and decoder, and one threshold for all latents so that about `l0` of them are active on
/// vectors of length about 1.
fn made_up(d: usize, n: usize, l0: usize) -> Params {
    let mut tensors = Tensors::zeros(n, d, d, false);
    fill(&mut tensors.w_dec, d, 2);
    tensors.w_dec.par_chunks_exact_mut(d).for_each(|row| {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    });
    tensors.w_enc.clone_from(&tensors.w_dec);
    let mut draws = vec![0.0f32; DRAWS];
    fill(&mut draws, d, 3);
    // Products of a unit direction with such vectors are spread as the values of the vectors are.
    let at = (DRAWS as f64 * l0 as f64 / n as f64) as usize;
    let (_, theta, _) = draws.select_nth_unstable_by(at.min(DRAWS - 1), |a, b| b.total_cmp(a));
    tensors.own[0].fill(*theta);
    let bandwidth = WINDOW * *theta;
    let latents = Latents::JumpRelu { parametrisation: Parametrisation::Raw, bandwidth };
    Params { d_in: d, d_out: d, tensors, latents, pre_bias: false, encoder_bias: true }
}

/// Normal values of variance 1/d, the same for the same seed.
fn fill(values: &mut [f32], d: usize, seed: u64) {
    let scale = 2f32.sqrt() / (d as f32).sqrt();
    values.par_chunks_mut(4096).enumerate().for_each(|(piece, values)| {
        let mut state = (seed << 40) ^ (piece as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for value in values {
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u32 << 24) as f32
            };
            *value = scale * (0..6).map(|_| uniform() - 0.5).sum::<f32>();
        }
    });
}
