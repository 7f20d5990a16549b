//! The texts of a flow: short passages run through the language model once and encoded at every layer.
//!
//! Vectors are rounded as the pack stores them before anything is computed from them ([`FlowVectors`]).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use shared::lm::{LmError, Tap, TapAction, TokenBatch, Until};
use shared::pack::flow::{Effect, FlowEntry, FlowText, FlowVectors, flow_text, flow_vectors};
use shared::tap::{Site, TapPoint};
use shared::{Codes, CodesBuilder, Rows};

use super::Dictionary;
use super::corpus::{Corpus, spread};
use crate::features::Source;
use crate::features::texts::{Passage, tokens_of};
use crate::input_limit::InputLimit;

/// A passage at every layer.
#[derive(Debug)]
pub struct Run {
    /// What it is, without its files.
    entry: FlowEntry,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Raw values of the untouched model: at the layers, and where it can be run on from.
    pub seen: Seen,
    /// The vectors as they are stored.
    pub vectors: FlowVectors,
    /// Which tokens are not encoded, at each layer `[L][t]`.
    pub skip: Vec<Vec<bool>>,
    /// Codes of all tokens at each layer, `[L]`; empty rows where skipped.
    pub codes: Vec<Codes>,
    /// What the reconstruction misses, `[L][t]`.
    errors: Vec<Vec<f32>>,
}

/// Values at several taps, `(width, rows)` each; what is not wanted is not kept.
#[derive(Debug, Clone, Default)]
pub struct Seen(BTreeMap<TapPoint, (usize, Vec<f32>)>);

impl Seen {
    /// Nothing yet of these points.
    pub fn of(points: impl IntoIterator<Item = TapPoint>) -> Self {
        Self(points.into_iter().map(|point| (point, (0, Vec::new()))).collect())
    }

    /// The rows at `point`.
    ///
    /// # Errors
    /// If the model never came there.
    pub fn rows(&self, point: TapPoint) -> Result<Rows<'_>> {
        match self.0.get(&point) {
            Some((width, rows)) if *width > 0 => Ok(Rows::new(rows, *width)?),
            _ => bail!("the model has no tap {point}"),
        }
    }

    /// Whether the model came to `point`.
    #[must_use]
    pub fn has(&self, point: TapPoint) -> bool {
        self.0.get(&point).is_some_and(|(width, _)| *width > 0)
    }
}

impl Tap for Seen {
    fn wants(&self, point: TapPoint) -> bool {
        self.0.contains_key(&point)
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.0.insert(point, (value.width(), value.data().to_vec()));
        Ok(TapAction::Keep)
    }
}

/// The tap that holds the residual stream a block reads, and the block, from which on everything at `point` can be run again;
/// none for the embedding, which is the beginning.
#[must_use]
pub fn before(point: TapPoint) -> Option<(TapPoint, usize)> {
    match (point.site, point.layer) {
        (Site::Embed, _) => None,
        (_, 0) => Some((TapPoint::new(Site::Embed, 0), 0)),
        (_, layer) => Some((TapPoint::new(Site::Resid, layer - 1), layer)),
    }
}

/// Runs each passage, at most `most_tokens` of it. Tokens the store leaves out, and vectors beyond a layer's limit, are skipped.
///
/// # Errors
/// If the model refuses a text or has no such tap.
pub fn run(
    passages: &[Passage],
    source: &Source<'_>,
    dictionary: &Dictionary<'_>,
    corpus: &Corpus,
    most_tokens: usize,
) -> Result<Vec<Run>> {
    let means: Vec<Vec<f64>> = corpus.vectors.iter().map(super::corpus::VectorMoments::mean).collect();
    let most_tokens = most_tokens.min(shared::pack::flow::MAX_TOKENS);
    let one = |p: &Passage| one(p, source, dictionary, &means, most_tokens);
    passages.iter().map(|p| one(p).with_context(|| format!("the text {}", p.id))).collect()
}

fn one(
    passage: &Passage,
    source: &Source<'_>,
    dictionary: &Dictionary<'_>,
    means: &[Vec<f64>],
    most_tokens: usize,
) -> Result<Run> {
    let tokens = tokens_of(&source.model.tokenizer, &passage.text, most_tokens)?;
    let batch = TokenBatch::new(&tokens, tokens.len())?;
    let points = dictionary.layers.iter().flat_map(|l| [Some(l.tap), before(l.tap).map(|b| b.0)]);
    let mut seen = Seen::of(points.flatten());
    let last = dictionary.layers.iter().map(|layer| layer.tap.layer).max().unwrap_or(0);
    source.model.model.forward(batch, &mut seen, Until::Layer(last))?;
    let (store, mut units, mut skip) = (source.store.manifest(), Vec::new(), Vec::new());
    for layer in dictionary.layers {
        let (raw, limit) = (seen.rows(layer.tap)?, InputLimit::new(layer.max_input_norm));
        let each = tokens.iter().zip(raw).enumerate();
        let skipped: Vec<bool> =
            each.map(|(i, (&token, x))| !store.keeps(i, token) || !limit.keeps(x)).collect();
        let mut x = layer.in_units(raw.data());
        // What is skipped may be a hundred times as long; it must not cost the others their precision.
        let rows = x.chunks_exact_mut(raw.width()).zip(&skipped);
        rows.filter(|(_, skip)| **skip).for_each(|(row, _)| row.fill(0.0));
        units.extend(x);
        skip.push(skipped);
    }
    let vectors = FlowVectors::round(&units, dictionary.layers.len());
    let (mut codes, mut errors) = (Vec::new(), Vec::new());
    for (layer, skip) in skip.iter().enumerate() {
        let (found, missed) = encode((dictionary, layer), &vectors.layer(layer), skip, &means[layer])?;
        codes.push(found);
        errors.push(missed);
    }
    let entry = FlowEntry {
        id: passage.id.clone(),
        title: passage.title.clone(),
        source: passage.source.clone(),
        file: String::new(),
        vectors: String::new(),
        words: tokens.iter().map(|&t| source.model.tokenizer.piece(t)).collect(),
    };
    Ok(Run { entry, tokens, seen, vectors, skip, codes, errors })
}

/// Codes of vectors in the dictionary's units, and `‖x − x̂‖² / ‖x − mean‖²` of each; nothing and 0 where skipped.
fn encode(
    (dictionary, layer): (&Dictionary<'_>, usize),
    x: &[f32],
    skip: &[bool],
    mean: &[f64],
) -> Result<(Codes, Vec<f32>)> {
    let width = mean.len();
    let kept = x.chunks_exact(width).zip(skip).filter(|(_, skip)| !**skip).flat_map(|(row, _)| row);
    let kept: Vec<f32> = kept.copied().collect();
    let rows = Rows::new(&kept, width)?;
    let codes = dictionary.codes(layer, rows)?;
    let rebuilt = dictionary.backend.decode(rows, &codes)?;
    let squared = |x: &[f32], y: &mut dyn Iterator<Item = f64>| -> f64 {
        x.iter().zip(y).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum()
    };
    let mut missed = rows.iter().zip(rebuilt.chunks_exact(width)).map(|(x, y)| {
        let error = squared(x, &mut y.iter().map(|y| f64::from(*y)));
        #[expect(clippy::cast_possible_truncation, reason = "shown to a few digits")]
        let share = (error / squared(x, &mut mean.iter().copied()).max(f64::MIN_POSITIVE)) as f32;
        share.clamp(0.0, f32::MAX)
    });
    let errors = skip.iter().map(|skip| if *skip { 0.0 } else { missed.next().unwrap_or(0.0) }).collect();
    let kept: Vec<bool> = skip.iter().map(|skip| !skip).collect();
    Ok((spread(&codes, &kept)?, errors))
}

impl Run {
    /// Codes of raw vectors of layer number `layer` that take the place of this text's, rounded as they are, `[t]`.
    ///
    /// # Errors
    /// If they are not as many or not as wide, or not finite.
    pub fn encode(&self, dictionary: &Dictionary<'_>, layer: usize, raw: Rows<'_>) -> Result<Codes> {
        let (Some(info), Some(skip)) = (dictionary.layers.get(layer), self.skip.get(layer)) else {
            bail!("there is no layer number {layer}");
        };
        let kept = raw.iter().zip(skip).filter(|(_, skip)| !**skip).flat_map(|(row, _)| row);
        let x = info.in_units(&kept.copied().collect::<Vec<_>>());
        let x = FlowVectors::round(&x, 1).layer(0);
        let codes = dictionary.codes(layer, Rows::new(&x, raw.width())?)?;
        spread(&codes, &skip.iter().map(|skip| !skip).collect::<Vec<_>>())
    }

    /// The three parts of text number `number` in a pack.
    #[must_use]
    pub fn finish(self, number: usize, effects: Vec<Effect>) -> (FlowEntry, FlowText, FlowVectors) {
        let mut all = CodesBuilder::new(self.codes.first().map_or(0, Codes::n_latents));
        for (latents, values) in self.codes.iter().flat_map(Codes::iter) {
            latents.iter().zip(values).for_each(|(&latent, &value)| all.push(latent, value));
            // Rows of codes are ordered and in range already.
            let _ = all.end_row();
        }
        let entry = FlowEntry { file: flow_text(number), vectors: flow_vectors(number), ..self.entry };
        let text = FlowText {
            tokens: self.tokens,
            skip: self.skip.concat(),
            codes: all.finish(),
            errors: self.errors.concat(),
            effects,
        };
        (entry, text, self.vectors)
    }
}
