//! The tokenizers embedded in GGUF files: byte-level BPE (`gpt2`), and SentencePiece's BPE (`llama`).

use std::collections::HashMap;

use serde_json::{Value, json};

use super::gguf::{Gguf, GgufValue};
use super::{BosHints, LmError, Tokenizer};

/// SentencePiece's mark for a space.
const SPACE: &str = "▁";
/// No piece longer than this is looked at for merges, so that a hostile file cannot make that take for ever.
const LONGEST_PIECE: usize = 512;

// Numbers of `tokenizer.ggml.token_type`.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

impl Tokenizer {
    /// Builds the tokenizer embedded in a GGUF: byte-level BPE with the pre-tokenizer the file names, or SentencePiece's
    /// BPE with the scores in the file.
    ///
    /// # Errors
    /// If the file holds none, another kind, or one that is malformed.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, LmError> {
        let (json, prepend) = match gguf.text("tokenizer.ggml.model") {
            Some("gpt2") => (byte_level(gguf)?, None),
            // Files say so when they do not want it.
            Some("llama") => (sentencepiece(gguf)?, Some(true)),
            Some(other) => {
                return Err(fail(format!(
                    "GGUF kind `{other}`; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
                )));
            }
            None => return Err(fail("the GGUF holds none (no tokenizer.ggml.model)")),
        };
        let hints = BosHints {
            token: None,
            id: id(gguf, "tokenizer.ggml.bos_token_id"),
            prepend: flag(gguf, "tokenizer.ggml.add_bos_token").or(prepend),
        };
        Self::from_json(json.to_string().as_bytes(), &hints)
    }
}

fn fail(problem: impl Into<String>) -> LmError {
    LmError::Tokenizer(problem.into())
}

fn byte_level(gguf: &Gguf) -> Result<Value, LmError> {
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
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let merges = texts(gguf, "tokenizer.ggml.merges")?.iter().map(|merge| {
        let parts = merge.split_once(' ').ok_or_else(|| fail(format!("merge `{merge}` has no space")));
        parts.map(|(a, b)| json!([a, b]))
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let mut model = bpe(tokens.iter().map(String::as_str));
    model["merges"] = Value::Array(merges);
    Ok(tokenizer(&model, &added(tokens, kinds(gguf, tokens)?), &Value::Null, &pre_tokenizer, &byte_level))
}

/// SentencePiece's BPE as merges: any two pieces that together are a piece may be merged, better scores first.
fn sentencepiece(gguf: &Gguf) -> Result<Value, LmError> {
    // Some files spell the runs of spaces with spaces.
    let tokens: Vec<String> =
        texts(gguf, "tokenizer.ggml.tokens")?.iter().map(|token| token.replace(' ', SPACE)).collect();
    let kinds = kinds(gguf, &tokens)?;
    let scores = match gguf.metadata().get("tokenizer.ggml.scores") {
        Some(GgufValue::Floats(scores)) if scores.len() == tokens.len() => scores,
        _ => return Err(fail("tokenizer.ggml.scores is missing or does not fit the tokens")),
    };
    let mut model = bpe(tokens.iter().map(String::as_str));
    model["merges"] = merges(&tokens, kinds, scores).into_iter().map(|(a, b)| json!([a, b])).collect();
    model["byte_fallback"] = json!(true);
    model["fuse_unk"] = json!(true);
    let unknown = id(gguf, "tokenizer.ggml.unknown_token_id").and_then(|id| tokens.get(id as usize));
    model["unk_token"] = json!(unknown);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = if flag(gguf, "tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]})
    } else {
        replace
    };
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]});
    Ok(tokenizer(&model, &added(&tokens, kinds), &normalizer, &Value::Null, &decoder))
}

/// All merges in the order they are tried.
fn merges<'a>(tokens: &'a [String], kinds: &[i64], scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() <= LONGEST_PIECE) {
        // Tokens with a place of their own come before everything that was learned.
        let own = matches!(kinds.get(id), Some(&(CONTROL | USER_DEFINED)));
        let score = if own { 0.0 } else { scores[id] };
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut parts: Vec<_> = splits
            .filter_map(|(a, b)| Some((ids.get(a)?, ids.get(b)?, a, b)))
            .map(|(a_id, b_id, a, b)| ((*a_id, *b_id), (score, a, b)))
            .collect();
        parts.sort_unstable_by_key(|(ids, _)| *ids);
        merges.extend(parts.into_iter().map(|(_, merge)| merge));
    }
    // Among equals the longer left part wins, then the longer right part, then the earlier token.
    let chars = |text: &str| text.chars().count();
    merges.sort_by(|(a_score, a_left, a_right), (b_score, b_left, b_right)| {
        let lengths = |left, right| (chars(left), chars(right));
        // Adding zero makes −0 equal to 0.
        (b_score + 0.0)
            .total_cmp(&(a_score + 0.0))
            .then_with(|| lengths(b_left, b_right).cmp(&lengths(a_left, a_right)))
    });
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}

fn bpe<'a>(tokens: impl Iterator<Item = &'a str>) -> Value {
    let vocab: serde_json::Map<_, _> =
        tokens.enumerate().map(|(id, token)| (token.to_owned(), json!(id))).collect();
    json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
           "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
           "vocab": vocab, "merges": []})
}

/// Control and user-defined tokens are taken out of the text whole; control tokens are special.
fn added(tokens: &[String], kinds: &[i64]) -> Value {
    let added = kinds.iter().enumerate().filter(|(_, kind)| matches!(**kind, CONTROL | USER_DEFINED));
    let entry = |(id, kind): (usize, &i64)| {
        json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": *kind == CONTROL})
    };
    added.map(entry).collect()
}

fn tokenizer(
    model: &Value,
    added: &Value,
    normalizer: &Value,
    pre_tokenizer: &Value,
    decoder: &Value,
) -> Value {
    json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "post_processor": null,
           "added_tokens": added, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model})
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String], LmError> {
    match gguf.metadata().get(key) {
        Some(GgufValue::Texts(texts)) => Ok(texts),
        _ => Err(fail(format!("{key} is missing or not a list of texts"))),
    }
}

fn kinds<'a>(gguf: &'a Gguf, tokens: &[String]) -> Result<&'a [i64], LmError> {
    match gguf.metadata().get("tokenizer.ggml.token_type") {
        Some(GgufValue::Integers(kinds)) if kinds.len() == tokens.len() => Ok(kinds),
        None => Ok(&[]),
        Some(_) => Err(fail("tokenizer.ggml.token_type does not fit the tokens")),
    }
}

fn id(gguf: &Gguf, key: &str) -> Option<u32> {
    match gguf.metadata().get(key) {
        Some(GgufValue::Integer(id)) => u32::try_from(*id).ok(),
        _ => None,
    }
}

fn flag(gguf: &Gguf, key: &str) -> Option<bool> {
    match gguf.metadata().get(key) {
        Some(GgufValue::Flag(flag)) => Some(*flag),
        _ => None,
    }
}
