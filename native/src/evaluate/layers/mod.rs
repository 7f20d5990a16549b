//! Measuring a multi-layer SAE: every layer's reconstruction, and at which layers its latents are active (arXiv 2409.04185 §4).
//!
//! [`encode`] owns what activation vectors tell, [`splice`] what the language model loses layer by layer, [`prompt`] the latents of
//! one short text; [`report`] prints, [`plots`] draws. The metrics themselves are `shared::metrics`.

pub mod encode;
pub mod plots;
pub mod prompt;
pub mod report;
pub mod splice;

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::lens::Translator;
use shared::metrics::{Decomposition, Fvu, LayerUse, OnToken, profile};
use shared::multi_layer::{Layer, MultiLayer};
use shared::tap::{Site, TapPoint};

use super::{Options, Subject, check_tap};
use crate::cpu::CpuBackend;
use crate::features::geometry;
use crate::input_limit::InputLimit;
use crate::lens;
use crate::model::LoadedModel;
use crate::sae_files::SaeFile;
use crate::stop::StopFlag;
use crate::store::Store;
use encode::Encoded;
use splice::LayerSplice;

/// A latent counts as active at a layer where it was active on at least this share of tokens (10,000 of 10 million, as published).
const ACTIVE_TOKENS: f64 = 1e-3;
/// ... or where at least this share of its activation was.
const ACTIVE_SHARE: f64 = 0.01;

/// Everything measured about one multi-layer SAE, as written to `layers.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayersReport {
    /// Version of this report's fields.
    pub version: u32,
    /// Name of the language model the activations are from.
    pub model: String,
    /// Width of the vectors.
    pub d_in: usize,
    /// Number of latents.
    pub n_latents: usize,
    /// What was asked for.
    pub options: Options,
    /// Held-out tokens, each encoded at every layer.
    pub n_tokens: u64,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// Each layer and the next.
    pub pairs: Vec<PairReport>,
    /// At how many layers latents are active.
    pub spread: Spread,
    /// Of the variance of the layer, each latent and token weighted by its activation; absent when nothing was active.
    pub weighted: Option<Decomposition>,
    /// As the paper's program has it: means over all pairs of latents and tokens, inactive ones included.
    pub published: Option<Decomposition>,
    /// At how many layers latents are active on a token; absent when nothing was active.
    #[serde(default)]
    pub on_token: Option<OnToken>,
    /// Mean over latents of the largest cosine between their direction and another's.
    pub mmcs: f64,
    /// Pearson's correlation, over neighbouring layers, of centred cosine and of latents in common on a token.
    pub cosine_overlap_correlation: Option<f64>,
}

/// One layer of a [`LayersReport`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerReport {
    /// Where.
    pub tap: TapPoint,
    /// What raw vectors are divided by.
    pub scale: f64,
    /// Vectors behind `l0` and `fvu`.
    pub n_vectors: u64,
    /// Vectors left out because none so long was trained on.
    pub n_outliers: u64,
    /// Mean number of active latents a vector.
    pub l0: f64,
    /// Fraction of variance unexplained; absent when the vectors do not vary.
    pub fvu: Option<f64>,
    /// The same of translated vectors, before the lens is undone (as published); absent without a lens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fvu_translated: Option<f64>,
    /// Share of latents never active at this layer.
    pub dead_share: f64,
    /// Spliced into the language model at this layer alone; absent when no model was given.
    pub splice: Option<LayerSplice>,
}

/// A layer and the next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairReport {
    /// The lower layer.
    pub from: TapPoint,
    /// The upper one.
    pub to: TapPoint,
    /// Mean cosine of the vectors of a token.
    pub cosine: Option<f64>,
    /// The same, less each layer's mean vector.
    pub centred_cosine: Option<f64>,
    /// Of latents active at either on a token, the share active at both.
    pub token_overlap: Option<f64>,
    /// How much of their activation goes to the same latents over all tokens.
    pub shared_use: Option<f64>,
}

/// At how many layers latents are active; means over latents that were active at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Latents that were active at all.
    pub n_alive: usize,
    /// Share of latents never active at any layer.
    pub dead_share: f64,
    /// Weighing layers by activation.
    pub by_activation: SpreadMeans,
    /// Weighing layers by how often a latent was active.
    pub by_count: SpreadMeans,
    /// Layers with activity on at least one token in a thousand.
    pub layers_by_count: f64,
    /// Layers with at least one per cent of a latent's activation.
    pub layers_by_share: f64,
}

/// Means over latents of the profile over layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpreadMeans {
    /// Of the standard deviation of the layer.
    pub deviation: f64,
    /// The same in layers of the model: divided by their number.
    pub relative_deviation: f64,
    /// Of the entropy, in nats.
    pub entropy: f64,
    /// The same as a share of the largest possible, ln L.
    pub relative_entropy: f64,
}

/// A report, and what its plots and files need beside it.
#[derive(Debug)]
pub struct Measured {
    /// The figures.
    pub report: LayersReport,
    /// Where latents were active.
    pub layer_use: LayerUse,
}

/// A multi-layer SAE and the taps of a store it reads.
#[derive(Debug)]
pub struct Dictionary<'a> {
    file: &'a SaeFile,
    layers: MultiLayer,
}

impl<'a> Dictionary<'a> {
    /// The dictionary of `file`: on the layers it names, else, where its rows are scaled one by one, on all those of the
    /// residual stream that `store` holds.
    ///
    /// # Errors
    /// If it is of one layer, or the store lacks one of its layers.
    pub fn new(file: &'a SaeFile, store: &Store) -> Result<Self> {
        let layers = layers_of(file, store)?;
        let width = file.sae.dims().d_in;
        layers.layers.iter().try_for_each(|layer| check_tap(store, layer.tap, width, "reads"))?;
        Ok(Self { file, layers })
    }

    /// Its layers.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers.layers
    }

    /// Number of latents.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.file.sae.dims().n_latents
    }

    /// The autoencoder of layer number `layer`, and the map before it.
    fn at(&self, layer: usize) -> Result<AtLayer> {
        let tap = self.layers.layers[layer].tap;
        let limit = InputLimit::new(self.layers.layers[layer].max_input_norm);
        let backend = CpuBackend::new(self.layers.of_translated(&self.file.sae, layer)?);
        let lens = self.layers.translator(layer).cloned();
        Ok(AtLayer { subject: Subject { backend, limit, input: tap, output: tap }, lens })
    }
}

/// The layers of `file`'s dictionary: those it names, else, where its rows are scaled one by one, all of the residual stream that
/// `store` holds.
///
/// # Errors
/// If it is of one layer, or the store holds none.
pub fn layers_of(file: &SaeFile, store: &Store) -> Result<MultiLayer> {
    let taps = &store.manifest().taps;
    let layers = match (&file.metadata.layers, file.metadata.tap) {
        (Some(layers), _) => layers.clone(),
        (None, Some(tap)) => anyhow::bail!(
            "the autoencoder is of one layer, {tap}; `eval` without --layers measures it, as does --layers beside one of several"
        ),
        (None, None) => {
            let points = taps.iter().map(|tap| tap.point).filter(|point| point.site == Site::Resid);
            MultiLayer::new(points.map(Layer::of_raw).collect(), Vec::new())
        }
    };
    ensure!(!layers.layers.is_empty(), "the store holds no layer of the residual stream");
    Ok(layers)
}

/// The autoencoder of one layer, behind the map of a lens where there is one.
#[derive(Debug)]
struct AtLayer {
    /// Of translated vectors.
    subject: Subject,
    lens: Option<Arc<Translator>>,
}

impl AtLayer {
    /// What the autoencoder reads of raw vectors.
    fn read<'x>(&self, raw: Rows<'x>) -> Result<Cow<'x, [f32]>> {
        lens::forward(self.lens.as_deref(), raw)
    }

    /// Raw vectors of what the autoencoder writes.
    fn write(&self, reconstruction: Vec<f32>) -> Result<Vec<f32>> {
        lens::backward(self.lens.as_deref(), reconstruction)
    }
}

/// Measures the multi-layer SAE of `file` on the held-out part of `store`, and in `model` when there is one.
///
/// # Errors
/// If the store cannot be read, does not fit autoencoder and model, or holds too little.
pub fn evaluate(
    file: &SaeFile,
    store: &Store,
    model: Option<&LoadedModel>,
    options: &Options,
    stop: &StopFlag,
) -> Result<Measured> {
    let dictionary = Dictionary::new(file, store)?;
    let encoded = encode::held_out(&dictionary, store, stop)?;
    let splices = match model {
        Some(model) => {
            let splices = splice::all(&dictionary, store, model, options, stop)?;
            splices.into_iter().map(Some).collect()
        }
        None => vec![None; dictionary.layers().len()],
    };
    let report = report(&dictionary, store, options, &encoded, splices)?;
    Ok(Measured { report, layer_use: encoded.layer_use })
}

/// Where the latents of `file`'s multi-layer SAE are active on `text`, special tokens left out.
///
/// # Errors
/// If the store does not fit the autoencoder, or the model does not take the text.
pub fn prompt_use(file: &SaeFile, store: &Store, model: &LoadedModel, text: &str) -> Result<LayerUse> {
    prompt::layer_use(&Dictionary::new(file, store)?, model, text)
}

fn report(
    dictionary: &Dictionary<'_>,
    store: &Store,
    options: &Options,
    encoded: &Encoded,
    splices: Vec<Option<LayerSplice>>,
) -> Result<LayersReport> {
    let layer_use = &encoded.layer_use;
    let nothing = "no held-out vectors were measured";
    let mut layers = Vec::new();
    for (number, ((layer, met), splice)) in
        dictionary.layers().iter().zip(&encoded.layers).zip(splices).enumerate()
    {
        layers.push(LayerReport {
            tap: layer.tap,
            scale: layer.scale,
            n_vectors: met.fvu.n_rows(),
            n_outliers: met.n_outliers,
            l0: met.l0.mean().with_context(|| format!("{}: {nothing}", layer.tap))?,
            fvu: met.fvu.value(),
            fvu_translated: met.fvu_translated.as_ref().and_then(Fvu::value),
            dead_share: layer_use.dead(Some(number)).context(nothing)?,
            splice,
        });
    }
    let pairs: Vec<PairReport> = (0..encoded.cosines.len())
        .map(|pair| PairReport {
            from: dictionary.layers()[pair].tap,
            to: dictionary.layers()[pair + 1].tap,
            cosine: encoded.cosines[pair].raw(),
            centred_cosine: encoded.cosines[pair].centred(),
            token_overlap: encoded.overlap.value(pair),
            shared_use: layer_use.shared_use(pair, pair + 1),
        })
        .collect();
    let both: Vec<(f64, f64)> =
        pairs.iter().filter_map(|pair| pair.centred_cosine.zip(pair.token_overlap)).collect();
    let nearest = geometry::neighbours(&dictionary.file.sae, 1)?;
    let cosines = nearest.iter().filter_map(|near| near.first()).map(|&(_, cosine)| f64::from(cosine));
    Ok(LayersReport {
        version: 1,
        model: store.manifest().model.name.clone(),
        d_in: dictionary.file.sae.dims().d_in,
        n_latents: dictionary.n_latents(),
        options: options.clone(),
        n_tokens: layer_use.n_rows(),
        layers,
        pairs,
        spread: spread(layer_use),
        weighted: encoded.variance.weighted(layer_use),
        published: encoded.variance.published(),
        on_token: encoded.variance.on_token(),
        mmcs: mean(cosines),
        cosine_overlap_correlation: correlation(&both),
    })
}

fn spread(layer_use: &LayerUse) -> Spread {
    let n = layer_use.n_latents();
    let alive: Vec<usize> = (0..n).filter(|&latent| layer_use.by_count(latent).is_some()).collect();
    #[expect(clippy::cast_precision_loss, reason = "layers and tokens are far below 2^53")]
    let (n_layers, n_tokens) = (layer_use.n_layers() as f64, layer_use.n_rows() as f64);
    let means = |shares: &dyn Fn(usize) -> Option<Vec<f64>>| {
        let profiles: Vec<_> =
            alive.iter().filter_map(|&latent| shares(latent)).map(|p| profile(&p)).collect();
        let deviation = mean(profiles.iter().map(|profile| profile.deviation));
        let entropy = mean(profiles.iter().map(|profile| profile.entropy));
        SpreadMeans {
            deviation,
            relative_deviation: deviation / n_layers,
            entropy,
            relative_entropy: if n_layers > 1.0 { entropy / n_layers.ln() } else { 0.0 },
        }
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
    let least = (ACTIVE_TOKENS * n_tokens).ceil() as u64;
    #[expect(clippy::cast_precision_loss, reason = "layers are few")]
    let mean_of = |count: &dyn Fn(usize) -> usize| mean(alive.iter().map(|&latent| count(latent) as f64));
    Spread {
        n_alive: alive.len(),
        dead_share: layer_use.dead(None).unwrap_or(0.0),
        by_activation: means(&|latent| layer_use.by_activation(latent)),
        by_count: means(&|latent| layer_use.by_count(latent)),
        layers_by_count: mean_of(&|latent| layer_use.layers_by_count(latent, least)),
        layers_by_share: mean_of(&|latent| layer_use.layers_by_share(latent, ACTIVE_SHARE)),
    }
}

/// The mean; 0 of nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = values.fold((0u32, 0.0), |(n, sum), value| (n + 1, sum + value));
    if n > 0 { sum / f64::from(n) } else { 0.0 }
}

/// Pearson's correlation; `None` where one side does not vary.
fn correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    let (x, y) = (mean(pairs.iter().map(|p| p.0)), mean(pairs.iter().map(|p| p.1)));
    let product = mean(pairs.iter().map(|p| (p.0 - x) * (p.1 - y)));
    let variances =
        [mean(pairs.iter().map(|p| (p.0 - x).powi(2))), mean(pairs.iter().map(|p| (p.1 - y).powi(2)))];
    let norm = (variances[0] * variances[1]).sqrt();
    (norm > 0.0).then(|| product / norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlations_by_hand() {
        assert_eq!(correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]), Some(1.0));
        assert_eq!(correlation(&[(1.0, 1.0), (2.0, 0.0)]), Some(-1.0));
        assert_eq!(correlation(&[(1.0, 1.0), (1.0, 0.0)]), None);
        assert_eq!(correlation(&[]), None);
    }
}
