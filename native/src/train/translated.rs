//! A source behind a lens: vectors of every layer as its map makes them.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shared::Rows;
use shared::format::SaeMetadata;
use shared::format::tuned_lens::{self, Lens};
use shared::lens::Translator;
use shared::tap::Site;

use super::source::{ActivationSource, SourceTap, Statistics, Vectors};
use crate::files::sha256;
use crate::lens;

/// A source whose vectors of the residual stream are translated.
pub struct Translated {
    source: Arc<dyn ActivationSource>,
    /// One a tap.
    maps: Vec<Arc<Translator>>,
    provenance: Value,
}

impl Translated {
    /// `source` behind `lens`, whose maps are those of layers 0, 1 and so on.
    ///
    /// # Errors
    /// If a tap is not of the residual stream, the lens has no map for it, or one of another width.
    pub fn new(source: Arc<dyn ActivationSource>, lens: &Lens) -> Result<Self> {
        let map = |tap: &SourceTap| {
            let point = tap.point.filter(|point| point.site == Site::Resid);
            let point = point.context("a lens translates layers of the residual stream, and nothing else")?;
            let map = lens.get(point.layer);
            let map = map.with_context(|| format!("the lens has {} maps, none for {point}", lens.len()))?;
            ensure!(
                map.width() == tap.width,
                "the lens is of vectors of {} values, {point} has {}",
                map.width(),
                tap.width
            );
            Ok(Arc::clone(map))
        };
        let maps = source.taps().iter().map(map).collect::<Result<_>>()?;
        let mut provenance = source.provenance().clone();
        provenance["lens_sha256"] = json!(sha256(&tuned_lens::write(lens)?));
        Ok(Self { source, maps, provenance })
    }

    fn translate(&self, tap: usize, vectors: &[f32]) -> Result<Vec<f32>> {
        let rows = Rows::new(vectors, self.source.taps()[tap].width)?;
        Ok(lens::forward(Some(&self.maps[tap]), rows)?.into_owned())
    }
}

impl ActivationSource for Translated {
    fn taps(&self) -> &[SourceTap] {
        self.source.taps()
    }

    fn n_vectors(&self) -> u64 {
        self.source.n_vectors()
    }

    fn n_shards(&self) -> usize {
        self.source.n_shards()
    }

    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        let raw = self.source.read(shard, taps)?;
        taps.iter().zip(raw).map(|(&tap, raw)| Ok(Arc::new(self.translate(tap, &raw)?))).collect()
    }

    fn statistics(&self, tap: usize) -> Result<Statistics> {
        let vectors = self.read(0, &[tap])?;
        let vectors = vectors.first().context("the first shard was not read")?;
        Statistics::of(vectors, self.taps()[tap].width, |_| true)
    }

    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
        let raw = self.source.held_out(taps, limit)?;
        taps.iter().zip(raw).map(|(&tap, raw)| self.translate(tap, &raw)).collect()
    }

    fn maker(&self) -> &'static str {
        self.source.maker()
    }

    fn provenance(&self) -> &Value {
        &self.provenance
    }

    fn metadata(&self) -> SaeMetadata {
        self.source.metadata()
    }

    fn translator(&self, tap: usize) -> Option<Arc<Translator>> {
        self.maps.get(tap).cloned()
    }
}
