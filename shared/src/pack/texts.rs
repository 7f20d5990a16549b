//! `texts.json` and `texts/NN.safetensors`: bundled texts with the activations the page encodes live.

use serde::{Deserialize, Serialize};

use super::error::{PackError, check};
use super::tensors::{Reader, Writer};
use super::{TEXTS, is_safe_path};

/// Most texts a pack may hold; their files are numbered with two digits.
const MAX_TEXTS: usize = 100;

/// One line of `texts.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextEntry {
    /// Short name for links.
    pub id: String,
    /// Name for people.
    pub title: String,
    /// Where the text is from.
    pub source: String,
    /// Path of its numbers inside the pack.
    pub file: String,
    /// Its tokens as readable words, `[n_tokens]`.
    pub words: Vec<String>,
}

/// The numbers of one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// Token ids, `[n_tokens]`.
    pub tokens: Vec<u32>,
    /// Raw activations at the tap, `[n_tokens, d_in]`.
    pub x: Vec<f32>,
    /// Tokens that are never encoded: special ones and attention sinks, `[n_tokens]`.
    pub skip: Vec<bool>,
}

impl TextEntry {
    /// Reads `texts.json`.
    ///
    /// # Errors
    /// If it is not a list of texts, an id repeats, or a path leaves the pack.
    pub fn read_list(bytes: &[u8]) -> Result<Vec<Self>, PackError> {
        let list: Vec<Self> = super::from_json(TEXTS, bytes)?;
        Self::validate_list(&list)?;
        Ok(list)
    }

    /// The bytes of `texts.json`.
    ///
    /// # Errors
    /// If an id repeats or a path leaves the pack.
    pub fn write_list(list: &[Self]) -> Result<Vec<u8>, PackError> {
        Self::validate_list(list)?;
        super::to_json(TEXTS, &list, false)
    }

    fn validate_list(list: &[Self]) -> Result<(), PackError> {
        check(list.len() <= MAX_TEXTS, TEXTS, "list", format!("at most {MAX_TEXTS} texts"), list.len())?;
        for (i, entry) in list.iter().enumerate() {
            let fresh = list[..i].iter().all(|other| other.id != entry.id);
            check(fresh && is_safe_path(&entry.id), TEXTS, "id", "a new plain name", &entry.id)?;
            check(is_safe_path(&entry.file), TEXTS, "file", "a plain relative path", &entry.file)?;
            check(!entry.words.is_empty(), TEXTS, "words", "at least one", 0)?;
        }
        Ok(())
    }
}

impl Text {
    /// Reads the numbers of `entry`, whose activations are `d_in` wide.
    ///
    /// # Errors
    /// If tensors are missing, stray, misshapen or not finite.
    pub fn read(entry: &TextEntry, d_in: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let n = entry.words.len();
        let reader = Reader::new(&entry.file, bytes, &["tokens", "x", "skip"])?;
        let skip: Vec<u8> = reader.values("skip", &[n])?;
        let stray = skip.iter().find(|&&s| s > 1);
        check(stray.is_none(), &entry.file, "skip", "0 or 1", format!("{stray:?}"))?;
        Ok(Self {
            tokens: reader.values("tokens", &[n])?,
            x: reader.values("x", &[n, d_in])?,
            skip: skip.into_iter().map(|s| s == 1).collect(),
        })
    }

    /// The bytes of the file of these numbers, called `file` in errors.
    ///
    /// # Errors
    /// If lengths differ or a value is not finite.
    pub fn write(&self, file: &str) -> Result<Vec<u8>, PackError> {
        let n = self.tokens.len();
        let mut writer = Writer::new(file);
        writer.add("tokens", &[n], self.tokens.iter().copied())?;
        writer.add("x", &[n, self.x.len() / n.max(1)], self.x.iter().copied())?;
        writer.add("skip", &[n], self.skip.iter().map(|&s| u8::from(s)))?;
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> TextEntry {
        let words = vec!["a".to_owned(), " b".to_owned()];
        let (title, source) = ("T".to_owned(), "S".to_owned());
        TextEntry { id: id.to_owned(), title, source, file: "texts/00.safetensors".to_owned(), words }
    }

    fn text() -> Text {
        Text { tokens: vec![5, 6], x: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], skip: vec![true, false] }
    }

    #[test]
    fn round_trip() {
        let list = vec![entry("one"), entry("two")];
        assert_eq!(TextEntry::read_list(&TextEntry::write_list(&list).unwrap()).unwrap(), list);
        let bytes = text().write("texts/00.safetensors").unwrap();
        assert_eq!(Text::read(&list[0], 3, &bytes).unwrap(), text());
        assert!(Text::read(&list[0], 2, &bytes).is_err(), "another width");
    }

    #[test]
    fn each_rule_is_enforced() {
        assert!(TextEntry::write_list(&[entry("one"), entry("one")]).is_err(), "repeated id");
        assert!(TextEntry::write_list(&[TextEntry { file: "../x".to_owned(), ..entry("one") }]).is_err());
        assert!(TextEntry::write_list(&[TextEntry { words: vec![], ..entry("one") }]).is_err());
        assert!(Text { skip: vec![true], ..text() }.write("f").is_err(), "short skip");
        assert!(Text { x: vec![f32::INFINITY; 6], ..text() }.write("f").is_err());
    }
}
