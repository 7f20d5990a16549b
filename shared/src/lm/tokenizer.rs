//! Text to token ids, and ids back to something a person can read.

use super::LmError;

/// A tokenizer with what the model's files say about special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    prepend_bos: bool,
    special_ids: Vec<u32>,
}

impl Tokenizer {
    /// The token ids of `text`; no special tokens are added.
    ///
    /// # Errors
    /// If the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, LmError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| LmError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of one token as a person reads it: leading space and newline as such, bytes that are no
    /// complete character like `<0xE2>`. Empty for ids without a token.
    #[must_use]
    pub fn piece(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_default()
    }

    /// The token that begins a sequence, if the model has one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether sequences are meant to begin with [`Tokenizer::bos`].
    #[must_use]
    pub fn prepend_bos(&self) -> bool {
        self.prepend_bos
    }

    /// Ids that stand for structure rather than text, ascending.
    #[must_use]
    pub fn special_ids(&self) -> &[u32] {
        &self.special_ids
    }

    /// The number of ids, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
