//! Where activation vectors come from: a store's tap, or one safetensors file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use shared::format::SaeMetadata;
use shared::tap::TapPoint;

use crate::files::{sha256, sha256_file};
use crate::store::{MANIFEST, Split, Store};

/// Shards of raw activation vectors, with what training needs to know of them as a whole.
pub trait ActivationSource {
    /// Values of a vector.
    fn width(&self) -> usize;
    /// The scalar C with C² = mean ‖x‖².
    fn scale(&self) -> f64;
    /// The mean vector `[width]`.
    fn mean(&self) -> &[f32];
    /// Training vectors in all.
    fn n_vectors(&self) -> u64;
    /// Training shards.
    fn n_shards(&self) -> usize;
    /// The raw vectors of one training shard, row-major.
    ///
    /// # Errors
    /// If the shard is missing, damaged or of another shape.
    fn read(&self, shard: usize) -> Result<Vec<f32>>;
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
    scale: f64,
    mean: Vec<f32>,
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
        let manifest = sha256_file(&folder.join(MANIFEST))?;
        let mean = store.mean(point)?;
        let provenance = json!({ "store_manifest_sha256": manifest, "tap": point.to_string() });
        Ok(Self { store, point, width, scale, mean, provenance })
    }
}

impl ActivationSource for StoreTap {
    fn width(&self) -> usize {
        self.width
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn mean(&self) -> &[f32] {
        &self.mean
    }

    fn n_vectors(&self) -> u64 {
        self.store.n_vectors(Split::Train)
    }

    fn n_shards(&self) -> usize {
        self.store.n_shards(Split::Train)
    }

    fn read(&self, shard: usize) -> Result<Vec<f32>> {
        Ok(self.store.read_shard(self.point, Split::Train, shard)?.vectors)
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

/// Vectors of one safetensors file: tensor `x [n, width]` in f32, and optionally `held_out [m, width]`.
#[derive(Debug)]
pub struct VectorsFile {
    path: PathBuf,
    vectors: Vec<f32>,
    held_out: Vec<f32>,
    width: usize,
    scale: f64,
    mean: Vec<f32>,
    provenance: Value,
}

impl VectorsFile {
    /// Reads the file; C and the mean are taken over `x`.
    ///
    /// # Errors
    /// If the file is not safetensors, or the tensors are missing, not f32, not matrices of one width, empty,
    /// or hold a value that is not finite.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes)
            .with_context(|| format!("{} is not a safetensors file", path.display()))?;
        let (vectors, width) = matrix(&file, "x").with_context(|| path.display().to_string())?;
        let mut held_out = Vec::new();
        if file.names().contains(&"held_out") {
            let (rows, held_width) = matrix(&file, "held_out").with_context(|| path.display().to_string())?;
            ensure!(held_width == width, "{}: held_out is {held_width} wide, x {width}", path.display());
            held_out = rows;
        }
        let mut mean = vec![0.0f64; width];
        let mut squares = 0.0f64;
        for row in vectors.chunks_exact(width) {
            for (mean, &v) in mean.iter_mut().zip(row) {
                *mean += f64::from(v);
                squares += f64::from(v) * f64::from(v);
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = (vectors.len() / width) as f64;
        let scale = (squares / n).sqrt();
        ensure!(scale > 0.0, "{}: every vector of x is zero", path.display());
        #[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
        let mean = mean.into_iter().map(|m| (m / n) as f32).collect();
        let provenance = json!({ "vectors_sha256": sha256(&bytes) });
        Ok(Self { path: path.to_owned(), vectors, held_out, width, scale, mean, provenance })
    }
}

impl ActivationSource for VectorsFile {
    fn width(&self) -> usize {
        self.width
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn mean(&self) -> &[f32] {
        &self.mean
    }

    fn n_vectors(&self) -> u64 {
        (self.vectors.len() / self.width) as u64
    }

    fn n_shards(&self) -> usize {
        1
    }

    fn read(&self, shard: usize) -> Result<Vec<f32>> {
        ensure!(shard == 0, "{} is one shard, not {}", self.path.display(), shard + 1);
        Ok(self.vectors.clone())
    }

    fn held_out(&self, limit: usize) -> Result<Vec<f32>> {
        Ok(self.held_out[..self.held_out.len().min(limit * self.width)].to_vec())
    }

    fn provenance(&self) -> &Value {
        &self.provenance
    }

    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

fn matrix(file: &SafeTensors<'_>, name: &str) -> Result<(Vec<f32>, usize)> {
    let tensor = file.tensor(name).with_context(|| format!("has no tensor `{name}`"))?;
    ensure!(tensor.dtype() == Dtype::F32, "tensor `{name}` is {:?}, expected F32", tensor.dtype());
    let &[n, width] = tensor.shape() else {
        anyhow::bail!("tensor `{name}` has shape {:?}, expected [n, width]", tensor.shape());
    };
    ensure!(n > 0 && width > 0, "tensor `{name}` has shape [{n}, {width}], which holds nothing");
    let values: Vec<f32> =
        tensor.data().chunks_exact(size_of::<f32>()).map(bytemuck::pod_read_unaligned).collect();
    let finite = values.iter().position(|v| !v.is_finite());
    ensure!(finite.is_none(), "tensor `{name}` holds {} at {finite:?}", values[finite.unwrap_or(0)]);
    Ok((values, width))
}
