//! What a harvest does: which text, which model, which taps, how much, and how it is stored.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Count, Portion};
use crate::tap::{Site, TapPoint};

/// The number type vectors are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreDtype {
    /// 32-bit IEEE float.
    F32,
    /// bfloat16: the range of `f32`, 8 bits of precision.
    Bf16,
    /// 16-bit IEEE float: 11 bits of precision, magnitudes up to 65504.
    F16,
}

impl StoreDtype {
    /// Bytes a value takes.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name safetensors headers use.
    #[must_use]
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }
}

/// A harvest, resolved. Two runs with equal configurations over equal inputs write equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HarvestConfig {
    /// The model: a Hugging Face folder or a GGUF file.
    pub model: String,
    /// Text files and folders (`.txt`, `.jsonl`, `.parquet`, compressed `.gz` or `.zst`).
    pub text: Vec<String>,
    /// The field of `.jsonl` records and the column of `.parquet` files that holds the text.
    pub text_column: String,
    /// Joins hard-wrapped lines: a line break between two lines that hold text becomes a space.
    pub unwrap_lines: bool,
    /// Documents longer than this many bytes are cut, at a paragraph or line end where there is one.
    pub max_document_bytes: Count,
    /// Files read side by side, so that a small harvest from many long files sees many of them.
    pub interleave_files: usize,
    /// Taps: `resid.14`, a whole site `resid`, or `all` (resid, mlp and attn of every layer).
    pub taps: Vec<String>,
    /// Tokens given to the model, training and held-out together.
    pub tokens: Count,
    /// The part of `tokens` that is held out: a share or a number of tokens.
    pub held_out: Portion,
    /// Text is held out in parts of this many tokens of one document (or the whole document if shorter).
    pub held_out_part: usize,
    /// Tokens of a sequence, the beginning-of-sequence token included where the model wants one.
    pub sequence_length: usize,
    /// Put between documents: `auto` (the model's end-of-text token, else its beginning-of-sequence token), `none`, or a special token's text.
    pub separator: String,
    /// Sequences in one forward pass.
    pub batch: usize,
    /// Vectors at special tokens (beginning of sequence, separators) are not stored.
    pub drop_special: bool,
    /// Positions of a sequence whose vectors are not stored; position 0 attracts attention whatever its token.
    pub drop_positions: Vec<u32>,
    /// The number type of the stored vectors.
    pub dtype: StoreDtype,
    /// Vectors shuffled together.
    pub bucket_vectors: Count,
    /// The most vectors in one shard file.
    pub shard_vectors: Count,
    /// Decides the order of files and sequences, what is held out, and every shuffle.
    pub seed: u64,
}

impl Default for HarvestConfig {
    fn default() -> Self {
        Self {
            model: String::new(),
            text: Vec::new(),
            text_column: "text".to_owned(),
            unwrap_lines: false,
            max_document_bytes: Count(1_000_000),
            interleave_files: 64,
            taps: Vec::new(),
            tokens: Count(1_000_000),
            held_out: Portion::Share(0.05),
            held_out_part: 2048,
            sequence_length: 256,
            separator: "auto".to_owned(),
            batch: 8,
            drop_special: true,
            drop_positions: vec![0],
            dtype: StoreDtype::F32,
            bucket_vectors: Count(1_000_000),
            shard_vectors: Count(65_536),
            seed: 0,
        }
    }
}

/// The longest sequence, largest batch and most interleaved files that are taken seriously.
const MOST: usize = 1 << 20;

impl HarvestConfig {
    /// Checks what types alone do not say.
    ///
    /// # Errors
    /// Names the key, the value and what is allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let within = |key, value: usize, least: usize, most: usize| {
            let ok = (least..=most).contains(&value);
            ok.then_some(()).ok_or_else(|| ConfigError::value(key, value, format!("{least} to {most}")))
        };
        let positive = |key, value: Count| {
            (value.0 > 0).then_some(()).ok_or_else(|| ConfigError::value(key, value, "at least 1"))
        };
        if self.model.is_empty() {
            return Err(ConfigError::value("model", "empty", "a model folder or a .gguf file"));
        }
        if self.text.is_empty() {
            return Err(ConfigError::value("text", "empty", "at least one text file or folder"));
        }
        if self.taps.is_empty() {
            return Err(ConfigError::value("taps", "empty", "at least one tap, as in [\"resid.14\"]"));
        }
        within("sequence_length", self.sequence_length, 2, MOST)?;
        within("batch", self.batch, 1, MOST)?;
        within("interleave_files", self.interleave_files, 1, 4096)?;
        within("held_out_part", self.held_out_part, 1, usize::MAX)?;
        within(
            "max_document_bytes",
            usize::try_from(self.max_document_bytes.0).unwrap_or(usize::MAX),
            64,
            1 << 30,
        )?;
        positive("tokens", self.tokens)?;
        positive("bucket_vectors", self.bucket_vectors)?;
        positive("shard_vectors", self.shard_vectors)?;
        if self.bucket_vectors.0 > u64::from(u32::MAX) {
            return Err(ConfigError::value("bucket_vectors", self.bucket_vectors, "below 2^32"));
        }
        if self.held_out.of(self.tokens.0) >= self.tokens.0 {
            let expected = format!("less than tokens = {}", self.tokens);
            return Err(ConfigError::value("held_out", self.held_out.of(self.tokens.0), expected));
        }
        Ok(())
    }

    /// The taps asked for, in ascending order without repeats, in a model of `n_layers` blocks.
    ///
    /// # Errors
    /// If an entry names no tap, or a layer the model does not have.
    pub fn tap_points(&self, n_layers: usize) -> Result<Vec<TapPoint>, ConfigError> {
        let every_layer = |site| (0..n_layers).map(move |layer| TapPoint { site, layer });
        let mut points = BTreeSet::new();
        for text in &self.taps {
            if text == "all" {
                points.extend([Site::Resid, Site::Mlp, Site::Attn].into_iter().flat_map(every_layer));
            } else if text == "embed" {
                points.insert(TapPoint { site: Site::Embed, layer: 0 });
            } else if let Ok(site) = text.parse() {
                points.extend(every_layer(site));
            } else {
                let point: TapPoint = text.parse().map_err(|e| {
                    ConfigError::value("taps", format!("`{text}`"), format!("resid.14, resid or all ({e})"))
                })?;
                if point.layer >= n_layers {
                    return Err(ConfigError::value("taps", point, format!("a layer below {n_layers}")));
                }
                points.insert(point);
            }
        }
        Ok(points.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Override, resolve, to_toml};

    fn config(text: &str) -> HarvestConfig {
        resolve(text, &[]).unwrap()
    }

    #[test]
    fn human_numbers_and_round_trip() {
        let mut made = config("tokens = \"300k\"\nheld_out = \"5%\"\ndtype = \"bf16\"\n");
        assert_eq!(
            (made.tokens, made.held_out, made.dtype),
            (Count(300_000), Portion::Share(0.05), StoreDtype::Bf16)
        );
        assert_eq!(config(&to_toml(&made).unwrap()), made);
        made.held_out = Portion::Tokens(Count(15_000));
        assert_eq!(config(&to_toml(&made).unwrap()), made);
        let error =
            resolve::<HarvestConfig>("", &[Override::parse("tokens=lots").unwrap()]).unwrap_err().to_string();
        assert!(error.contains("tokens") && error.contains("300k"), "{error}");
    }

    #[test]
    fn validation_names_the_key() {
        let good = "model = \"m\"\ntext = [\"t\"]\ntaps = [\"resid.1\"]\n";
        config(good).validate().unwrap();
        for (line, key) in [
            ("sequence_length = 1", "sequence_length"),
            ("batch = 0", "batch"),
            ("tokens = 0", "tokens"),
            ("tokens = 100\nheld_out = 100", "held_out"),
            ("shard_vectors = 0", "shard_vectors"),
            ("interleave_files = 0", "interleave_files"),
        ] {
            let error = config(&format!("{good}{line}\n")).validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{line}: {error}");
        }
        assert!(config("").validate().unwrap_err().to_string().contains("`model`"));
    }

    #[test]
    fn taps_expand_and_are_checked() {
        let names = |taps: &str| {
            config(&format!("taps = {taps}"))
                .tap_points(2)
                .map(|points| points.iter().map(TapPoint::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(names("[\"mlp.1\", \"resid.0\", \"mlp.1\"]").unwrap(), "resid.0 mlp.1");
        assert_eq!(names("[\"resid\"]").unwrap(), "resid.0 resid.1");
        assert_eq!(names("[\"all\"]").unwrap(), "resid.0 resid.1 mlp.0 mlp.1 attn.0 attn.1");
        assert_eq!(names("[\"embed\"]").unwrap(), "embed.0");
        assert!(names("[\"resid.2\"]").unwrap_err().to_string().contains("below 2"));
        assert!(names("[\"ffn.0\"]").unwrap_err().to_string().contains("ffn.0"));
    }
}
