//! The backward half of a step on a device: gradients, Adam, and the next parameters.

use anyhow::{Result, ensure};

use super::super::device::{Argument, MatrixAt, Product};
use super::super::geometry;
use super::super::kernels::Kernel;
use super::{CudaForward, CudaTrainer, NEWEST};
use crate::train::{Latents, Settings};

impl CudaTrainer {
    /// Backward pass and update: the step is taken.
    ///
    /// # Errors
    /// If `forward` is not the last forward pass, or the device fails.
    pub fn update(&mut self, forward: &CudaForward, settings: &Settings<'_>) -> Result<()> {
        ensure!(
            forward.step == self.step && self.told.n_rows > 0,
            "an update needs the forward pass just before it"
        );
        self.step += 1;
        self.tell(forward, settings)?;
        let n = self.about.n_latents();
        self.launch(Kernel::SumResiduals, self.told.n_parts as usize, &[])?;
        if self.has_skip() {
            self.skip_gradient()?;
        }
        if self.told.pull_dead != 0 {
            self.launch(Kernel::InputSums, self.shape.blocks(self.about.d_in), &[])?;
        }
        match self.workspace.as_ref().and_then(|work| Some((work, work.dense.as_ref()?))) {
            Some((work, dense)) if forward.dense => self.update_dense(work, dense)?,
            _ => {
                let piece = geometry::latents_of_block(n);
                self.launch(Kernel::Update, n.div_ceil(piece), &[Argument::U32(piece as u32)])?;
            }
        }
        self.launch(Kernel::UpdateBias, self.shape.blocks(self.about.d_out), &[])?;
        if self.has_skip() {
            let first = self.first.as_ref().map_or(0, |first| first.w_skip.at());
            let values = self.about.d_out * self.about.d_in;
            let arrays = [self.params.w_skip.at(), first, self.second.w_skip.at(), self.fixed.g_skip.at()];
            let [p, m, v, g] = arrays.map(Argument::Address);
            let n = Argument::U64(values as u64);
            self.launch(Kernel::UpdateDense, self.shape.blocks(values), &[p, m, v, g, n])?;
        }
        if let (Latents::BatchTopK { threshold, .. }, Some(smallest)) =
            (&mut self.about.latents, forward.smallest)
        {
            let before = if *threshold > 0.0 { *threshold } else { smallest };
            *threshold = before + NEWEST * (smallest - before);
            self.smallest = smallest;
        }
        Ok(())
    }

    /// What the kernels are told besides: factors of the terms, and Adam's constants.
    fn tell(&mut self, forward: &CudaForward, settings: &Settings<'_>) -> Result<()> {
        let (objective, n) = (settings.objective, f64::from(self.told.n_rows));
        let scale = 2.0 / n / objective.normaliser;
        let aux_weight = objective.aux_k.as_ref().map_or(0.0, |aux| aux.weight);
        let aux_scale =
            if forward.left_variance > 0.0 { 2.0 * aux_weight / n / forward.left_variance } else { 0.0 };
        let (betas, step) = (settings.betas, i32::try_from(self.step).unwrap_or(i32::MAX));
        let correction = |beta: f64| (1.0 / (1.0 - beta.powi(step))) as f32;
        let latents = self.about.n_latents();
        let lambda = |layer| (forward.levels.lambda(&objective.sparsity, layer) / n) as f32;
        let lambdas: Vec<f32> = (0..self.about.n_layers()).map(lambda).collect();
        self.fixed.lambda_per_row.write_changed(&lambdas)?;
        let n_partials = match &self.workspace {
            Some(work) if forward.dense => {
                work.at_once.min(latents).div_ceil(self.piece_of_dense(work.at_once))
            }
            _ => latents.div_ceil(geometry::latents_of_block(latents)),
        };
        let told = &mut self.told;
        told.scale = scale as f32;
        told.gate_scale = scale as f32;
        told.multi_scale = (scale * objective.multi.map_or(0.0, |multi| multi.weight)) as f32;
        told.aux_scale = aux_scale as f32;
        told.beta2 = betas.second;
        told.step = u32::try_from(self.step)?;
        told.lr = settings.lr as f32;
        told.own_lr = settings.own_lr as f32;
        told.momentum = betas.first as f32;
        told.momentum_gain = (1.0 - betas.first) as f32;
        told.momentum_correction = correction(betas.first);
        told.gain = (1.0 - betas.second) as f32;
        told.correction = correction(betas.second);
        told.eps = betas.eps as f32;
        told.n_partials = n_partials as u32;
        Ok(())
    }

    /// The gradient of the skip connection `[d_out, d_in]`: residuals against inputs.
    fn skip_gradient(&self) -> Result<()> {
        let Some(work) = &self.workspace else { return Ok(()) };
        let (d_in, d_out) = (self.about.d_in, self.about.d_out);
        let residuals = Argument::Address(work.residuals.at());
        self.launch(Kernel::WeighResiduals, work.n_rows, &[residuals])?;
        self.device.product(&Product {
            m: d_out,
            n: d_in,
            k: work.n_rows,
            a: MatrixAt { at: work.residuals.at(), leading: d_out, transposed: true },
            b: MatrixAt { at: self.told.x, leading: d_in, transposed: false },
            c: MatrixAt { at: self.fixed.g_skip.at(), leading: d_in, transposed: false },
            factors: self.factors(),
            adds: false,
        })
    }
}
