//! The lens of latents at each layer: the change of the logits when a latent's mean contribution at a layer is added to the
//! layer's mean vector, through the final norm, the unembedding and the soft-cap.
//!
//! Only where the directions live in the residual stream: at sites inside a block, a direction has no such place.

use std::collections::HashMap;

use anyhow::{Context, Result};
use shared::Rows;
use shared::pack::flow::{LENS_WORDS, LensCell, LensShard};
use shared::tap::Site;

use super::Dictionary;
use super::corpus::Corpus;
use crate::features::geometry::largest;
use crate::model::LoadedModel;

/// What the lens of any latent needs.
#[derive(Debug)]
pub struct Lens<'a> {
    model: &'a LoadedModel,
    dictionary: &'a Dictionary<'a>,
    corpus: &'a Corpus,
    /// Of every layer with one, its mean raw vector, its logits, and the raw size of a unit of a latent there.
    layers: Vec<Option<Layer>>,
}

#[derive(Debug)]
struct Layer {
    mean: Vec<f64>,
    logits: Vec<f32>,
    unit: f64,
}

impl<'a> Lens<'a> {
    /// Looks at every layer's mean vector.
    ///
    /// # Errors
    /// If the model refuses a vector.
    pub fn new(model: &'a LoadedModel, dictionary: &'a Dictionary<'a>, corpus: &'a Corpus) -> Result<Self> {
        let look = |(layer, moments): (&shared::multi_layer::Layer, &super::corpus::VectorMoments)| {
            let wide = dictionary.backend.sae().dims().d_out == model.model.spec().d_model;
            if !wide || !matches!(layer.tap.site, Site::Resid | Site::Embed) {
                return Ok(None);
            }
            let mean: Vec<f64> = moments.mean().iter().map(|x| x * layer.scale).collect();
            let logits = logits(model, &single(&mean))?;
            Ok(Some(Layer { mean, logits, unit: layer.scale * moments.scale() }))
        };
        let layers = dictionary.layers.iter().zip(&corpus.vectors).map(look).collect::<Result<_>>()?;
        Ok(Self { model, dictionary, corpus, layers })
    }

    /// The lens of these latents.
    ///
    /// # Errors
    /// If the model refuses a vector.
    pub fn shard(&self, latents: &[u32]) -> Result<LensShard> {
        let cells =
            latents.iter().flat_map(|&latent| (0..self.layers.len()).map(move |layer| (latent, layer)));
        let asked: Vec<Option<Asked<'_>>> = cells.map(|(latent, layer)| self.ask(latent, layer)).collect();
        let rows: Vec<f32> = asked.iter().flatten().flat_map(|asked| single(&asked.residual)).collect();
        let logits = if rows.is_empty() { Vec::new() } else { logits(self.model, &rows)? };
        let mut with = logits.chunks_exact(self.model.model.spec().vocab_size);
        let mut shard = LensShard::default();
        let mut indices = HashMap::new();
        for asked in asked {
            let (Some(asked), Some(with)) = (&asked, if asked.is_some() { with.next() } else { None }) else {
                shard.cells.push(LensCell::default());
                continue;
            };
            let rises =
                (0u32..).zip(with.iter().zip(&asked.layer.logits).map(|(with, without)| with - without));
            let raises = largest(rises, LENS_WORDS).into_iter().map(|(id, rise)| {
                let word = *indices.entry(id).or_insert_with(|| {
                    shard.words.push(self.model.tokenizer.piece(id));
                    u32::try_from(shard.words.len() - 1).unwrap_or(u32::MAX)
                });
                (word, rise)
            });
            let raises = raises.collect();
            #[expect(clippy::cast_possible_truncation, reason = "shown to a few digits")]
            let activation = asked.activation as f32;
            shard.cells.push(LensCell { activation, raises });
        }
        Ok(shard)
    }

    /// The layer's mean vector with the latent's mean contribution; none where it is never active or there is no lens.
    fn ask(&self, latent: u32, number: usize) -> Option<Asked<'_>> {
        let layer = self.layers[number].as_ref()?;
        let usage = &self.corpus.layer_use;
        let (total, count) = (usage.totals(latent as usize)[number], usage.counts(latent as usize)[number]);
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let activation = (count > 0).then(|| total / count as f64)?;
        let direction = self.dictionary.backend.sae().decoder_direction(latent as usize);
        let added = layer.mean.iter().zip(direction);
        let residual = added.map(|(mean, d)| mean + activation * layer.unit * f64::from(*d)).collect();
        Some(Asked { layer, activation, residual })
    }
}

/// A cell to be looked at.
struct Asked<'l> {
    layer: &'l Layer,
    activation: f64,
    residual: Vec<f64>,
}

fn single(values: &[f64]) -> Vec<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "the language model computes in f32")]
    values.iter().map(|&v| v as f32).collect()
}

fn logits(model: &LoadedModel, residual: &[f32]) -> Result<Vec<f32>> {
    let rows = Rows::new(residual, model.model.spec().d_model)?;
    model.model.logit_lens(rows).context("cannot look through the unembedding")
}
