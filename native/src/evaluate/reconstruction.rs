//! What activation vectors alone tell: L0, FVU, dead share, densities.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::metrics::{Density, Fvu, L0};
use shared::pack::DensityHistogram;

use crate::cpu::CpuBackend;

/// Decades of the density histogram below 1, and bins in each.
const HISTOGRAM_DECADES: i32 = -7;
const BINS_PER_DECADE: u32 = 4;

/// Measured on activation vectors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReconstructionReport {
    /// Held-out vectors behind `l0`, `fvu` and the squared norms.
    pub n_held_out: u64,
    /// Mean number of active latents a vector.
    pub l0: f64,
    /// Fraction of variance unexplained; absent when the vectors do not vary.
    pub fvu: Option<f64>,
    /// Mean squared error, summed over the width.
    pub mean_squared_error: f64,
    /// Mean squared distance from the mean vector, summed over the width.
    pub variance: f64,
    /// Vectors behind `dead_share` and the densities.
    pub n_density: u64,
    /// Share of latents active on none of the `n_density` vectors.
    pub dead_share: f64,
    /// Share of latents active on more than one vector in ten.
    pub dense_share: f64,
    /// Latents by `log10(density)`; those that never fired are in no bin.
    pub density_histogram: DensityHistogram,
}

/// Accumulates the report batch by batch.
#[derive(Debug)]
pub struct ReconstructionMeter<'a> {
    backend: &'a CpuBackend,
    l0: L0,
    fvu: Fvu,
    density: Density,
}

impl<'a> ReconstructionMeter<'a> {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(backend: &'a CpuBackend) -> Self {
        let dims = backend.sae().dims();
        Self { backend, l0: L0::default(), fvu: Fvu::new(dims.d_out), density: Density::new(dims.n_latents) }
    }

    /// Vectors seen, of either kind.
    #[must_use]
    pub fn n_vectors(&self) -> u64 {
        self.density.n_rows()
    }

    /// Adds held-out vectors `x [n, d_in]`, and what is to be reconstructed `y [n, d_out]`, to every metric.
    ///
    /// # Errors
    /// If rows have another width.
    pub fn add_held_out(&mut self, x: Rows<'_>, y: Rows<'_>) -> Result<()> {
        let codes = self.backend.encode(x)?;
        let reconstruction = self.backend.decode(x, &codes)?;
        self.fvu.update(y, Rows::new(&reconstruction, y.width())?)?;
        self.l0.update(&codes);
        self.density.update(&codes)?;
        Ok(())
    }

    /// Adds vectors `[n, d_in]` to densities and dead share only.
    ///
    /// # Errors
    /// If rows have another width.
    pub fn add_for_density(&mut self, x: Rows<'_>) -> Result<()> {
        self.density.update(&self.backend.encode(x)?)?;
        Ok(())
    }

    /// The report.
    ///
    /// # Errors
    /// If no held-out vector was seen.
    pub fn finish(self) -> Result<ReconstructionReport> {
        let densities = self.density.densities();
        #[expect(clippy::cast_precision_loss, reason = "latents are far below 2^53")]
        let share = |count: usize| count as f64 / densities.len().max(1) as f64;
        let nothing = "no held-out vectors were measured";
        Ok(ReconstructionReport {
            n_held_out: self.fvu.n_rows(),
            l0: self.l0.mean().context(nothing)?,
            fvu: self.fvu.value(),
            mean_squared_error: self.fvu.mean_squared_error().context(nothing)?,
            variance: self.fvu.variance().context(nothing)?,
            n_density: self.density.n_rows(),
            dead_share: share(densities.iter().filter(|&&d| d == 0.0).count()),
            dense_share: share(densities.iter().filter(|&&d| d > 0.1).count()),
            density_histogram: self.density.log10_histogram(HISTOGRAM_DECADES, BINS_PER_DECADE).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::{Activation, RowScaling, Sae, SaeParts};

    /// Two inputs copied through two latents, a third that never fires: every figure is known.
    #[test]
    fn known_answers() {
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            b_enc: vec![0.0, 0.0, -100.0],
            w_dec: vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            b_dec: vec![0.0, 0.0],
            activation: Activation::JumpRelu { threshold: vec![0.5; 3] },
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap();
        let backend = CpuBackend::new(sae);
        let mut meter = ReconstructionMeter::new(&backend);
        let x = [1.0, 0.0, 3.0, 0.5, 1.0, 0.0, 3.0, 0.5];
        let x = Rows::new(&x, 2).unwrap();
        meter.add_held_out(x, x).unwrap();
        meter.add_for_density(Rows::new(&[0.0, 1.0], 2).unwrap()).unwrap();
        let report = meter.finish().unwrap();
        assert_eq!((report.n_held_out, report.n_density, report.l0), (4, 5, 1.0));
        // Error: 0.25 on two rows of four. Variance: 1 in the first coordinate, 1/16 in the second.
        assert_eq!((report.mean_squared_error, report.variance), (0.125, 1.0625));
        assert_eq!(report.fvu, Some(0.125 / 1.0625));
        assert!((report.dead_share - 1.0 / 3.0).abs() < 1e-12);
        assert!((report.dense_share - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(report.density_histogram.counts.iter().sum::<u64>(), 2);
        assert!(ReconstructionMeter::new(&backend).finish().is_err(), "nothing seen is an error, not zero");
    }
}
