//! Text to token ids, and ids back to something a person can read.

use serde_json::json;
use tokenizers::DecoderWrapper;

use super::LmError;
use super::gguf::{Gguf, GgufValue};

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

    /// Builds the tokenizer embedded in a GGUF: byte-level BPE with the pre-tokenizer the file names.
    ///
    /// # Errors
    /// If the file holds none, another kind, or one that is malformed.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, LmError> {
        let fail = |problem: String| LmError::Tokenizer(problem);
        match gguf.text("tokenizer.ggml.model") {
            Some("gpt2") => {}
            Some(other) => {
                return Err(fail(format!("GGUF kind `{other}`; supported is gpt2 (byte-level BPE)")));
            }
            None => return Err(fail("the GGUF holds none (no tokenizer.ggml.model)".to_owned())),
        }
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        // SmolLM isolates every digit before the GPT-2 pattern sees the text, so that `  1` is two spaces and a
        // digit, not a space and ` 1`.
        let pre_tokenizer = match gguf.text("tokenizer.ggml.pre") {
            Some("smollm") => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, byte_level
            ]}),
            Some("gpt-2" | "default") | None => byte_level.clone(),
            Some(other) => {
                return Err(fail(format!("GGUF pre-tokenizer `{other}`; supported are smollm, gpt-2")));
            }
        };
        let texts = |key: &str| match gguf.metadata().get(key) {
            Some(GgufValue::Texts(texts)) => Ok(texts),
            _ => Err(fail(format!("{key} is missing or not a list of texts"))),
        };
        let tokens = texts("tokenizer.ggml.tokens")?;
        let merges = texts("tokenizer.ggml.merges")?.iter().map(|merge| {
            merge
                .split_once(' ')
                .ok_or_else(|| fail(format!("merge `{merge}` has no space")))
                .map(|(a, b)| json!([a, b]))
        });
        let merges = merges.collect::<Result<Vec<_>, _>>()?;
        let vocab: serde_json::Map<_, _> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let kinds = match gguf.metadata().get("tokenizer.ggml.token_type") {
            Some(GgufValue::Integers(kinds)) if kinds.len() == tokens.len() => kinds.as_slice(),
            None => &[],
            Some(_) => return Err(fail("tokenizer.ggml.token_type does not fit the tokens".to_owned())),
        };
        // Types 3 (control) and 4 (user-defined) are taken out of the text whole; control tokens are special.
        let added = kinds.iter().enumerate().filter(|(_, kind)| matches!(kind, 3 | 4)).map(|(id, kind)| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == 3})
        });
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": added.collect::<Vec<_>>(), "pre_tokenizer": pre_tokenizer, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "ignore_merges": false, "vocab": vocab, "merges": merges}
        });
        let id = |key: &str| match gguf.metadata().get(key) {
            Some(GgufValue::Integer(id)) => u32::try_from(*id).ok(),
            _ => None,
        };
        let prepend = match gguf.metadata().get("tokenizer.ggml.add_bos_token") {
            Some(GgufValue::Flag(flag)) => Some(*flag),
            _ => None,
        };
        let hints = BosHints { token: None, id: id("tokenizer.ggml.bos_token_id"), prepend };
        Self::from_json(json.to_string().as_bytes(), &hints)
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
