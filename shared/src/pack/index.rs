//! `index.safetensors` and `index.json`: one row a latent, all that a sortable, searchable list needs.

use serde::{Deserialize, Serialize};

use super::error::{PackError, check};
use super::tensors::{Reader, Writer};
use super::{INDEX_NUMBERS, INDEX_WORDS, INDEX_WORDS_FILE};

/// One row a latent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Index {
    /// Share of tokens on which the latent is active, `[n_latents]`, in `[0, 1]`.
    pub density: Vec<f32>,
    /// Largest activation seen, `[n_latents]`; zero when it never fired.
    pub max_activation: Vec<f32>,
    /// Mean activation over the tokens where it is active, `[n_latents]`; zero when it never fired.
    pub mean_activation: Vec<f32>,
    /// Tokens with the most activation in total, at most [`INDEX_WORDS`], `[n_latents]`.
    pub top_tokens: Vec<Vec<String>>,
    /// Tokens whose logits it raises most, at most [`INDEX_WORDS`], `[n_latents]`.
    pub top_logits: Vec<Vec<String>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    top_tokens: Vec<Vec<String>>,
    top_logits: Vec<Vec<String>>,
}

impl Index {
    /// Reads both files of the index of `n_latents` latents.
    ///
    /// # Errors
    /// If a tensor or list has another length, or a value is out of its range.
    pub fn read(n_latents: usize, numbers: &[u8], words: &[u8]) -> Result<Self, PackError> {
        let reader = Reader::new(INDEX_NUMBERS, numbers, &["density", "max_activation", "mean_activation"])?;
        let words: Words = super::from_json(INDEX_WORDS_FILE, words)?;
        let index = Self {
            density: reader.values("density", &[n_latents])?,
            max_activation: reader.values("max_activation", &[n_latents])?,
            mean_activation: reader.values("mean_activation", &[n_latents])?,
            top_tokens: words.top_tokens,
            top_logits: words.top_logits,
        };
        index.validate(n_latents)?;
        Ok(index)
    }

    /// The bytes of `index.safetensors` and of `index.json`.
    ///
    /// # Errors
    /// If lengths differ or a value is out of its range.
    pub fn write(&self) -> Result<(Vec<u8>, Vec<u8>), PackError> {
        let n = self.density.len();
        self.validate(n)?;
        let mut writer = Writer::new(INDEX_NUMBERS);
        writer.add("density", &[n], self.density.iter().copied())?;
        writer.add("max_activation", &[n], self.max_activation.iter().copied())?;
        writer.add("mean_activation", &[n], self.mean_activation.iter().copied())?;
        let words = Words { top_tokens: self.top_tokens.clone(), top_logits: self.top_logits.clone() };
        Ok((writer.finish()?, super::to_json(INDEX_WORDS_FILE, &words, false)?))
    }

    fn validate(&self, n: usize) -> Result<(), PackError> {
        for (name, values, most) in [
            ("density", &self.density, 1.0),
            ("max_activation", &self.max_activation, f32::MAX),
            ("mean_activation", &self.mean_activation, f32::MAX),
        ] {
            if let Some(i) = values.iter().position(|v| !(0.0..=most).contains(v)) {
                let found = format!("{} at latent {i}", values[i]);
                return Err(PackError::invalid(INDEX_NUMBERS, name, format!("values in 0..={most}"), found));
            }
        }
        for (name, lists) in [("top_tokens", &self.top_tokens), ("top_logits", &self.top_logits)] {
            check(lists.len() == n, INDEX_WORDS_FILE, name, format!("{n} lists"), lists.len())?;
            let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
            check(
                longest <= INDEX_WORDS,
                INDEX_WORDS_FILE,
                name,
                format!("at most {INDEX_WORDS} strings"),
                longest,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        Index {
            density: vec![0.0, 0.25],
            max_activation: vec![0.0, 7.5],
            mean_activation: vec![0.0, 2.5],
            top_tokens: vec![vec![], vec![" a".to_owned(), "\n".to_owned()]],
            top_logits: vec![vec!["\u{e9}".to_owned()], vec![]],
        }
    }

    #[test]
    fn round_trip() {
        let (numbers, words) = index().write().unwrap();
        assert_eq!(Index::read(2, &numbers, &words).unwrap(), index());
        assert!(Index::read(3, &numbers, &words).is_err());
    }

    #[test]
    fn each_rule_is_enforced() {
        let broken: [fn(&mut Index); 5] = [
            |i| i.density[1] = 1.5,
            |i| i.max_activation[0] = -1.0,
            |i| i.mean_activation[0] = f32::NAN,
            |i| drop(i.top_tokens.pop()),
            |i| i.top_logits[0] = vec![String::new(); INDEX_WORDS + 1],
        ];
        for (k, breaks) in broken.iter().enumerate() {
            let mut i = index();
            breaks(&mut i);
            assert!(i.write().is_err(), "rule {k} not enforced");
        }
    }
}
