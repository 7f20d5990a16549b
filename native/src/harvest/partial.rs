//! What an unfinished harvest knows: everything decided before the model runs, and the buckets finished so far.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use shared::config::harvest::HarvestConfig;
use shared::tap::TapPoint;

use super::PARTIAL_MANIFEST;
use super::bucket::Moments;
use crate::files;
use crate::model::ModelProvenance;
use crate::store::manifest::{
    Dropped, FORMAT, FileInfo, ShardInfo, SplitInfo, TapInfo, TextCounts, TextFile, TokenizerInfo, VERSION,
};
use crate::store::tensors::{self, TensorHeader};
use crate::store::{self, Manifest, Tokens};

/// The state of one half.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Half {
    pub(super) n_sequences: usize,
    pub(super) tokens: FileInfo,
    /// The shards of each finished bucket.
    pub(super) buckets: Vec<Vec<ShardInfo>>,
}

impl Half {
    pub(super) fn n_shards(&self) -> usize {
        self.buckets.iter().map(Vec::len).sum()
    }
}

/// `manifest.partial.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Partial {
    pub(super) version: u32,
    pub(super) config: HarvestConfig,
    pub(super) model: ModelProvenance,
    pub(super) n_layers: usize,
    pub(super) d_model: usize,
    pub(super) tokenizer: TokenizerInfo,
    pub(super) taps: Vec<(TapPoint, usize)>,
    pub(super) text: Vec<TextFile>,
    pub(super) text_counts: TextCounts,
    /// Training and held-out.
    pub(super) halves: [Half; 2],
}

impl Partial {
    /// Reads the state of an unfinished harvest, if there is one.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(PARTIAL_MANIFEST);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let partial: Self =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is broken", path.display()))?;
        ensure!(
            partial.version == VERSION,
            "{} is of version {}, expected {VERSION}",
            path.display(),
            partial.version
        );
        Ok(Some(partial))
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        files::write_bytes(&folder.join(PARTIAL_MANIFEST), &serde_json::to_vec_pretty(self)?)
    }

    pub(super) fn dropped(&self) -> Dropped {
        dropped(&self.config)
    }

    /// Writes the mean vectors, then the manifest, last: its presence makes the store.
    pub(super) fn finish(&self, folder: &Path, moments: &[Moments]) -> Result<Manifest> {
        let n_train: u64 = self.halves[0].buckets.iter().flatten().map(|s| s.n_vectors).sum();
        ensure!(
            n_train > 0,
            "no training vector is left after special tokens and drop_positions are dropped"
        );
        let mut taps = Vec::new();
        for (&(point, width), moments) in self.taps.iter().zip(moments) {
            let scale = (moments.squares / n_train as f64).sqrt();
            if !(scale.is_finite() && scale > 0.0) {
                bail!(
                    "the training vectors at {point} have root mean squared norm {scale}: nothing can be learnt from them"
                );
            }
            let mean: Vec<u8> =
                moments.sum.iter().flat_map(|sum| ((sum / n_train as f64) as f32).to_le_bytes()).collect();
            let header =
                TensorHeader { name: "mean", dtype: "F32", shape: &[width], bytes: mean.len() as u64 };
            let mean =
                tensors::write(&store::mean_path(folder, point), &[header], |out| out.write_all(&mean))?;
            taps.push(TapInfo { point, width, scale, mean });
        }
        let [train, held_out] = self.halves.clone().map(|half| {
            let shards: Vec<_> = half.buckets.into_iter().flatten().collect();
            SplitInfo {
                n_sequences: half.n_sequences as u64,
                n_vectors: shards.iter().map(|s| s.n_vectors).sum(),
                tokens: half.tokens,
                shards,
            }
        });
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            writer: concat!("stratascope ", env!("CARGO_PKG_VERSION")).to_owned(),
            model: self.model.clone(),
            n_layers: self.n_layers,
            d_model: self.d_model,
            tokenizer: self.tokenizer.clone(),
            sequence_length: self.config.sequence_length,
            dropped: self.dropped(),
            dtype: self.config.dtype,
            bucket_vectors: self.config.bucket_rows(),
            seed: self.config.seed,
            taps,
            train,
            held_out,
            text: self.text.clone(),
            text_counts: self.text_counts,
        };
        manifest.check().context("the harvest made a manifest that contradicts itself")?;
        files::write_bytes(&folder.join(store::MANIFEST), &serde_json::to_vec_pretty(&manifest)?)?;
        Ok(manifest)
    }
}

/// What `config` leaves out, in the manifest's form; its positions have been checked.
pub(super) fn dropped(config: &HarvestConfig) -> Dropped {
    let positions = config.dropped_positions().unwrap_or_default();
    Dropped { special_tokens: config.drops_special(), positions }
}

/// Writes the tokens of a half.
pub(super) fn write_tokens(path: &Path, tokens: &Tokens) -> Result<FileInfo> {
    let shape = [tokens.n_sequences(), tokens.sequence_length];
    let header =
        TensorHeader { name: "ids", dtype: "U32", shape: &shape, bytes: tokens.ids.len() as u64 * 4 };
    tensors::write(path, &[header], |out| {
        tokens.ids.iter().try_for_each(|id| out.write_all(&id.to_le_bytes()))
    })
}

/// The keys in which two configurations differ.
pub(super) fn differing_keys(a: &HarvestConfig, b: &HarvestConfig) -> Result<Vec<String>> {
    let (a, b) = (toml::Table::try_from(a)?, toml::Table::try_from(b)?);
    Ok(a.iter().filter(|(key, value)| b.get(*key) != Some(value)).map(|(key, _)| key.clone()).collect())
}
