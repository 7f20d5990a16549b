//! What a harvest needs of a language model: tokens in, activations out.

use anyhow::{Result, ensure};
use shared::Rows;
use shared::lm::{LanguageModel, LmError, Tap, TapAction, TokenBatch, Tokenizer, Until};
use shared::tap::{Site, TapPoint};

use crate::store::manifest::TokenizerInfo;

/// Text to token ids, without added special tokens.
pub trait Encode {
    /// The ids of `text`.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;
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

/// What the manifest records of `tokenizer`, with the separator that `separator` (the configuration key) asks for.
///
/// # Errors
/// If `separator` is the text of no special token.
pub fn tokenizer_info(tokenizer: &Tokenizer, separator: &str) -> Result<TokenizerInfo> {
    let special_ids = tokenizer.special_ids().to_vec();
    let special = |text: &str| special_ids.iter().copied().find(|&id| tokenizer.piece(id) == text);
    let separator = match separator {
        "none" => None,
        "auto" => END_OF_TEXT.iter().find_map(|text| special(text)).or(tokenizer.bos()),
        text => {
            let found = special(text);
            let known: Vec<_> = special_ids.iter().take(20).map(|&id| tokenizer.piece(id)).collect();
            ensure!(
                found.is_some(),
                "`separator` is `{text}`, expected auto, none or a special token of the model: {}",
                known.join(", ")
            );
            found
        }
    };
    let bos = tokenizer.bos().filter(|_| tokenizer.prepend_bos());
    Ok(TokenizerInfo { vocab_size: tokenizer.vocab_size(), bos, separator, special_ids })
}
