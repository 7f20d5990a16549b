//! The forward half of a step on a device: what is active, what it decodes to, the losses.

use std::sync::Arc;

use anyhow::{Result, ensure};
use shared::loss::{Levels, Losses, Objective};

use super::super::batch::Resident;
use super::super::device::{Argument, Buffer, MatrixAt, Product};
use super::super::geometry;
use super::super::kernels::Kernel;
use super::super::step::{ROW_SUMS, of_key};
use super::buffers::{TOTALS, Workspace};
use super::describe::is_mlsae;
use super::{CudaForward, CudaTrainer};
use crate::train::Latents;

impl CudaTrainer {
    /// Forward pass over a batch of normalised rows `[N, d_in]` with targets `[N, d_out]`; keeps the batch until the next.
    ///
    /// # Errors
    /// If rows do not have the right widths, or the device fails.
    pub fn forward(&mut self, batch: &Arc<Resident>, objective: &Objective) -> Result<CudaForward> {
        let (n_rows, wanted) = (batch.n_rows(), [self.about.d_in, self.about.d_out]);
        ensure!(
            batch.widths() == wanted,
            "rows and targets are {:?} wide, and should be {wanted:?}",
            batch.widths()
        );
        self.batch = Some(Arc::clone(batch));
        objective.examples.check(n_rows, self.about.n_layers())?;
        self.write_objective(objective)?;
        loop {
            let mut work = self.workspace(n_rows, objective)?;
            self.write_examples(&work, objective)?;
            self.told = self.describe(&work, batch, objective);
            let found = self.pass(&mut work, objective);
            self.workspace = Some(work);
            if let Some(forward) = found? {
                return Ok(forward);
            }
            self.capacity = geometry::more_capacity(self.capacity, self.about.n_latents());
        }
    }

    /// What is said of the objective latent by latent.
    fn write_objective(&self, objective: &Objective) -> Result<()> {
        let mask = |dead: &[bool]| dead.iter().map(|&dead| u8::from(dead)).collect::<Vec<u8>>();
        if let Some(aux) = &objective.aux_k {
            self.fixed.dead.write_changed(&mask(&aux.dead))?;
        }
        if let Some(pull) = &objective.dead_pull {
            self.fixed.pull_dead.write_changed(&mask(&pull.dead))?;
        }
        let n = u32::try_from(self.about.n_latents())?;
        let (mut ends, mut weights) = (vec![n], vec![1.0f32]);
        if !objective.prefixes.is_empty() {
            ends = objective.prefixes.iter().map(|p| p.n_latents as u32).collect();
            weights = objective.prefixes.iter().map(|p| p.weight as f32).collect();
        }
        ensure!(ends.len() <= 64, "{} nested prefixes; at most 64 are supported", ends.len());
        self.fixed.stretch_ends.write_changed(&ends)?;
        self.fixed.stretch_weights.write_changed(&weights)
    }

    /// What is said of each row.
    fn write_examples(&self, work: &Workspace, objective: &Objective) -> Result<()> {
        let (n_rows, n_layers) = (work.n_rows, self.about.n_layers());
        let examples = &objective.examples;
        let mut layer_rows = vec![0.0f32; n_layers];
        (0..n_rows).for_each(|row| layer_rows[if n_layers > 1 { examples.layer(row) } else { 0 }] += 1.0);
        self.fixed.layer_rows.write_changed(&layer_rows)?;
        if n_layers > 1 {
            ensure!(examples.layers.len() == n_rows, "thresholds of {n_layers} layers, and rows of none");
            let layers: Vec<u32> = examples.layers.iter().map(|&layer| layer.into()).collect();
            work.layers.write(&layers)?;
        }
        let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        work.row_weights.write(&narrow(&examples.weights))?;
        work.deviations.write(&narrow(&examples.deviations))
    }

    /// A pass; `None` when a row had too little room.
    fn pass(&mut self, work: &mut Workspace, objective: &Objective) -> Result<Option<CudaForward>> {
        let n_rows = work.n_rows;
        if self.about.pre_bias {
            self.launch(Kernel::Center, n_rows, &[])?;
        }
        let mut smallest = None;
        if let Latents::BatchTopK { k, .. } = self.about.latents {
            let wanted = k * n_rows;
            let counted = self.told.cut <= 0.0;
            if counted {
                self.told.cut = self.cut(work, wanted)?;
            }
            let mut found = self.keep(work, objective)?;
            // The batch before was another kind of batch: too little was kept, or more than there is room for.
            if !counted && found.is_none_or(|found| found < wanted) {
                self.told.cut = self.cut(work, wanted)?;
                found = self.keep(work, objective)?;
            }
            let Some(found) = found else { return Ok(None) };
            smallest = self.keep_batch(work, wanted, found)?;
        } else if self.keep(work, objective)?.is_none() {
            return Ok(None);
        }
        let n_kept = self.order(work)?;
        let dense = work.dense.is_some() && n_kept as f64 >= self.options.dense_from * n_rows as f64;
        if self.has_skip() {
            let (d_in, d_out) = (self.about.d_in, self.about.d_out);
            self.device.product(&Product {
                m: n_rows,
                n: d_out,
                k: d_in,
                a: MatrixAt { at: self.told.x, leading: d_in, transposed: false },
                b: MatrixAt { at: self.params.w_skip.at(), leading: d_in, transposed: true },
                c: MatrixAt { at: work.base.at(), leading: d_out, transposed: false },
                factors: self.factors(),
                adds: false,
            })?;
        }
        if dense {
            self.decode_dense(work)?;
        } else {
            self.launch(Kernel::Decode, n_rows, &[])?;
        }
        let lengths = Argument::Address(self.fixed.lengths.at());
        if self.told.decoder_norm != 0 {
            self.launch(Kernel::Lengths, self.about.n_latents(), &[lengths])?;
        }
        self.fixed.found.clear()?;
        self.launch(Kernel::Tally, n_rows, &[lengths])?;
        self.launch(Kernel::Totals, 1, &[])?;
        let found = self.found(work, objective, smallest)?;
        Ok(Some(CudaForward { n_kept, dense, ..found }))
    }

    /// What is worth keeping of the batch so that the `wanted` largest are there: a pass over the encoder product that only counts.
    fn cut(&self, work: &Workspace, wanted: usize) -> Result<f32> {
        let histogram = Buffer::zeros::<u64>(&self.device, geometry::BINS)?;
        self.split_inputs(work)?;
        self.each_product(work, |[first, width, leading]| {
            let histogram = Argument::Address(histogram.at());
            self.launch(Kernel::BatchCount, work.n_rows, &[first, width, leading, histogram])
        })?;
        Ok(geometry::cut_of(&histogram.read::<u64>(geometry::BINS)?, wanted))
    }

    /// The encoder product, some latents at a time; `then` is told the first of them, how many, and their room.
    fn each_product(
        &self,
        work: &Workspace,
        then: impl Fn([Argument<'static>; 3]) -> Result<()>,
    ) -> Result<()> {
        let n = self.about.n_latents();
        for first in (0..n).step_by(work.at_once) {
            let width = work.at_once.min(n - first);
            self.encoder_product(work, first, width, work.at_once)?;
            then([first, width, work.at_once].map(|n| Argument::U32(n as u32)))?;
        }
        Ok(())
    }

    /// Encodes; how many were kept, or `None` when a row had too little room. Only BatchTopK wants the number.
    fn keep(&self, work: &Workspace, objective: &Objective) -> Result<Option<usize>> {
        self.encode(work, objective)?;
        if self.fixed.overflow.read::<u32>(1)? != [0] {
            return Ok(None);
        }
        if !matches!(self.about.latents, Latents::BatchTopK { .. }) {
            return Ok(Some(0));
        }
        let counts = work.kept_counts.read::<u32>(work.n_rows)?;
        Ok(Some(counts.into_iter().map(|count| count as usize).sum()))
    }

    /// The encoder product, some latents at a time, and what is kept of it.
    fn encode(&self, work: &Workspace, objective: &Objective) -> Result<()> {
        let (n, n_rows) = (self.about.n_latents(), work.n_rows);
        let largest = matches!(self.about.latents, Latents::TopK { .. });
        let dead = objective.aux_k.as_ref().is_some_and(|aux| aux.k > 0 && aux.dead.contains(&true));
        self.split_inputs(work)?;
        self.launch(Kernel::Thresholds, self.shape.blocks(n * self.about.n_layers()), &[])?;
        work.kept_counts.clear()?;
        work.dead_counts.clear()?;
        work.floors.clear()?;
        self.fixed.overflow.clear()?;
        self.each_product(work, |[first, width, leading]| {
            if largest {
                self.launch(Kernel::KeepLargest, n_rows, &[first, width, leading, Argument::U32(0)])?;
            } else {
                self.launch(Kernel::KeepAbove, n_rows, &[first, width, leading])?;
            }
            if dead {
                self.launch(Kernel::KeepLargest, n_rows, &[first, width, leading, Argument::U32(1)])?;
            }
            Ok(())
        })?;
        match (self.about.latents, &objective.multi) {
            (Latents::TopK { k }, Some(multi)) if multi.k > k => {
                self.launch(Kernel::MarkMulti, n_rows, &[Argument::U32(k as u32)])
            }
            _ => Ok(()),
        }
    }

    /// Keeps the `wanted` largest of all rows, ties going to earlier ones, of `found`; returns the smallest kept.
    fn keep_batch(&self, work: &Workspace, wanted: usize, found: usize) -> Result<Option<f32>> {
        if wanted == 0 || found <= wanted {
            return self.smallest(work);
        }
        let (mut prefix, mut mask, mut left) = (0u32, 0u32, wanted);
        for shift in [24u32, 16, 8, 0] {
            self.fixed.histogram.clear()?;
            let histogram = Argument::Address(self.fixed.histogram.at());
            let key = [Argument::U32(prefix), Argument::U32(mask), Argument::U32(shift), histogram];
            self.launch(Kernel::BatchHistogram, work.n_rows, &key)?;
            let counts = self.fixed.histogram.read::<u32>(256)?;
            let (mut bin, mut above) = (255usize, 0usize);
            while bin > 0 && above + (counts[bin] as usize) < left {
                above += counts[bin] as usize;
                bin -= 1;
            }
            (prefix, mask, left) = (prefix | (bin as u32) << shift, mask | 255 << shift, left - above);
        }
        let (equal, before) = (work.equal.at(), work.equal.at() + 4 * work.n_rows as u64);
        let (equal, before) = (Argument::Address(equal), Argument::Address(before));
        self.launch(Kernel::BatchEqual, work.n_rows, &[Argument::U32(prefix), equal])?;
        let n_rows = Argument::U32(work.n_rows as u32);
        self.device.launch(Kernel::Scan, self.shape, 1, &[equal, before, n_rows])?;
        let retain = [Argument::U32(prefix), Argument::U32(left as u32), before];
        self.launch(Kernel::BatchRetain, work.n_rows, &retain)?;
        Ok(Some(of_key(prefix)))
    }

    /// The smallest value kept, where that is everything positive.
    fn smallest(&self, work: &Workspace) -> Result<Option<f32>> {
        let counts = work.kept_counts.read::<u32>(work.n_rows)?;
        let z = work.kept_z.read::<f32>(work.n_rows * work.capacity)?;
        let rows = z.chunks(work.capacity).zip(counts);
        Ok(rows.flat_map(|(row, count)| &row[..count as usize]).copied().min_by(f32::total_cmp))
    }

    /// What was kept, by latent; how many entries that are.
    fn order(&mut self, work: &mut Workspace) -> Result<usize> {
        let n = self.about.n_latents();
        self.fixed.cursors.clear()?;
        self.launch(Kernel::CountEntries, work.n_rows, &[])?;
        let counts = Argument::Address(self.fixed.cursors.at());
        let offsets = Argument::Address(self.fixed.offsets.at());
        self.device.launch(Kernel::Scan, self.shape, 1, &[counts, offsets, Argument::U32(n as u32)])?;
        let mut total = [0u32];
        self.fixed.offsets.read_from(n, &mut total)?;
        let total = total[0] as usize;
        // Where any order will do, lists stay as they were found.
        let sorted = usize::from(self.options.deterministic);
        if total > work.n_entries {
            // A little more than asked for, so that the next batch fits too.
            work.n_entries = total + total / 4;
            for i in 0..=sorted {
                work.keys[i] = Buffer::new::<u32>(&self.device, work.n_entries)?;
                work.values[i] = Buffer::new::<u32>(&self.device, work.n_entries)?;
            }
        }
        self.told.keys = work.keys[0].at();
        self.told.sorted_keys = work.keys[sorted].at();
        self.told.values = work.values[0].at();
        self.told.sorted_values = work.values[sorted].at();
        self.fixed.cursors.clear()?;
        self.launch(Kernel::PlaceEntries, work.n_rows, &[])?;
        if self.options.deterministic {
            self.launch(Kernel::SortEntries, n, &[])?;
        }
        Ok(total)
    }

    /// Reads what the pass found.
    fn found(&self, work: &Workspace, objective: &Objective, smallest: Option<f32>) -> Result<CudaForward> {
        let found = self.fixed.found.read::<u8>(TOTALS + self.about.n_latents())?;
        let (totals, fired) = found.split_at(TOTALS);
        let totals = totals.chunks_exact(size_of::<f64>()).map(bytemuck::pod_read_unaligned::<f64>);
        let totals: Vec<f64> = totals.collect();
        let n = work.n_rows as f64;
        let [whole, prefixes, multi, gate, aux, active, penalty, power_a, power_b, own] =
            std::array::from_fn(|i| totals[i]);
        let (nu, l0) = (objective.normaliser, active / n);
        let multi = objective.multi.map_or(0.0, |term| term.weight * multi);
        let mut auxiliary = gate / n / nu;
        if let Some(pull) = &objective.dead_pull {
            auxiliary += pull.weight * self.pull_terms()? / n;
        }
        let mut left_variance = 0.0;
        if let Some(term) = &objective.aux_k {
            left_variance = if is_mlsae(objective) { own / n } else { self.variance(whole / n, n)? };
            if left_variance > 0.0 && term.dead.contains(&true) {
                let (above, below) = (aux / n, left_variance);
                auxiliary += term.weight * above / below;
                if is_mlsae(objective) {
                    let weight = term.weight * nu;
                    let factors = [weight / below, weight * above / (below * below)];
                    let factors = factors.map(|factor| Argument::F32(factor as f32));
                    self.launch(Kernel::PushBack, work.n_rows, &factors)?;
                }
            }
        }
        let levels = self.levels(work, objective, active)?;
        let losses = Losses {
            mse: whole / n,
            reconstruction: (prefixes + multi) / n / nu,
            sparsity: levels.term(&objective.sparsity) + penalty / n,
            auxiliary,
            l0,
        };
        Ok(CudaForward {
            losses,
            n_active: active as usize,
            n_kept: 0,
            dense: false,
            fired: (0u32..)
                .zip(fired)
                .filter_map(|(latent, &fired)| (fired != 0).then_some(latent))
                .collect(),
            mean_powers: [power_a / n, power_b / n],
            levels,
            left_variance,
            smallest,
            step: self.step,
        })
    }

    /// mean ‖r − mean r‖² of the whole dictionary's residuals, of which the mean square is known.
    fn variance(&self, mean_square: f64, n: f64) -> Result<f64> {
        let columns = [Argument::Address(self.fixed.column_sums.at())];
        self.launch(Kernel::ResidualSums, self.shape.blocks(self.about.d_out), &columns)?;
        let sums = self.fixed.column_sums.read::<f64>(self.about.d_out)?;
        Ok((mean_square - sums.iter().map(|sum| (sum / n).powi(2)).sum::<f64>()).max(0.0))
    }

    /// Mean L0: of each layer, where the objective asks for that.
    fn levels(&self, work: &Workspace, objective: &Objective, active: f64) -> Result<Levels> {
        if !objective.l0_by_layer {
            // Only the mean counts, so one row may have it all.
            let n = work.n_rows;
            return Ok(objective.levels((0..n).map(|row| if row == 0 { active as usize } else { 0 })));
        }
        let sums = work.row_sums.read::<f64>(work.n_rows * ROW_SUMS)?;
        Ok(objective.levels(sums.chunks_exact(ROW_SUMS).map(|row| row[5] as usize)))
    }

    /// The dead-latent loss before its weight, summed over rows.
    fn pull_terms(&self) -> Result<f64> {
        let n = self.about.n_latents();
        self.launch(Kernel::InputSums, self.shape.blocks(self.about.d_in), &[])?;
        self.launch(Kernel::PullTerms, n, &[Argument::Address(self.fixed.terms.at())])?;
        Ok(self.fixed.terms.read::<f64>(n)?.iter().sum())
    }
}
