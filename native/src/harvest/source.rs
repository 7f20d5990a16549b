//! What a harvest needs of a language model: tokens in, activations out.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use shared::Rows;
use shared::config::harvest::{HarvestConfig, SPECIAL};
use shared::lm::{LanguageModel, LmError, Tap, TapAction, TokenBatch, Tokenizer, Until};
use shared::tap::{Site, TapPoint};

use crate::files;
use crate::store::manifest::TokenizerInfo;

/// Text to token ids, without added special tokens; from several threads at once.
pub trait Encode: Sync {
    /// The ids of `text`.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// A hash of everything that decides what [`Encode::encode`] gives; `None` if that cannot be told, and results must
    /// not be kept for another run.
    fn identity(&self) -> Option<String> {
        None
    }
}

/// A model whose activations can be read.
pub trait ActivationModel {
    /// The number of blocks.
    fn n_layers(&self) -> usize;

    /// The longest sequence it was made for.
    fn context_length(&self) -> usize;

    /// Values of an activation vector at `site`.
    fn width(&self, site: Site) -> usize;

    /// Runs sequences of `sequence_length` tokens as far as `points` need, and hands over `[batch · seq, width]` rows
    /// once for each point.
    ///
    /// # Errors
    /// If the model fails, or `read` does.
    fn activations(
        &self,
        ids: &[u32],
        sequence_length: usize,
        points: &[TapPoint],
        read: &mut dyn FnMut(TapPoint, Rows<'_>) -> Result<()>,
    ) -> Result<()>;
}

impl Encode for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(Tokenizer::encode(self, text)?)
    }

    fn identity(&self) -> Option<String> {
        Some(files::sha256(self.definition().ok()?.as_bytes()))
    }
}

impl ActivationModel for LanguageModel {
    fn n_layers(&self) -> usize {
        self.spec().n_layers
    }

    fn context_length(&self) -> usize {
        self.spec().context_length
    }

    fn width(&self, site: Site) -> usize {
        self.spec().site_width(site)
    }

    fn activations(
        &self,
        ids: &[u32],
        sequence_length: usize,
        points: &[TapPoint],
        read: &mut dyn FnMut(TapPoint, Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        let last = points.iter().map(|p| p.layer).max().unwrap_or(0);
        let mut reader = Reader { points, read, failed: None };
        let done = self.forward(TokenBatch::new(ids, sequence_length)?, &mut reader, Until::Layer(last));
        // The reader's own error says more than the one the model made of it.
        reader.failed.map_or(Ok(()), Err)?;
        done?;
        Ok(())
    }
}

struct Reader<'a> {
    points: &'a [TapPoint],
    read: &'a mut dyn FnMut(TapPoint, Rows<'_>) -> Result<()>,
    failed: Option<anyhow::Error>,
}

impl Tap for Reader<'_> {
    fn wants(&self, point: TapPoint) -> bool {
        self.points.contains(&point)
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        match (self.read)(point, value) {
            Ok(()) => Ok(TapAction::Keep),
            Err(error) => {
                let message = error.to_string();
                self.failed = Some(error);
                Err(LmError::Tap { point, message })
            }
        }
    }
}

/// Texts of the token that ends a document, in the families of models that have one.
const END_OF_TEXT: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>"];

/// What the manifest records of `tokenizer` under `config`: what begins a sequence, what stands between documents, which
/// tokens' vectors are left out.
///
/// # Errors
/// If `bos` or `separator` is the text of no special token, or an entry of `drop_tokens` means no token.
pub fn tokenizer_info(tokenizer: &Tokenizer, config: &HarvestConfig) -> Result<TokenizerInfo> {
    let special_ids = tokenizer.special_ids().to_vec();
    let special = |text: &str| special_ids.iter().copied().find(|&id| tokenizer.piece(id) == text);
    let named = |key: &str, text: &str, words: &str| -> Result<Option<u32>> {
        let found = special(text);
        let known: Vec<_> = special_ids.iter().take(20).map(|&id| tokenizer.piece(id)).collect();
        let known = known.join(", ");
        ensure!(
            found.is_some(),
            "`{key}` is `{text}`, expected {words} or a special token of the model: {known}"
        );
        Ok(found)
    };
    let separator = match config.separator.as_str() {
        "none" => None,
        "auto" => END_OF_TEXT.iter().find_map(|text| special(text)).or(tokenizer.bos()),
        text => named("separator", text, "auto, none")?,
    };
    let bos = match config.bos.as_str() {
        "none" => None,
        "auto" => tokenizer.bos().filter(|_| tokenizer.prepend_bos()),
        "always" => {
            Some(tokenizer.bos().context("`bos` is always, but the model's files name no such token")?)
        }
        text => named("bos", text, "auto, none, always")?,
    };
    let dropped_ids = dropped_ids(tokenizer, &config.drop_tokens)?;
    Ok(TokenizerInfo { vocab_size: tokenizer.vocab_size(), bos, separator, special_ids, dropped_ids })
}

/// The ids that `classes` means, besides special ones, ascending.
fn dropped_ids(tokenizer: &Tokenizer, classes: &[String]) -> Result<Vec<u32>> {
    let n = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let mut ids = BTreeSet::new();
    for class in classes.iter().filter(|class| *class != SPECIAL) {
        let before = ids.len();
        if let Some(id) = class.strip_prefix("id:").and_then(|id| id.trim().parse::<u32>().ok()) {
            ensure!(id < n, "`drop_tokens` has id {id}, expected one below {n}");
            ids.insert(id);
            continue;
        }
        let wanted: Box<dyn Fn(&str) -> bool> = match (class.as_str(), class.strip_prefix("text:")) {
            (_, Some(text)) => Box::new(move |piece| piece == text),
            ("whitespace", _) => Box::new(|piece| piece.trim().is_empty()),
            ("digits", _) => Box::new(|piece| all(piece, char::is_numeric)),
            ("punctuation", _) => {
                Box::new(|piece| all(piece, |c| !c.is_alphanumeric() && !c.is_whitespace()))
            }
            _ => bail!(
                "`drop_tokens` has `{class}`, expected special, whitespace, punctuation, digits, text:TOKEN or id:NUMBER"
            ),
        };
        let special = tokenizer.special_ids();
        let plain = (0..n).filter(|id| special.binary_search(id).is_err());
        ids.extend(plain.filter(|&id| {
            let piece = tokenizer.piece(id);
            !piece.is_empty() && wanted(&piece)
        }));
        ensure!(ids.len() > before, "`drop_tokens` has `{class}`, which is no (further) token of the model");
    }
    Ok(ids.into_iter().collect())
}

/// Whether all characters of a token's text are of a kind, spaces around them aside.
fn all(piece: &str, kind: impl Fn(char) -> bool) -> bool {
    let piece = piece.trim();
    !piece.is_empty() && piece.chars().all(kind)
}

#[cfg(test)]
mod tests {
    use shared::lm::BosHints;

    use super::*;

    const WORDS: [&str; 8] = ["<bos>", "<|endoftext|>", "the", "42", "-7", "!?", "\n\n", "a1"];

    /// Words by number, the first two of them special.
    fn tokenizer(prepend: bool) -> Tokenizer {
        let vocabulary: serde_json::Map<_, _> =
            WORDS.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), serde_json::json!(id))).collect();
        let special = |id: usize| {
            serde_json::json!({
                "id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1)],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "the"},
        });
        let hints = BosHints { token: Some("<bos>".to_owned()), id: None, prepend: Some(prepend) };
        Tokenizer::from_json(json.to_string().as_bytes(), &hints).unwrap()
    }

    fn info(prepend: bool, change: impl FnOnce(&mut HarvestConfig)) -> Result<TokenizerInfo> {
        let mut config = HarvestConfig::default();
        change(&mut config);
        tokenizer_info(&tokenizer(prepend), &config)
    }

    #[test]
    fn what_begins_a_sequence_and_what_stands_between_documents() {
        let bos = |prepend, bos: &str| info(prepend, |c| c.bos = bos.to_owned()).map(|info| info.bos);
        assert_eq!(bos(true, "auto").unwrap(), Some(0));
        assert_eq!(bos(false, "auto").unwrap(), None);
        assert_eq!(bos(false, "always").unwrap(), Some(0));
        assert_eq!(bos(true, "none").unwrap(), None);
        assert_eq!(bos(true, "<|endoftext|>").unwrap(), Some(1));
        assert!(
            bos(true, "the").unwrap_err().to_string().contains("<bos>"),
            "an ordinary token begins nothing"
        );
        let separator = |text: &str| info(true, |c| c.separator = text.to_owned()).map(|info| info.separator);
        assert_eq!(separator("auto").unwrap(), Some(1));
        assert_eq!(separator("none").unwrap(), None);
        assert_eq!(separator("<bos>").unwrap(), Some(0));
        assert!(separator("<eos>").unwrap_err().to_string().contains("separator"));
    }

    #[test]
    fn tokens_are_dropped_by_class_by_text_and_by_number() {
        let dropped = |classes: &[&str]| {
            let classes = classes.iter().map(|class| (*class).to_owned()).collect();
            info(true, |c| c.drop_tokens = classes).map(|info| info.dropped_ids)
        };
        assert_eq!(dropped(&["special"]).unwrap(), [0u32; 0]);
        assert_eq!(dropped(&["digits"]).unwrap(), [3]);
        assert_eq!(dropped(&["punctuation", "whitespace"]).unwrap(), [5, 6]);
        assert_eq!(dropped(&["text:a1", "id:2", "special"]).unwrap(), [2, 7]);
        for (class, word) in [("letters", "letters"), ("text:zebra", "zebra"), ("id:8", "below 8")] {
            assert!(dropped(&[class]).unwrap_err().to_string().contains(word), "{class}");
        }
    }
}
