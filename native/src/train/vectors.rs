//! Vectors of one safetensors file, held in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use shared::format::SaeMetadata;

use super::source::{ActivationSource, SourceTap, Statistics, Vectors};
use crate::files::sha256;

/// Vectors of one safetensors file: tensor `x [n, width]` in f32, and optionally `held_out [m, width]`.
#[derive(Debug)]
pub struct VectorsFile {
    path: PathBuf,
    vectors: Vectors,
    held_out: Vec<f32>,
    tap: [SourceTap; 1],
    statistics: Statistics,
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
        let statistics =
            Statistics::of(&vectors, width, |_| true).with_context(|| path.display().to_string())?;
        let provenance = json!({ "vectors_sha256": sha256(&bytes) });
        Ok(Self {
            path: path.to_owned(),
            vectors: Arc::new(vectors),
            held_out,
            tap: [SourceTap { point: None, width }],
            statistics,
            provenance,
        })
    }
}

impl ActivationSource for VectorsFile {
    fn taps(&self) -> &[SourceTap] {
        &self.tap
    }

    fn n_vectors(&self) -> u64 {
        (self.vectors.len() / self.tap[0].width) as u64
    }

    fn n_shards(&self) -> usize {
        1
    }

    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        ensure!(shard == 0, "{} is one shard, not {}", self.path.display(), shard + 1);
        Ok(taps.iter().map(|_| Arc::clone(&self.vectors)).collect())
    }

    fn statistics(&self, _tap: usize) -> Result<Statistics> {
        Ok(self.statistics.clone())
    }

    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
        let kept = &self.held_out[..self.held_out.len().min(limit * self.tap[0].width)];
        Ok(taps.iter().map(|_| kept.to_vec()).collect())
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
