//! Which route a step takes after its encoder product: latent by latent, or by matrix products.
//!
//! The sparse route reads residuals, inputs and directions once for every kept pair; the dense one multiplies four matrices whatever is
//! active. A model of both, with the two rates of a card that matter, says from how many kept pairs a row the dense one is sooner. The rates
//! are measured once on a card and then remembered, so that a run that is resumed, or repeated, decides alike.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use shared::config::train::{LatentFunction, Loss, Products, Route, TrainConfig};

use super::device::{Buffer, Device, Factors, MatrixAt, Product};
use super::geometry;
use super::trainer::CudaOptions;
use crate::{files, places};

/// How often a copy or a product is repeated.
const REPEATS: usize = 20;
/// Values copied, in units of what one product makes: more than fits a second-level cache.
const COPIED: usize = 8;

type Shared = Arc<dyn Device + Send + Sync>;

/// What a device can do at best.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes read and written a second by a copy.
    pub bandwidth: f64,
    /// Floating-point operations a second of one large product.
    pub flops: f64,
}

/// The size of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Rows of a batch.
    pub n_rows: usize,
    /// Latents.
    pub n_latents: usize,
    /// Widths of the vectors read and reconstructed.
    pub widths: [usize; 2],
}

impl Work {
    /// Seconds of the sparse route between the encoder product and Adam: a decoder row, a residual and an input read for each of `kept` pairs
    /// a row.
    #[must_use]
    pub fn sparse_seconds(&self, rates: &Rates, kept: f64) -> f64 {
        self.n_rows as f64 * kept * self.bytes_of_pair() / rates.bandwidth
    }

    /// Seconds of the dense route in its place: four products of rows, latents and widths; activations written twice and read three times,
    /// products of residuals and directions written and read; for some latents at a time the residuals read three times and
    /// written once, the inputs read once; directions read twice; gradients of both weights written and read.
    #[must_use]
    pub fn dense_seconds(&self, rates: &Rates) -> f64 {
        let (rows, latents) = (self.n_rows as f64, self.n_latents as f64);
        let [d_in, d_out] = self.widths.map(|d| d as f64);
        let at_once = geometry::latents_at_once(self.n_rows, self.n_latents, geometry::PRODUCTS) as f64;
        let flops = 2.0 * rows * latents * (3.0 * d_out + d_in);
        let stretches = (latents / at_once).ceil();
        let bytes = 4.0
            * (7.0 * rows * latents
                + stretches * rows * (4.0 * d_out + d_in)
                + 2.0 * latents * d_out
                + 2.0 * latents * (d_in + d_out));
        flops / rates.flops + bytes / rates.bandwidth
    }

    fn bytes_of_pair(&self) -> f64 {
        let [d_in, d_out] = self.widths.map(|d| d as f64);
        4.0 * (2.0 * d_out + d_in)
    }

    /// Kept pairs of a row from which the dense route is sooner.
    #[must_use]
    pub fn crossover(&self, rates: &Rates) -> f64 {
        self.dense_seconds(rates) * rates.bandwidth / (self.n_rows as f64 * self.bytes_of_pair())
    }
}

impl Rates {
    /// Measures a device by copies of `floats` values, and by a product of `n_rows` rows of width `d` with `columns` others.
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure(
        device: &Shared,
        factors: Factors,
        [n_rows, columns, d]: [usize; 3],
        floats: usize,
    ) -> Result<Self> {
        let buffer = |n: usize| Buffer::zeros::<f32>(device, n);
        let (from, to) = (buffer(floats)?, buffer(floats)?);
        let copy = time(device, || device.copy(to.at(), from.at(), 4 * floats))?;
        drop((from, to));
        let (a, b, c) = (buffer(n_rows * d)?, buffer(columns * d)?, buffer(n_rows * columns)?);
        let at = |buffer: &Buffer, leading, transposed| MatrixAt { at: buffer.at(), leading, transposed };
        let product = Product {
            m: n_rows,
            n: columns,
            k: d,
            a: at(&a, d, false),
            b: at(&b, d, true),
            c: at(&c, columns, false),
            factors,
            adds: false,
        };
        let multiply = time(device, || device.product(&product))?;
        Ok(Self {
            bandwidth: 8.0 * floats as f64 / copy,
            flops: 2.0 * (n_rows * columns * d) as f64 / multiply,
        })
    }

    /// The rates for steps of this size: those that `folder` remembers of the device, or measured now and remembered.
    ///
    /// # Errors
    /// If the device fails.
    pub fn remembered(device: &Shared, factors: Factors, work: &Work, folder: Option<&Path>) -> Result<Self> {
        let columns = geometry::latents_at_once(work.n_rows, work.n_latents, geometry::PRODUCTS);
        let sizes = [work.n_rows, columns, work.widths[0].max(work.widths[1])];
        let key = files::sha256(format!("{} {factors:?} {sizes:?}", device.name()).as_bytes());
        let path = folder.map(|folder| folder.join(format!("{key}.json")));
        let known = path.as_deref().and_then(|path| std::fs::read(path).ok());
        let known = known.and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        if let Some(rates) = known.filter(|rates| rates.bandwidth > 0.0 && rates.flops > 0.0) {
            return Ok(rates);
        }
        let Self { bandwidth, flops } =
            Self::measure(device, factors, sizes, COPIED * work.n_rows * columns)?;
        // Whole numbers are read back as they were written.
        let rates = Self { bandwidth: bandwidth.ceil(), flops: flops.ceil() };
        if let Some(path) = path
            && let Err(error) = files::write_bytes(&path, &serde_json::to_vec(&rates)?)
        {
            tracing::debug!("the card's rates are not remembered: {error:#}");
        }
        Ok(rates)
    }
}

/// Seconds of one call, of many in a row after one.
fn time(device: &Shared, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    device.wait()?;
    let started = Instant::now();
    for _ in 0..REPEATS {
        call()?;
    }
    device.wait()?;
    Ok(started.elapsed().as_secs_f64() / REPEATS as f64)
}

/// What the factors of products of f32 arrays are, where the encoder's may be split.
#[must_use]
pub fn factors(products: Products) -> Factors {
    match products {
        Products::F32 => Factors::F32,
        Products::Tf32 | Products::Bf16 | Products::Bf16x3 => Factors::Tf32,
    }
}

/// How a run's steps are taken on `device`: what its configuration says. Which route they take, and why, is logged.
///
/// # Errors
/// If the device fails.
pub fn options(config: &TrainConfig, widths: [usize; 2], device: &Shared) -> Result<CudaOptions> {
    let folder = places::cache_folder().ok().map(|cache| cache.join("rates"));
    let (dense_from, why) = dense_from(config, widths, device, folder.as_deref())?;
    tracing::info!("{why}");
    Ok(CudaOptions {
        products: config.products,
        deterministic: config.deterministic,
        dense_from,
        ..CudaOptions::default()
    })
}

/// From how many kept pairs of a row steps take the dense route, and a sentence about it.
///
/// # Errors
/// If the device fails.
pub fn dense_from(
    config: &TrainConfig,
    widths: [usize; 2],
    device: &Shared,
    folder: Option<&Path>,
) -> Result<(f64, String)> {
    let one_residual = config.aux_k == 0
        && !config.multi_topk
        && config.prefix_lengths().is_empty()
        && config.loss == Loss::Mse
        && config.activation != LatentFunction::Gated;
    match config.route {
        Route::Sparse => Ok((f64::INFINITY, "steps take the sparse route, as asked for".to_owned())),
        Route::Dense if one_residual => Ok((0.0, "steps take the dense route, as asked for".to_owned())),
        Route::Dense | Route::Auto if !one_residual => Ok((
            f64::INFINITY,
            "steps take the sparse route: terms of the objective learn from residuals of their own"
                .to_owned(),
        )),
        Route::Dense | Route::Auto => {
            let work = Work { n_rows: config.batch, n_latents: config.width, widths };
            let rates = Rates::remembered(device, factors(config.products), &work, folder)?;
            let from = work.crossover(&rates);
            let why = if from >= config.width as f64 {
                "steps take the sparse route, however many latents are active".to_owned()
            } else {
                format!(
                    "steps take the dense route from {from:.0} latents kept of a row, else the sparse one"
                )
            };
            let speeds = format!(
                "copies at {:.0} GB/s, products at {:.2} TFLOP/s",
                rates.bandwidth / 1e9,
                rates.flops / 1e12
            );
            Ok((from, format!("{why} ({speeds})")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work { n_rows: 4096, n_latents: 16384, widths: [2304, 2304] };

    #[test]
    fn the_routes_cost_what_they_move_and_multiply() {
        // A byte a second, and no time for products: only bytes count.
        let slow = Rates { bandwidth: 1.0, flops: f64::INFINITY };
        let small = Work { n_rows: 2, n_latents: 8, widths: [3, 5] };
        // 2 rows, 4 pairs each, of 5 + 5 + 3 values.
        assert_eq!(small.sparse_seconds(&slow, 4.0), 416.0);
        // One stretch: 7 * 2 * 8 + 2 * (4 * 5 + 3) + 2 * 8 * 5 + 2 * 8 * 8 values.
        assert_eq!(small.dense_seconds(&slow), 4.0 * (112.0 + 46.0 + 80.0 + 128.0));
        let busy = Rates { bandwidth: f64::INFINITY, flops: 1.0 };
        assert_eq!(small.sparse_seconds(&busy, 4.0), 0.0);
        assert_eq!(small.dense_seconds(&busy), 2.0 * 2.0 * 8.0 * 18.0);
    }

    #[test]
    fn routes_take_the_same_time_at_the_crossover() {
        let rates = Rates { bandwidth: 2e12, flops: 3e14 };
        let from = WORK.crossover(&rates);
        let (sparse, dense) = (WORK.sparse_seconds(&rates, from), WORK.dense_seconds(&rates));
        assert!((sparse / dense - 1.0).abs() < 1e-12, "{sparse} {dense}");
        assert!(WORK.sparse_seconds(&rates, from / 2.0) < dense && from > 1.0);
        // Wider dictionaries need more to be active, faster products less.
        let wide = Work { n_latents: 1 << 20, ..WORK };
        assert!(wide.crossover(&rates) > 30.0 * from);
        assert!(WORK.crossover(&Rates { flops: 6e14, ..rates }) < from);
        assert!(WORK.crossover(&Rates { bandwidth: 4e12, ..rates }) > from);
    }
}
