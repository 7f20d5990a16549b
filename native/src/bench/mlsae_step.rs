//! What a multi-layer SAE costs beside an autoencoder of a single layer: batches and steps over as many made-up vectors, in turn.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use shared::Rows;
use shared::config::train::{AllLayers, LatentFunction, Layers, Thresholds, TrainConfig};
use shared::format::SaeMetadata;
use shared::loss::{Examples, Objective, Sparsity};
use shared::tap::{Site, TapPoint};

use super::train_step::Noise;
use crate::train::normalise::Scaling;
use crate::train::order::{Batches, Pairs, Position};
use crate::train::shards::Shards;
use crate::train::{
    ActivationSource, Betas, Settings, SourceTap, Statistics, Trainer, Vectors, Wiring, init,
};

/// Bytes of a shard over all taps: within what a harvest makes of itself.
const SHARD_BYTES: usize = 128 << 20;
/// So small that L0 stays where it is from round to round.
const LR: f64 = 1e-6;

/// Shards in memory, which cost nothing to read: disks and language models give a vector at the same price, of whatever layer.
struct Memory {
    taps: Vec<SourceTap>,
    shards: Vec<Vec<Vectors>>,
    provenance: Value,
}

impl Memory {
    /// Two shards of normal vectors, those of each tap of another length.
    fn new(n_taps: usize, d: usize) -> Self {
        let rows = (SHARD_BYTES / (4 * d * n_taps)).max(1);
        let vectors = |shard: usize| {
            let tap = |tap: usize| {
                let (mut noise, scale) = (Noise((shard * n_taps + tap) as u64), 1.0 + tap as f32);
                Arc::new((0..rows * d).map(|_| scale * noise.next()).collect::<Vec<f32>>())
            };
            (0..n_taps).into_par_iter().map(tap).collect::<Vec<Vectors>>()
        };
        let point = |layer| SourceTap { point: Some(TapPoint::new(Site::Resid, layer)), width: d };
        Self {
            taps: (0..n_taps).map(point).collect(),
            shards: (0..2).map(vectors).collect(),
            provenance: json!({}),
        }
    }
}

impl ActivationSource for Memory {
    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }
    fn n_vectors(&self) -> u64 {
        self.shards.iter().map(|shard| (shard[0].len() / self.taps[0].width) as u64).sum()
    }
    fn n_shards(&self) -> usize {
        self.shards.len()
    }
    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        Ok(taps.iter().map(|&tap| Arc::clone(&self.shards[shard][tap])).collect())
    }
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        Statistics::of(&self.shards[0][tap], self.taps[tap].width, |_| true)
    }
    fn held_out(&self, taps: &[usize], _: usize) -> Result<Vec<Vec<f32>>> {
        Ok(vec![Vec::new(); taps.len()])
    }
    fn provenance(&self) -> &Value {
        &self.provenance
    }
    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

/// What is trained in a bench.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Width of the vectors.
    pub d: usize,
    /// Latents.
    pub n_latents: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Active latents of a row.
    pub l0: usize,
}

/// One autoencoder in training.
struct One {
    trainer: Trainer,
    shards: Shards,
    batches: Batches,
    pairs: Pairs,
    batch: usize,
    l0_by_layer: bool,
    sparsity: Sparsity,
}

impl One {
    fn new(source: &Arc<dyn ActivationSource>, config: &TrainConfig) -> Result<Self> {
        let wiring = Wiring::of(config, &**source)?;
        let rows = init::sample_rows(wiring.inputs.len());
        let scaling = Scaling::measure(&**source, &wiring, config.max_norm, config.normalise)?;
        let mut shards = Shards::new(source, std::slice::from_ref(&wiring), 0);
        let mut batches = Batches::new(wiring, scaling.clone(), Position::default(), u64::MAX);
        let mut pairs = Pairs::default();
        batches.fill(&mut shards, rows, &mut pairs)?;
        let trainer = Trainer::new(init::params(config, &scaling, &pairs)?, false);
        let sparsity = match config.target_l0 {
            Some(target) => Sparsity::TargetL0 { lambda: config.target_weight, target },
            None => Sparsity::None,
        };
        let l0_by_layer = config.thresholds == Thresholds::PerLayer;
        Ok(Self { trainer, shards, batches, pairs, batch: config.batch, l0_by_layer, sparsity })
    }

    /// Seconds of a batch and its step, and its L0.
    fn step(&mut self) -> Result<(f64, f64)> {
        let started = Instant::now();
        self.batches.fill(&mut self.shards, self.batch, &mut self.pairs)?;
        self.shards.forget_before(self.batches.position());
        let layers = if self.l0_by_layer { self.pairs.inputs.clone() } else { Vec::new() };
        let objective = Objective {
            examples: Examples { layers, ..Examples::default() },
            l0_by_layer: self.l0_by_layer,
            ..Objective::plain(self.sparsity)
        };
        let betas = Betas { first: 0.0, second: 0.999, eps: 1e-8 };
        let settings = Settings { lr: LR, own_lr: LR, betas, objective: &objective };
        let x = Rows::new(&self.pairs.x, self.trainer.params.d_in)?;
        let forward = self.trainer.forward(x, x, &objective)?;
        self.trainer.update(&forward, &settings)?;
        black_box(forward.fired(&self.trainer.params));
        Ok((started.elapsed().as_secs_f64(), forward.losses().l0))
    }
}

/// A single-layer autoencoder, and multi-layer ones of the same shape.
pub struct MlsaeStepBench {
    all: Vec<(&'static str, One)>,
}

/// The best round of an autoencoder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MlsaeStepRound {
    /// Which autoencoder.
    pub name: &'static str,
    /// Seconds of a batch and its step, in its best round.
    pub seconds: f64,
    /// Active latents of a row.
    pub l0: f64,
}

impl MlsaeStepBench {
    /// For `n_layers` layers.
    ///
    /// # Errors
    /// If there are fewer than two layers, or a size is zero.
    pub fn new(n_layers: usize, shape: Shape) -> Result<Self> {
        let Shape { d, n_latents, batch, l0 } = shape;
        ensure!(n_layers > 1 && d > 1 && batch > 0 && (1..n_latents).contains(&l0), "nothing to compare");
        let config = TrainConfig {
            width: n_latents,
            batch,
            target_l0: Some(l0 as f64),
            init_l0: l0 as f64,
            ..TrainConfig::default()
        };
        let layers = Some(Layers::All(AllLayers::All));
        let multi = TrainConfig { layers: layers.clone(), ..config.clone() };
        let own = TrainConfig { thresholds: Thresholds::PerLayer, ..multi.clone() };
        let topk = |config: &TrainConfig| TrainConfig {
            activation: LatentFunction::TopK,
            k: l0,
            target_l0: None,
            ..config.clone()
        };
        let single: Arc<dyn ActivationSource> = Arc::new(Memory::new(1, d));
        let several: Arc<dyn ActivationSource> = Arc::new(Memory::new(n_layers, d));
        let all = [
            ("single", &single, &config),
            ("mlsae", &several, &multi),
            ("mlsae-per-layer", &several, &own),
            ("single-topk", &single, &topk(&config)),
            ("mlsae-topk", &several, &topk(&multi)),
        ];
        let all = all.map(|(name, source, config)| Ok((name, One::new(source, config)?)));
        Ok(Self { all: all.into_iter().collect::<Result<_>>()? })
    }

    /// So many rounds of one step of each, in turn; the best of each.
    ///
    /// # Errors
    /// If a step fails.
    pub fn rounds(&mut self, n_rounds: usize) -> Result<Vec<MlsaeStepRound>> {
        let mut best: Vec<MlsaeStepRound> = self
            .all
            .iter()
            .map(|(name, _)| MlsaeStepRound { name, seconds: f64::INFINITY, l0: 0.0 })
            .collect();
        for _ in 0..n_rounds {
            for ((_, one), best) in self.all.iter_mut().zip(&mut best) {
                let (seconds, l0) = one.step()?;
                (best.seconds, best.l0) = (best.seconds.min(seconds), l0);
            }
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_the_l0_asked_for() {
        let shape = Shape { d: 16, n_latents: 256, batch: 128, l0: 12 };
        let rounds = MlsaeStepBench::new(3, shape).unwrap().rounds(2).unwrap();
        assert_eq!(rounds.len(), 5);
        for round in rounds {
            assert!(round.seconds > 0.0 && (round.l0 - 12.0).abs() < 2.5, "{round:?}");
        }
        assert!(MlsaeStepBench::new(1, shape).is_err());
    }
}
