//! The forward pass of a harvest, one batch at a time: how long it takes.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use shared::Precision;
use shared::lm::Spec;
use shared::tap::{Site, TapPoint};

use super::{ids_of, peak_memory_mib};
use crate::cpu::gemm::{Matrix, product};
use crate::harvest::source::ActivationModel;
use crate::model::{self, LoadedModel};

/// The side of the square product that stands for the machine's peak.
const PEAK_SIDE: usize = 2048;

/// A loaded model and a batch, ready to be run again and again.
pub struct HarvestBench {
    model: LoadedModel,
    ids: Vec<u32>,
    length: usize,
    point: TapPoint,
}

/// What a round does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HarvestReady {
    /// The number format.
    pub precision: Precision,
    /// Tokens of a round.
    pub tokens: usize,
    /// Floating-point operations of a round's matrix products, attention included.
    pub flops: f64,
    /// Threads.
    pub threads: usize,
    /// The model's own size in memory: the weights of all blocks and the embedding, in MiB.
    pub model_mib: f64,
}

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HarvestRound {
    /// How long it took.
    pub seconds: f64,
    /// The most memory this process has held so far.
    pub peak_mib: Option<f64>,
}

impl HarvestBench {
    /// Loads `model` to run in `precision` on `batch` sequences of `length` tokens of `text`, through `layers` blocks.
    ///
    /// # Errors
    /// If model or text cannot be read, or the model has fewer blocks.
    pub fn load(
        model: &Path,
        text: &Path,
        precision: Precision,
        (batch, length): (usize, usize),
        layers: usize,
    ) -> Result<Self> {
        let model = model::load_as(model, precision)?;
        let n_layers = model.model.spec().n_layers;
        ensure!((1..=n_layers).contains(&layers), "the model has {n_layers} blocks, wanted {layers}");
        let ids = ids_of(text, &model.tokenizer, batch, length)?;
        Ok(Self { model, ids, length, point: TapPoint::new(Site::Resid, layers - 1) })
    }

    /// The batch.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What a round does.
    #[must_use]
    pub fn ready(&self) -> HarvestReady {
        let spec = self.model.model.spec();
        let precision = self.model.provenance.precision;
        let bytes = match precision {
            Precision::F32 => 4.0,
            Precision::Bf16 => 2.0,
            // 32 bytes, a scale and a sum for 32 values.
            Precision::Q8_0 => 1.25,
        };
        let tables = if spec.tied_embeddings { 1 } else { 2 } * spec.vocab_size * spec.d_model;
        let weights = spec.n_layers * block_weights(spec) + tables;
        HarvestReady {
            precision,
            tokens: self.ids.len(),
            flops: flops(spec, self.ids.len(), self.length) * (self.point.layer + 1) as f64,
            threads: rayon::current_num_threads(),
            model_mib: weights as f64 * bytes / (1 << 20) as f64,
        }
    }

    /// One batch, read at the tap.
    ///
    /// # Errors
    /// If the model fails.
    pub fn round(&self) -> Result<HarvestRound> {
        let started = Instant::now();
        let mut seen = 0.0;
        let mut read = |_, rows: shared::Rows<'_>| {
            seen = rows.data().last().copied().context("a batch without activations")?;
            Ok(())
        };
        self.model.model.activations(&self.ids, self.length, &[self.point], &mut read)?;
        let seconds = started.elapsed().as_secs_f64();
        black_box(seen);
        Ok(HarvestRound { seconds, peak_mib: peak_memory_mib() })
    }

    /// f32 operations a second of one large product on all threads.
    ///
    /// # Errors
    /// Never with the lengths used here.
    pub fn peak_gflops() -> Result<f64> {
        let n = PEAK_SIDE;
        let a: Vec<f32> = (0..n * n).map(|i| (i % 1013) as f32 * 1e-3 - 0.5).collect();
        let mut out = vec![0.0; n * n];
        let threads = rayon::current_num_threads();
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let (x, w) = (Matrix::new(&a, n, n)?, Matrix::new(&a, n, n)?);
            let started = Instant::now();
            product(&mut out, x, w.transposed(), 1.0, false, threads)?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        black_box(&out);
        Ok(2.0 * (n * n * n) as f64 / best / 1e9)
    }
}

/// Values of a block's matrices.
fn block_weights(spec: &Spec) -> usize {
    let attention = &spec.attention;
    let (d, q) = (spec.d_model, attention.n_heads * attention.head_dim);
    let kv = attention.n_kv_heads * attention.head_dim;
    d * (q + 2 * kv) + q * d + if spec.mlp.gated { 3 } else { 2 } * d * spec.d_ff
}

/// Operations of one block's products: two a weight and token, and two products of attention over the keys each query
/// sees, half of the sequence on average.
fn flops(spec: &Spec, tokens: usize, length: usize) -> f64 {
    let attention = &spec.attention;
    let width = (attention.n_heads * attention.head_dim) as f64;
    let seen = (length + 1) as f64 / 2.0;
    tokens as f64 * (2.0 * block_weights(spec) as f64 + 4.0 * width * seen)
}
