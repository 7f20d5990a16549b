//! Where activation vectors come from: the seam, its statistics, and the tap of a store.
//!
//! [`super::vectors`] is one safetensors file, [`super::live`] a language model.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use shared::format::SaeMetadata;
use shared::tap::TapPoint;

use crate::store::{Split, Store};

/// Length and mean of raw vectors as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// The scalar C with C² = mean ‖x‖².
    pub scale: f64,
    /// The mean vector `[width]`.
    pub mean: Vec<f64>,
}

impl Statistics {
    /// The statistics of those rows of `vectors` that `keeps` lets through.
    ///
    /// # Errors
    /// If no row is left, or none that is not zero.
    pub fn of(vectors: &[f32], width: usize, keeps: impl Fn(&[f32]) -> bool) -> Result<Self> {
        let (mut mean, mut squares, mut n) = (vec![0.0f64; width], 0.0f64, 0.0f64);
        for row in vectors.chunks_exact(width).filter(|row| keeps(row)) {
            for (mean, &v) in mean.iter_mut().zip(row) {
                *mean += f64::from(v);
                squares += f64::from(v) * f64::from(v);
            }
            n += 1.0;
        }
        let scale = (squares / n).sqrt();
        ensure!(
            scale > 0.0 && scale.is_finite(),
            "{n} vectors of root mean squared norm {scale} teach nothing"
        );
        mean.iter_mut().for_each(|mean| *mean /= n);
        Ok(Self { scale, mean })
    }
}

/// Shards of raw activation vectors, with what training needs to know of them as a whole. Several threads may read.
pub trait ActivationSource: Send + Sync {
    /// Values of a vector.
    fn width(&self) -> usize;
    /// Training vectors in all.
    fn n_vectors(&self) -> u64;
    /// Training shards.
    fn n_shards(&self) -> usize;
    /// The raw vectors of one training shard, row-major.
    ///
    /// # Errors
    /// If the shard is missing, damaged or of another shape, or cannot be made.
    fn read(&self, shard: usize) -> Result<Arc<Vec<f32>>>;
    /// The statistics of all training vectors, as far as they are known without reading more than one shard.
    ///
    /// # Errors
    /// As [`ActivationSource::read`].
    fn statistics(&self) -> Result<Statistics>;
    /// Raw vectors that are never trained on, at most `limit` of them; empty when there are none.
    ///
    /// # Errors
    /// As [`ActivationSource::read`].
    fn held_out(&self, limit: usize) -> Result<Vec<f32>>;
    /// What identifies these vectors: for provenance, and to refuse resuming on others.
    fn provenance(&self) -> &Value;
    /// What the weights should say about the data they read.
    fn metadata(&self) -> SaeMetadata;
}

/// One tap of a [`Store`].
#[derive(Debug)]
pub struct StoreTap {
    store: Store,
    point: TapPoint,
    width: usize,
    statistics: Statistics,
    provenance: Value,
}

impl StoreTap {
    /// Opens tap `point` of the store in `folder`; without a point, the only tap there is.
    ///
    /// # Errors
    /// If there is no store, or it does not hold the tap.
    pub fn open(folder: &Path, point: Option<TapPoint>) -> Result<Self> {
        let store = Store::open(folder)?;
        let point = match (point, &store.manifest().taps[..]) {
            (Some(point), _) => point,
            (None, [only]) => only.point,
            (None, taps) => {
                let names: Vec<String> = taps.iter().map(|t| t.point.to_string()).collect();
                anyhow::bail!(
                    "{} holds several taps; choose with --tap: {}",
                    folder.display(),
                    names.join(", ")
                )
            }
        };
        let tap = store.tap(point)?;
        let (width, scale) = (tap.width, tap.scale);
        ensure!(store.n_vectors(Split::Train) > 0, "{} holds no training vectors", folder.display());
        let mean = store.mean(point)?.into_iter().map(f64::from).collect();
        let provenance =
            json!({ "store_manifest_sha256": store.manifest_sha256(), "tap": point.to_string() });
        Ok(Self { store, point, width, statistics: Statistics { scale, mean }, provenance })
    }
}

impl ActivationSource for StoreTap {
    fn width(&self) -> usize {
        self.width
    }

    fn n_vectors(&self) -> u64 {
        self.store.n_vectors(Split::Train)
    }

    fn n_shards(&self) -> usize {
        self.store.n_shards(Split::Train)
    }

    fn read(&self, shard: usize) -> Result<Arc<Vec<f32>>> {
        Ok(Arc::new(self.store.read_shard(self.point, Split::Train, shard)?.vectors))
    }

    fn statistics(&self) -> Result<Statistics> {
        Ok(self.statistics.clone())
    }

    fn held_out(&self, limit: usize) -> Result<Vec<f32>> {
        let mut vectors = Vec::new();
        for shard in 0..self.store.n_shards(Split::HeldOut) {
            if vectors.len() >= limit * self.width {
                break;
            }
            vectors.extend(self.store.read_shard(self.point, Split::HeldOut, shard)?.vectors);
        }
        vectors.truncate(limit * self.width);
        Ok(vectors)
    }

    fn provenance(&self) -> &Value {
        &self.provenance
    }

    fn metadata(&self) -> SaeMetadata {
        let manifest = self.store.manifest();
        SaeMetadata {
            model_name: Some(manifest.model.name.clone()),
            tap: Some(self.point),
            context_size: Some(manifest.sequence_length),
            prepend_bos: Some(manifest.tokenizer.bos.is_some()),
            ..SaeMetadata::default()
        }
    }
}
