//! Text to token ids, and ids back to something a person can read.

use tokenizers::DecoderWrapper;

use super::LmError;

/// A tokenizer with what the model's files say about special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    byte_level: bool,
    bos: Option<u32>,
    prepend_bos: bool,
    special_ids: Vec<u32>,
}

/// What a model's files say about the beginning of a sequence, where they say it outside `tokenizer.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BosHints {
    /// The token, by its text.
    pub token: Option<String>,
    /// The token, by its id; used when the text says nothing.
    pub id: Option<u32>,
    /// Whether sequences begin with it; else the tokenizer's own template decides.
    pub prepend: Option<bool>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn from_json(json: &[u8], hints: &BosHints) -> Result<Self, LmError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(error)?;
        // Files may ask for cutting or filling up to a length; here every text is encoded whole.
        inner.with_truncation(None).map_err(error)?.with_padding(None);
        let mut special_ids: Vec<u32> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        special_ids.sort_unstable();
        // What the template puts in front of a text is the beginning-of-sequence token.
        let (bare, full) = (encode(&inner, "a", false)?, encode(&inner, "a", true)?);
        let template =
            full.first().copied().filter(|first| full.len() > bare.len() && bare.first() != Some(first));
        let named = hints.token.as_deref().and_then(|token| inner.token_to_id(token));
        let bos = template.or(named).or(hints.id).filter(|&id| inner.id_to_token(id).is_some());
        let prepend_bos = bos.is_some() && hints.prepend.unwrap_or(template.is_some());
        let byte_level = inner.get_decoder().is_some_and(is_byte_level);
        Ok(Self { inner, byte_level, bos, prepend_bos, special_ids })
    }

    /// The token ids of `text`; no special tokens are added.
    ///
    /// # Errors
    /// If the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, LmError> {
        encode(&self.inner, text, false)
    }

    /// The text of one token as a person reads it: leading space and newline as such, bytes that are no
    /// complete character like `<0xE2>`. Empty for ids without a token.
    #[must_use]
    pub fn piece(&self, id: u32) -> String {
        let Some(token) = self.inner.id_to_token(id) else { return String::new() };
        if self.special_ids.binary_search(&id).is_ok() {
            return token;
        }
        if !self.byte_level {
            return token.replace('▁', " ");
        }
        match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
            Some(bytes) => readable(&bytes),
            None => token,
        }
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

    /// Everything that decides the result of [`Tokenizer::encode`], as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// If the tokenizer cannot be written down.
    pub fn definition(&self) -> Result<String, LmError> {
        self.inner.to_string(false).map_err(error)
    }

    /// The number of ids, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The number of ids without added tokens. A model's embedding has at least as many rows when the two belong
    /// together; added tokens may lie beyond it (an image placeholder in a text model), and fail when they are used.
    #[must_use]
    pub fn base_vocab_size(&self) -> usize {
        self.inner.get_vocab_size(false)
    }
}

fn error(e: tokenizers::Error) -> LmError {
    LmError::Tokenizer(e.to_string())
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, LmError> {
    Ok(inner.encode_fast(text, add_special).map_err(error)?.get_ids().to_vec())
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(is_byte_level),
        _ => false,
    }
}

/// The byte a character of a byte-level vocabulary stands for: printable Latin-1 stands for itself, the other 68
/// bytes, in order, are 256, 257, ….
fn byte_of(c: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(c) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|&byte| itself(byte)),
        code => (0..=255u8).filter(|&byte| !itself(byte)).nth(usize::try_from(code - 256).ok()?),
    }
}

/// `bytes` as text; what is no complete character is written `<0xE2>`, a byte each.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(&format!("<0x{byte:02X}>"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for code in (0..512).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(code) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true));
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('a')), (Some(b' '), Some(b'\n'), Some(b'a')));
    }

    #[test]
    fn incomplete_characters_are_spelled_out() {
        assert_eq!(readable(" é".as_bytes()), " é");
        assert_eq!(readable(&[b'a', 0xE2, 0x80]), "a<0xE2><0x80>");
    }
}
