//! Where activation vectors come from: the seam, its statistics, and the taps of a store.
//!
//! [`super::vectors`] is one safetensors file, [`super::live`] a language model.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Value, json};
use shared::config::harvest::StoreDtype;
use shared::config::train::{Layers, TrainConfig};
use shared::format::SaeMetadata;
use shared::lens::Translator;
use shared::tap::{Site, TapPoint};

use crate::store::{Split, Store, decode};

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

/// A tap of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceTap {
    /// Where in the language model; unknown for vectors of a file.
    pub point: Option<TapPoint>,
    /// Values of a vector.
    pub width: usize,
}

/// Raw vectors of one tap, row-major.
pub type Vectors = Arc<Vec<f32>>;

/// Takes the raw vectors of a shard, tap by tap, as a source has them.
pub trait Intake {
    /// Takes the next tap: `bytes` bytes that `fill` writes, values in the source's own type, little-endian.
    ///
    /// # Errors
    /// That of `fill`, or if there is no room.
    fn tap(&mut self, bytes: usize, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()>;
}

/// Shards of raw activation vectors at some taps, with what training needs to know of them as a whole. Row i of a shard
/// belongs to the same token at every tap. Several threads may read.
pub trait ActivationSource: Send + Sync {
    /// What there is; other methods count taps in this order.
    fn taps(&self) -> &[SourceTap];
    /// Training vectors of each tap.
    fn n_vectors(&self) -> u64;
    /// Training shards.
    fn n_shards(&self) -> usize;
    /// The raw vectors of one training shard at `taps`.
    ///
    /// # Errors
    /// If the shard is missing, damaged or of another shape, or cannot be made.
    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>>;
    /// The type in which [`ActivationSource::read_raw`] gives values.
    fn element(&self) -> StoreDtype {
        StoreDtype::F32
    }
    /// What [`ActivationSource::read`] reads, in the source's own type, for somebody who wants no f32 of it; taps one after another.
    ///
    /// # Errors
    /// As [`ActivationSource::read`], and `intake`'s.
    fn read_raw(&self, shard: usize, taps: &[usize], intake: &mut dyn Intake) -> Result<()> {
        for vectors in self.read(shard, taps)? {
            hand_over(&vectors, self.element(), intake)?;
        }
        Ok(())
    }
    /// Vectors of the largest training shard, as far as that is known.
    fn largest_shard(&self) -> u64 {
        self.n_vectors().div_ceil(self.n_shards().max(1) as u64)
    }
    /// The statistics of all training vectors at `tap`, as far as they are known without reading more than one shard.
    ///
    /// # Errors
    /// As [`ActivationSource::read`].
    fn statistics(&self, tap: usize) -> Result<Statistics>;
    /// Raw vectors that are never trained on, at most `limit` rows, at each of `taps`; empty when there are none.
    ///
    /// # Errors
    /// As [`ActivationSource::read`].
    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>>;
    /// What training waits for when it waits for these vectors: `IO`, or the language model, `LM`.
    fn maker(&self) -> &'static str {
        "IO"
    }
    /// What identifies these vectors, whatever the tap: for provenance, and to refuse resuming on others. A JSON object.
    fn provenance(&self) -> &Value;
    /// What the weights should say about the data they read, but for the tap.
    fn metadata(&self) -> SaeMetadata;
    /// The map that made the vectors of `tap` from the language model's, where there is one.
    fn translator(&self, tap: usize) -> Option<Arc<Translator>> {
        let _ = tap;
        None
    }
}

/// Values to hand over at a time.
const PIECE: usize = 1 << 16;

/// Hands `vectors`, which `element` holds exactly, to `intake`.
fn hand_over(vectors: &[f32], element: StoreDtype, intake: &mut dyn Intake) -> Result<()> {
    let size = element.size();
    intake.tap(vectors.len() * size, &mut |bytes| {
        bytes.par_chunks_mut(PIECE * size).zip(vectors.par_chunks(PIECE)).try_for_each(|(bytes, values)| {
            encode(element, values, bytes);
            let mut back = vec![0.0f32; values.len()];
            decode(element, bytes, &mut back);
            let same = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
            ensure!(
                back.iter().zip(values).all(same),
                "vectors that {} does not hold",
                element.safetensors_name()
            );
            Ok(())
        })
    })
}

/// Values as type `element`, rounded to nearest.
fn encode(element: StoreDtype, values: &[f32], bytes: &mut [u8]) {
    let sized = values.iter().zip(bytes.chunks_exact_mut(element.size()));
    match element {
        StoreDtype::F32 => sized.for_each(|(value, bytes)| bytes.copy_from_slice(&value.to_le_bytes())),
        StoreDtype::Bf16 => {
            sized.for_each(|(&value, bytes)| bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()));
        }
        StoreDtype::F16 => {
            sized.for_each(|(&value, bytes)| bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()));
        }
    }
}

/// What an autoencoder reads, and what it reconstructs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wiring {
    /// The taps whose vectors are encoded, ascending and of one width; every vector of each is an example.
    pub inputs: Vec<usize>,
    /// The tap that is reconstructed, for a transcoder, which has one input; else the inputs themselves are.
    pub target: Option<usize>,
}

impl Wiring {
    /// The taps that `config` asks for, among those of `source`; without a word the only one.
    ///
    /// # Errors
    /// If the source does not have them, or has several and none is named, or layers are of different widths.
    pub fn of(config: &TrainConfig, source: &dyn ActivationSource) -> Result<Self> {
        let taps = source.taps();
        let names = || {
            let name =
                |t: &SourceTap| t.point.map_or_else(|| "one without a name".to_owned(), |p| p.to_string());
            taps.iter().map(name).collect::<Vec<_>>().join(", ")
        };
        let find = |point: TapPoint| {
            let found = taps.iter().position(|tap| tap.point == Some(point));
            found.with_context(|| format!("the data hold no tap {point}; they hold {}", names()))
        };
        let inputs = match (&config.layers, config.tap, taps) {
            (Some(layers), ..) => layer_points(layers, &config.sites, taps)
                .into_iter()
                .map(find)
                .collect::<Result<BTreeSet<_>>>()?
                .into_iter()
                .collect(),
            (None, Some(point), _) => vec![find(point)?],
            (None, None, [_]) => vec![0],
            (None, None, _) => bail!("the data hold several taps; choose with --tap: {}", names()),
        };
        let first = *inputs.first().with_context(|| {
            let sites: Vec<&str> = config.sites.iter().map(|site| site.name()).collect();
            format!("the data hold no layer of {}; they hold {}", sites.join(", "), names())
        })?;
        let width = taps[first].width;
        ensure!(
            inputs.iter().all(|&tap| taps[tap].width == width),
            "one dictionary needs vectors of one width, but layers of {} differ",
            names()
        );
        let target = config.target.map(find).transpose()?;
        ensure!(target != Some(first), "tap and target are both {}", names());
        Ok(Self { inputs, target })
    }

    /// Its taps, the inputs first.
    #[must_use]
    pub fn taps(&self) -> Vec<usize> {
        self.inputs.iter().copied().chain(self.target).collect()
    }

    /// Widths of inputs and of what is reconstructed.
    #[must_use]
    pub fn widths(&self, source: &dyn ActivationSource) -> [usize; 2] {
        let width = |tap: usize| source.taps()[tap].width;
        let input = self.inputs.first().map_or(0, |&tap| width(tap));
        [input, self.target.map_or(input, width)]
    }

    /// What identifies the vectors.
    #[must_use]
    pub fn provenance(&self, source: &dyn ActivationSource) -> Value {
        let mut all = source.provenance().clone();
        let name = |tap: usize| source.taps()[tap].point.map(|point| json!(point.to_string()));
        let names: Option<Vec<Value>> = self.inputs.iter().map(|&tap| name(tap)).collect();
        match names.as_deref() {
            Some([one]) => all["tap"] = one.clone(),
            Some(several) => all["taps"] = json!(several),
            None => {}
        }
        if let Some(target) = self.target.and_then(name) {
            all["target"] = target;
        }
        all
    }
}

/// The points that `layers` of `sites` are, among `taps`.
fn layer_points(layers: &Layers, sites: &[Site], taps: &[SourceTap]) -> Vec<TapPoint> {
    match layers {
        Layers::Some(layers) => {
            sites.iter().flat_map(|&site| layers.iter().map(move |&layer| TapPoint { site, layer })).collect()
        }
        Layers::All(_) => {
            taps.iter().filter_map(|tap| tap.point).filter(|point| sites.contains(&point.site)).collect()
        }
    }
}

/// The taps of a [`Store`].
#[derive(Debug)]
pub struct StoreTaps {
    store: Store,
    taps: Vec<SourceTap>,
    provenance: Value,
}

impl StoreTaps {
    /// Opens the store at `place`.
    ///
    /// # Errors
    /// If there is no store, or it holds no vectors to train on.
    pub fn open(place: &Path) -> Result<Self> {
        let store = Store::open(place)?;
        ensure!(store.n_vectors(Split::Train) > 0, "{} holds no training vectors", place.display());
        let tap = |tap: &crate::store::TapInfo| SourceTap { point: Some(tap.point), width: tap.width };
        let taps = store.manifest().taps.iter().map(tap).collect();
        let provenance = json!({ "store_manifest_sha256": store.manifest_sha256() });
        Ok(Self { store, taps, provenance })
    }

    fn point(&self, tap: usize) -> TapPoint {
        self.store.manifest().taps[tap].point
    }
}

impl ActivationSource for StoreTaps {
    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }

    fn n_vectors(&self) -> u64 {
        self.store.n_vectors(Split::Train)
    }

    fn n_shards(&self) -> usize {
        self.store.n_shards(Split::Train)
    }

    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        let read = |tap: &usize| self.store.read_shard(self.point(*tap), Split::Train, shard);
        taps.iter().map(|tap| Ok(Arc::new(read(tap)?.vectors))).collect()
    }

    fn element(&self) -> StoreDtype {
        self.store.manifest().dtype
    }

    fn read_raw(&self, shard: usize, taps: &[usize], intake: &mut dyn Intake) -> Result<()> {
        for &tap in taps {
            let point = self.point(tap);
            let bytes = self.store.raw_bytes(point, Split::Train, shard)?;
            intake.tap(bytes, &mut |into| self.store.read_raw(point, Split::Train, shard, into))?;
        }
        Ok(())
    }

    fn largest_shard(&self) -> u64 {
        let shards = &self.store.manifest().split(Split::Train).shards;
        shards.iter().map(|shard| shard.n_vectors).max().unwrap_or(0)
    }

    fn statistics(&self, tap: usize) -> Result<Statistics> {
        let mean = self.store.mean(self.point(tap))?.into_iter().map(f64::from).collect();
        Ok(Statistics { scale: self.store.manifest().taps[tap].scale, mean })
    }

    fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
        let one = |tap: &usize| {
            let (mut vectors, most) = (Vec::new(), limit * self.taps[*tap].width);
            for shard in 0..self.store.n_shards(Split::HeldOut) {
                if vectors.len() >= most {
                    break;
                }
                vectors.extend(self.store.read_shard(self.point(*tap), Split::HeldOut, shard)?.vectors);
            }
            vectors.truncate(most);
            Ok(vectors)
        };
        taps.iter().map(one).collect()
    }

    fn provenance(&self) -> &Value {
        &self.provenance
    }

    fn metadata(&self) -> SaeMetadata {
        let manifest = self.store.manifest();
        SaeMetadata {
            model_name: Some(manifest.model.name.clone()),
            context_size: Some(manifest.sequence_length),
            prepend_bos: Some(manifest.tokenizer.bos.is_some()),
            ..SaeMetadata::default()
        }
    }
}
