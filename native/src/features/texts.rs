//! The bundled texts of a pack: short passages run through the language model once, so that a page can
//! encode their activations live.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use shared::Rows;
use shared::lm::{LmError, Tap, TapAction, TokenBatch, Tokenizer, Until};
use shared::pack::{Text, TextEntry, text_numbers};
use shared::tap::TapPoint;

use crate::input_limit::InputLimit;
use crate::model::LoadedModel;
use crate::store::Manifest;

/// A passage of the texts file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passage {
    /// Short name for links.
    pub id: String,
    /// Name for people.
    pub title: String,
    /// Where it is from.
    pub source: String,
    /// The text itself.
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    text: Vec<Passage>,
}

/// Reads a texts file: TOML with one `[[text]]` table a passage.
///
/// # Errors
/// If it is not that, an id repeats, or a passage is empty.
pub fn read(path: &Path) -> Result<Vec<Passage>> {
    let context = || format!("cannot read the texts in {}", path.display());
    let text = std::fs::read_to_string(path).with_context(context)?;
    parse(&text).with_context(context)
}

fn parse(text: &str) -> Result<Vec<Passage>> {
    let file: File = toml::from_str(text)?;
    let mut ids = HashSet::new();
    for passage in &file.text {
        ensure!(!passage.text.trim().is_empty(), "the text {} is empty", passage.id);
        ensure!(ids.insert(&passage.id), "the id {} appears twice", passage.id);
    }
    Ok(file.text)
}

/// Keeps the rows of one tap.
struct Capture {
    point: TapPoint,
    rows: Vec<f32>,
}

impl Tap for Capture {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.point
    }

    fn visit(&mut self, _point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.rows.extend_from_slice(value.data());
        Ok(TapAction::Keep)
    }
}

/// Runs each passage through the model, at most `most_tokens` of it, and keeps its activations at `point`.
/// Tokens the store leaves out, and vectors beyond `limit`, are marked to be skipped here too.
///
/// # Errors
/// If the model refuses a text or has no such tap.
pub fn capture(
    passages: &[Passage],
    model: &LoadedModel,
    store: &Manifest,
    (point, limit): (TapPoint, InputLimit),
    most_tokens: usize,
) -> Result<Vec<(TextEntry, Text)>> {
    passages.iter().enumerate().map(|(i, p)| one(i, p, model, store, (point, limit), most_tokens)).collect()
}

/// The tokens of a passage as the model reads them, with BOS where it wants one; at most `most`.
///
/// # Errors
/// If the tokenizer refuses the text.
pub fn tokens_of(tokenizer: &Tokenizer, text: &str, most: usize) -> Result<Vec<u32>> {
    let bos = if tokenizer.prepend_bos() { tokenizer.bos() } else { None };
    let mut tokens: Vec<u32> = bos.into_iter().collect();
    tokens.extend(tokenizer.encode(text.trim())?);
    tokens.truncate(most.max(1));
    Ok(tokens)
}

fn one(
    number: usize,
    passage: &Passage,
    model: &LoadedModel,
    store: &Manifest,
    (point, limit): (TapPoint, InputLimit),
    most_tokens: usize,
) -> Result<(TextEntry, Text)> {
    let context = || format!("the text {}", passage.id);
    let tokenizer = &model.tokenizer;
    let tokens = tokens_of(tokenizer, &passage.text, most_tokens).with_context(context)?;
    let batch = TokenBatch::new(&tokens, tokens.len()).with_context(context)?;
    let mut capture = Capture { point, rows: Vec::new() };
    model.model.forward(batch, &mut capture, Until::Layer(point.layer)).with_context(context)?;
    if capture.rows.is_empty() {
        bail!("the model has no tap {point}");
    }
    let file = text_numbers(number);
    let entry = TextEntry {
        id: passage.id.clone(),
        title: passage.title.clone(),
        source: passage.source.clone(),
        file,
        words: tokens.iter().map(|&t| tokenizer.piece(t)).collect(),
    };
    let rows = Rows::new(&capture.rows, capture.rows.len() / tokens.len())?;
    let seen = tokens.iter().zip(rows).enumerate();
    let skip = seen.map(|(i, (&token, x))| !store.keeps(i, token) || !limit.keeps(x)).collect();
    Ok((entry, Text { tokens, x: capture.rows, skip }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_files_are_strict() {
        let good = "[[text]]\nid = \"a\"\ntitle = \"A\"\nsource = \"S\"\ntext = \"One.\"\n";
        assert_eq!(parse(good).unwrap()[0].text, "One.");
        assert!(parse(&good.replace("source", "sauce")).is_err());
        assert!(parse(&format!("{good}{good}")).unwrap_err().to_string().contains("twice"));
        assert!(parse(&good.replace("One.", " ")).is_err());
    }

    #[test]
    fn the_texts_of_the_demo_are_well_formed() {
        let passages = parse(include_str!("../../../configs/demo-texts.toml")).unwrap();
        assert!(passages.len() >= 12);
        assert!(passages.iter().all(|p| shared::pack::is_safe_path(&p.id) && p.text.len() < 800));
    }
}
