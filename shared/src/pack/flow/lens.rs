//! `flow/lens/NNNNN.{safetensors,json}`: what the described latents say about the next token at each layer.
//!
//! A direction is the same at every layer; what differs is the residual stream it is added to, by whose size the final norm
//! divides. So a layer's lens is the change of the logits when the latent's mean contribution at that layer is added to the
//! layer's mean vector.

use serde::{Deserialize, Serialize};

use super::{LENS_WORDS, lens_numbers, lens_words};
use crate::pack::error::{PackError, check};
use crate::pack::features::{check_offsets, offsets};
use crate::pack::tensors::{Reader, Writer};

/// The lens of a few described latents, at every layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LensShard {
    /// Every distinct word of the shard.
    pub words: Vec<String>,
    /// `[s, L]`: of a latent where it was never active, empty.
    pub cells: Vec<LensCell>,
}

/// What adding a latent to a layer's mean vector does to the logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LensCell {
    /// The activation that was added: its mean over the tokens where the latent is active at this layer.
    pub activation: f32,
    /// Words (indices) whose logits rise most, with the rise, descending, at most [`LENS_WORDS`].
    pub raises: Vec<(u32, f32)>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    words: Vec<String>,
}

impl LensShard {
    /// The cell of the latent at place `place` of the shard at layer number `layer` of `n_layers`.
    #[must_use]
    pub fn cell(&self, place: usize, layer: usize, n_layers: usize) -> Option<&LensCell> {
        (layer < n_layers).then(|| self.cells.get(place * n_layers + layer)).flatten()
    }

    /// Reads shard `shard` of `n` latents at `n_layers` layers.
    ///
    /// # Errors
    /// If a tensor or list is missing, stray or misshapen, or an index or value is out of range.
    pub fn read(
        shard: usize,
        n: usize,
        n_layers: usize,
        numbers: &[u8],
        words: &[u8],
    ) -> Result<Self, PackError> {
        let (file, words_file) = (lens_numbers(shard), lens_words(shard));
        let reader = Reader::new(&file, numbers, &["activations", "offsets", "words", "values"])?;
        let words: Words = crate::pack::from_json(&words_file, words)?;
        let activations: Vec<f32> = reader.values("activations", &[n, n_layers])?;
        let starts: Vec<u32> = reader.values("offsets", &[n * n_layers + 1])?;
        let k = reader.shape("words")?.first().copied().unwrap_or(0);
        check_offsets(&file, "offsets", &starts, k)?;
        let indices: Vec<u32> = reader.values("words", &[k])?;
        let values: Vec<f32> = reader.values("values", &[k])?;
        let raises = |w: &[u32]| {
            let range = w[0] as usize..w[1] as usize;
            indices[range.clone()].iter().copied().zip(values[range].iter().copied()).collect()
        };
        let cells = activations.iter().zip(starts.windows(2));
        let cells = cells.map(|(&activation, w)| LensCell { activation, raises: raises(w) }).collect();
        let read = Self { words: words.words, cells };
        read.validate(shard)?;
        Ok(read)
    }

    /// The bytes of the two files of shard `shard` at `n_layers` layers.
    ///
    /// # Errors
    /// If a latent lacks a layer, or an index or value is out of range.
    pub fn write(&self, shard: usize, n_layers: usize) -> Result<(Vec<u8>, Vec<u8>), PackError> {
        self.validate(shard)?;
        let file = lens_numbers(shard);
        let n = self.cells.len() / n_layers.max(1);
        let starts = offsets(&file, self.cells.iter().map(|c| c.raises.len()))?;
        let all = || self.cells.iter().flat_map(|c| c.raises.iter().copied());
        let k = all().count();
        let mut writer = Writer::new(&file);
        writer.add("activations", &[n, n_layers], self.cells.iter().map(|c| c.activation))?;
        writer.add("offsets", &[starts.len()], starts)?;
        writer.add("words", &[k], all().map(|p| p.0))?;
        writer.add("values", &[k], all().map(|p| p.1))?;
        let words = Words { words: self.words.clone() };
        Ok((writer.finish()?, crate::pack::to_json(&lens_words(shard), &words, false)?))
    }

    fn validate(&self, shard: usize) -> Result<(), PackError> {
        let (file, n_words) = (lens_numbers(shard), self.words.len());
        for cell in &self.cells {
            let amount = cell.activation;
            check(amount >= 0.0, &file, "activations", "at least 0", amount)?;
            let n = cell.raises.len();
            check(n <= LENS_WORDS, &file, "offsets", format!("cells of at most {LENS_WORDS} words"), n)?;
            let stray = cell.raises.iter().find(|p| p.0 as usize >= n_words);
            check(stray.is_none(), &file, "words", format!("indices below {n_words}"), format!("{stray:?}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> LensShard {
        let cell = |activation, raises: &[(u32, f32)]| LensCell { activation, raises: raises.to_vec() };
        LensShard {
            words: vec!["a".to_owned(), " b".to_owned()],
            cells: vec![
                cell(0.5, &[(1, 2.0), (0, -0.5)]),
                LensCell::default(),
                LensCell::default(),
                cell(1.5, &[(0, 0.25)]),
            ],
        }
    }

    #[test]
    fn round_trip() {
        let (numbers, words) = shard().write(3, 2).unwrap();
        let read = LensShard::read(3, 2, 2, &numbers, &words).unwrap();
        assert_eq!(read, shard());
        assert_eq!(read.cell(1, 1, 2).unwrap().activation, 1.5);
        assert_eq!((read.cell(1, 2, 2), read.cell(2, 0, 2)), (None, None));
        assert!(LensShard::read(3, 1, 2, &numbers, &words).is_err(), "another number of latents");
        assert!(LensShard::read(3, 2, 3, &numbers, &words).is_err(), "another number of layers");
        assert!(LensShard::read(3, 2, 2, &numbers, b"{\"words\": [\"a\"]}").is_err(), "a word out of range");
    }

    #[test]
    fn each_rule_is_enforced() {
        type Breaks = fn(&mut LensShard);
        let broken: [(&str, Breaks); 5] = [
            ("activations", |l| l.cells[0].activation = -1.0),
            ("activations", |l| l.cells[0].activation = f32::NAN),
            ("offsets", |l| l.cells[0].raises = vec![(0, 1.0); LENS_WORDS + 1]),
            ("words", |l| l.cells[0].raises[0].0 = 2),
            ("activations", |l| l.cells.truncate(3)),
        ];
        for (field, breaks) in broken {
            let mut l = shard();
            breaks(&mut l);
            let error = l.write(3, 2).expect_err(field).to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
    }

    #[test]
    fn hostile_bytes_are_errors() {
        let (numbers, words) = shard().write(0, 2).unwrap();
        for end in 0..numbers.len() {
            assert!(LensShard::read(0, 2, 2, &numbers[..end], &words).is_err(), "cut at {end}");
        }
        for at in 0..numbers.len() {
            let mut damaged = numbers.clone();
            damaged[at] ^= 0x41;
            if let Ok(read) = LensShard::read(0, 2, 2, &damaged, &words) {
                assert!(read.write(0, 2).is_ok(), "byte {at}");
            }
        }
    }
}
