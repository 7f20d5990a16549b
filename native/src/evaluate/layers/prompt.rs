//! Where the latents of one short text are active.

use anyhow::{Context, Result, ensure};
use shared::Rows;
use shared::lm::TokenBatch;
use shared::metrics::LayerUse;

use super::super::splice::Untouched;
use super::Dictionary;
use super::encode::in_units;
use crate::model::LoadedModel;

/// The text of the paper's figures.
pub const PUBLISHED: &str = "When Mary and John went to the store, John gave a drink to";

/// Activations of the latents of `dictionary` on the tokens of `text`, but for special ones.
///
/// # Errors
/// If the text has no token, or the model refuses them.
pub(super) fn layer_use(dictionary: &Dictionary<'_>, model: &LoadedModel, text: &str) -> Result<LayerUse> {
    let tokenizer = &model.tokenizer;
    let bos = tokenizer.bos().filter(|_| tokenizer.prepend_bos());
    let words = tokenizer.encode(text).context("cannot tokenize the prompt")?;
    ensure!(!words.is_empty(), "the prompt has no tokens");
    let ids: Vec<u32> = bos.into_iter().chain(words).collect();
    let special: Vec<bool> = ids.iter().map(|id| tokenizer.special_ids().contains(id)).collect();
    let mut seen = Untouched::new(dictionary.layers().iter().map(|layer| layer.tap));
    model.model.forward_nll(TokenBatch::new(&ids, ids.len())?, &mut seen)?;
    let mut layers = Vec::new();
    for number in 0..dictionary.layers().len() {
        let at = dictionary.at(number)?;
        let subject = &at.subject;
        let raw = seen.value(subject.input)?;
        let read = at.read(raw)?;
        let x = Rows::new(&read, raw.width())?;
        let kept: Vec<bool> =
            special.iter().zip(x.iter()).map(|(special, x)| !special && subject.limit.keeps(x)).collect();
        let codes = subject.backend.encode(Rows::new(&super::encode::chosen(x, &kept), x.width())?)?;
        layers.push(in_units(&codes, &kept, dictionary.layers()[number].scale)?);
    }
    let mut layer_use = LayerUse::new(dictionary.n_latents(), layers.len());
    layer_use.update(&layers)?;
    Ok(layer_use)
}
