//! A training step of a JumpReLU autoencoder on made-up vectors: how long it takes, and its encoder product alone, in f32 and
//! through bf16.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use shared::Rows;
use shared::config::train::EncoderPrecision;
use shared::format::tensors;
use shared::loss::{Objective, Parametrisation, Sparsity};

use super::{forget_peak_memory, peak_memory_mib};
use crate::cpu::gemm::{Matrix, product};
use crate::cpu::simd::{Format, Kernel};
use crate::files::write_bytes;
use crate::train::encode::{Cuts, Keep, Selection, encode};
use crate::train::{Betas, Latents, Params, Settings, Tensors, Trainer};

/// Rows whose pre-activations say about where the threshold is.
const SAMPLE: usize = 128;
/// How far below that the values of all rows are looked at, to find where it is.
const BELOW: f32 = 0.1;
/// Width of the straight-through window, for vectors of norm √d: the default of SAELens.
const BANDWIDTH: f32 = 0.05;
/// So small that L0 stays where it is from round to round.
const LR: f64 = 1e-6;

/// An autoencoder and a batch, ready for one step after the other.
pub struct TrainStepBench {
    trainer: Trainer,
    batch: Vec<f32>,
    objective: Objective,
}

/// What a round does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainStepReady {
    /// Rows of a batch.
    pub tokens: usize,
    /// Floating-point operations of the encoder product.
    pub encoder_flops: f64,
    /// Bytes of the batch, in MiB.
    pub batch_mib: f64,
    /// Those of parameters and moments.
    pub state_mib: f64,
    /// Floating-point operations a second, in units of 10⁹, of multiplications in registers alone: no product is faster. None
    /// where this processor has no kernel of ours.
    pub f32_ceiling: Option<f64>,
    /// The same for pairs of bf16.
    pub bf16_ceiling: Option<f64>,
    /// Threads.
    pub threads: usize,
}

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TrainStepRound {
    /// How long the step took.
    pub seconds: f64,
    /// Its forward pass.
    pub forward_seconds: f64,
    /// The encoder product with what is kept of it, once more after the step.
    pub encoder_seconds: f64,
    /// Mean active latents of a row.
    pub l0: f64,
    /// Mean pre-activations of a row that were computed once more after bf16.
    pub again: f64,
    /// The most memory this process has held so far.
    pub peak_mib: Option<f64>,
}

impl TrainStepBench {
    /// Makes `n_rows` normal vectors of width `d` and norm about √d, `n` unit directions that serve as both encoder and
    /// decoder, and one threshold for all latents so that about `l0` of them are active.
    ///
    /// # Errors
    /// If a size is zero or `l0` is not below `n`.
    pub fn new(d: usize, n: usize, n_rows: usize, l0: usize) -> Result<Self> {
        ensure!(
            d > 0 && n_rows > 0 && (1..n).contains(&l0),
            "cannot bench {n_rows} rows × {d} at {l0} of {n}"
        );
        let mut noise = Noise(1);
        let batch: Vec<f32> =
            (0..n_rows.checked_mul(d).context("batch overflows")?).map(|_| noise.next()).collect();
        let mut tensors = Tensors::zeros(n, d, d, false);
        for row in tensors.w_dec.chunks_exact_mut(d) {
            row.iter_mut().for_each(|v| *v = noise.next());
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        tensors.w_enc.clone_from(&tensors.w_dec);
        let theta = threshold(&batch[..SAMPLE.min(n_rows) * d], &tensors.w_enc, d, l0)?;
        let latents = Latents::JumpRelu { parametrisation: Parametrisation::Raw, bandwidth: BANDWIDTH };
        let mut params = Params { d_in: d, d_out: d, tensors, latents, pre_bias: true, encoder_bias: true };
        let cuts = vec![theta - BELOW; n];
        let above = Selection { keep: Keep::Above(Cuts::of_latents(&cuts)), dead: None };
        let found = encode(&params, &batch, above, EncoderPrecision::F32)?;
        let mut values: Vec<f32> = found.kept.all().iter().map(|candidate| candidate.z).collect();
        let wanted = n_rows * l0;
        ensure!(wanted < values.len(), "the first {SAMPLE} rows are unlike the others");
        let (_, theta, _) = values.select_nth_unstable_by(wanted, |a, b| b.total_cmp(a));
        params.tensors.own[0].fill(*theta);
        let objective = Objective::plain(Sparsity::L0 { lambda: 1.0 });
        Ok(Self { trainer: Trainer::new(params, false), batch, objective })
    }

    /// Writes batch `x [N, d]`, directions `w [n, d]` and `threshold [n]` for another program, as safetensors.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let (params, d) = (&self.trainer.params, self.trainer.params.d_in);
        let (n, t) = (params.n_latents(), &params.tensors);
        let bytes = tensors::serialize(
            "vectors",
            &[
                ("x", &[self.batch.len() / d, d], &self.batch),
                ("w", &[n, d], &t.w_dec),
                ("threshold", &[n], &t.own[0]),
            ],
        )?;
        write_bytes(path, &bytes)
    }

    /// What a round does.
    #[must_use]
    pub fn ready(&self) -> TrainStepReady {
        let (n, mib) =
            (self.trainer.params.n_latents(), |values: usize| values as f64 * 4.0 / (1 << 20) as f64);
        let (t, moments) = (&self.trainer.params.tensors, &self.trainer.moments);
        let ceiling = |format| Kernel::find(format).and_then(Kernel::peak).map(|flops| flops / 1e9);
        forget_peak_memory();
        TrainStepReady {
            batch_mib: mib(self.batch.len()),
            state_mib: mib(n_values(t)
                + n_values(&moments.second)
                + moments.first.as_ref().map_or(0, n_values)),
            f32_ceiling: ceiling(Format::F32),
            bf16_ceiling: ceiling(Format::Bf16),
            tokens: self.batch.len() / self.trainer.params.d_in,
            encoder_flops: 2.0 * self.batch.len() as f64 * n as f64,
            threads: rayon::current_num_threads(),
        }
    }

    /// One step: forward, backward, Adam, and which latents fired; the encoder product at `precision`.
    ///
    /// # Errors
    /// If the step fails.
    pub fn round(&mut self, precision: EncoderPrecision) -> Result<TrainStepRound> {
        self.trainer.set_precision(precision);
        let x = Rows::new(&self.batch, self.trainer.params.d_in)?;
        let betas = Betas { first: 0.0, second: 0.999, eps: 1e-8 };
        let settings = Settings { lr: LR, own_lr: LR, betas, objective: &self.objective };
        let started = Instant::now();
        let forward = self.trainer.forward(x, x, &self.objective)?;
        let forward_seconds = started.elapsed().as_secs_f64();
        self.trainer.update(&forward, &settings)?;
        black_box(forward.fired(&self.trainer.params));
        let seconds = started.elapsed().as_secs_f64();
        let (l0, again) = (forward.losses().l0, forward.effort().again as f64 / x.n_rows() as f64);
        drop(forward);
        let cuts = self.trainer.params.thetas();
        let started = Instant::now();
        let selection = Selection { keep: Keep::Above(Cuts::of_latents(&cuts)), dead: None };
        black_box(encode(&self.trainer.params, &self.batch, selection, precision)?);
        let encoder_seconds = started.elapsed().as_secs_f64();
        Ok(TrainStepRound {
            seconds,
            forward_seconds,
            encoder_seconds,
            l0,
            again,
            peak_mib: peak_memory_mib(),
        })
    }
}

fn n_values(t: &Tensors) -> usize {
    let arrays = [&t.w_enc, &t.b_enc, &t.w_dec, &t.b_dec, &t.own[0], &t.own[1], &t.w_skip];
    arrays.iter().map(|array| array.len()).sum()
}

/// What `l0` of a row's pre-activations exceed on the average of `rows`.
fn threshold(rows: &[f32], weights: &[f32], d: usize, l0: usize) -> Result<f32> {
    let (n_rows, n) = (rows.len() / d, weights.len() / d);
    let mut z = vec![0.0; n_rows * n];
    let weights = Matrix::new(weights, n, d)?.transposed();
    product(&mut z, Matrix::new(rows, n_rows, d)?, weights, 1.0, false, rayon::current_num_threads())?;
    let (_, theta, _) = z.select_nth_unstable_by(n_rows * l0, |a, b| b.total_cmp(a));
    Ok(*theta)
}

/// A fixed sequence, roughly normal with variance 1.
pub(super) struct Noise(pub(super) u64);

impl Noise {
    pub(super) fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        (0..6).map(|_| uniform()).sum::<f32>() * 2f32.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_the_l0_asked_for_and_its_inputs_are_written() {
        let mut bench = TrainStepBench::new(24, 512, 256, 16).unwrap();
        let [first, second] =
            [EncoderPrecision::F32, EncoderPrecision::Bf16].map(|p| bench.round(p).unwrap());
        assert!((first.l0 - 16.0).abs() < 0.01 && (second.l0 - first.l0).abs() < 0.5, "{first:?} {second:?}");
        assert!(first.again == 0.0 && (second.again > 16.0 || !crate::train::has_bf16()), "{second:?}");
        assert!(first.forward_seconds < first.seconds);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vectors.safetensors");
        bench.write(&path).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("w").unwrap().shape(), [512, 24]);
        assert_eq!(file.tensor("x").unwrap().shape(), [256, 24]);
        assert!(TrainStepBench::new(24, 16, 8, 16).is_err());
    }
}
