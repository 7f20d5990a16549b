//! What a harvest does: which text, which model, which taps, how much, and how it is stored.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Count, Portion};
use crate::precision::Precision;
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
    /// The model: a Hugging Face folder, a GGUF file, or a model of the hub (`org/name@revision`).
    pub model: String,
    /// The number format the model's matrices are kept and multiplied in: `f32`, `bf16` or `q8_0`.
    pub precision: Precision,
    /// Text files and folders (`.txt`, `.jsonl`, `.json`, compressed `.gz` or `.zst`, `.parquet`, `.arrow`), and data sets of
    /// the hub (`hf://datasets/org/name@revision/path`).
    pub text: Vec<String>,
    /// The field of JSON records and the column of Parquet and Arrow files that holds the text.
    pub text_column: String,
    /// The field or column that holds token ids, for texts that were tokenised before; instead of `text_column`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_column: Option<String>,
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
    /// Files read side by side take turns of this many tokens of a document (or what is left of it).
    pub part_tokens: usize,
    /// Whether a sequence may hold pieces of several documents. If not, what is left of a document after its last whole
    /// sequence is not used.
    pub pack: bool,
    /// Tokens of a sequence, the beginning-of-sequence token included where the model wants one.
    pub sequence_length: usize,
    /// Put in front of every sequence: `auto` (the beginning-of-sequence token, if the model was trained with one), `none`,
    /// `always` (the tokenizer's, even so), or a special token's text.
    pub bos: String,
    /// Put between documents: `auto` (the model's end-of-text token, else its beginning-of-sequence token), `none`, or a special token's text.
    pub separator: String,
    /// Sequences in one forward pass.
    pub batch: usize,
    /// Tokens whose vectors are not stored: the classes `special` (beginning of sequence, separators), `whitespace`,
    /// `punctuation` and `digits`, single tokens by their text (`text: the`) or id (`id:13`).
    pub drop_tokens: Vec<String>,
    /// Positions of a sequence whose vectors are not stored, from its end where negative; position 0 attracts attention
    /// whatever its token.
    pub drop_positions: Vec<i64>,
    /// The number type of the stored vectors.
    pub dtype: StoreDtype,
    /// Vectors shuffled together. Unless set, a million; straight into training, where a bucket is held in memory, fewer if it
    /// would hold more than 2.5 GiB over all taps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket_vectors: Option<Count>,
    /// The most vectors in one shard file. Unless set, such that training, which holds two shards of all its taps, needs at most
    /// 256 MiB for one: a power of two up to 65,536, and at least 1,024.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_vectors: Option<Count>,
    /// Decides the order of files and sequences, what is held out, and every shuffle.
    pub seed: u64,
    /// Where token sequences are kept for the next harvest: a folder, `auto` (the user's cache) or `none`. It changes no byte
    /// of the result, so it is not written with it; unset, the command decides.
    #[serde(skip_serializing)]
    pub token_cache: Option<String>,
}

impl Default for HarvestConfig {
    fn default() -> Self {
        Self {
            model: String::new(),
            precision: Precision::F32,
            text: Vec::new(),
            text_column: "text".to_owned(),
            token_column: None,
            unwrap_lines: false,
            max_document_bytes: Count(1_000_000),
            interleave_files: 64,
            taps: Vec::new(),
            tokens: Count(1_000_000),
            held_out: Portion::Share(0.05),
            part_tokens: 2048,
            pack: true,
            sequence_length: 256,
            bos: "auto".to_owned(),
            separator: "auto".to_owned(),
            batch: 8,
            drop_tokens: vec![SPECIAL.to_owned()],
            drop_positions: vec![0],
            dtype: StoreDtype::F32,
            bucket_vectors: None,
            shard_vectors: None,
            seed: 0,
            token_cache: None,
        }
    }
}

/// The class of tokens that stand for structure, in [`HarvestConfig::drop_tokens`].
pub const SPECIAL: &str = "special";
/// Vectors of a bucket, and the most of a shard, unless set.
const BUCKET_ROWS: u64 = 1_000_000;
const SHARD_ROWS: u64 = 65_536;
/// The fewest: what is shuffled together, and read at once, should be many sequences.
const FEWEST_ROWS: u64 = 1024;
/// What all taps of a bucket in memory, and of a shard, may take in f32.
const BUCKET_BYTES: u64 = 5 << 29;
const SHARD_BYTES: u64 = 256 << 20;

/// `most`, or where so many rows of `values` f32 values take more than `bytes`, the largest power of two that does not.
fn rows_within(bytes: u64, values: usize, most: u64) -> u64 {
    let fit = (bytes / (4 * values.max(1) as u64)).max(FEWEST_ROWS);
    if fit >= most { most } else { 1 << fit.ilog2() }
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
        within("part_tokens", self.part_tokens, 1, usize::MAX)?;
        self.dropped_positions()?;
        within(
            "max_document_bytes",
            usize::try_from(self.max_document_bytes.0).unwrap_or(usize::MAX),
            64,
            1 << 30,
        )?;
        positive("tokens", self.tokens)?;
        if let Some(bucket_vectors) = self.bucket_vectors {
            positive("bucket_vectors", bucket_vectors)?;
            if bucket_vectors.0 > u64::from(u32::MAX) {
                return Err(ConfigError::value("bucket_vectors", bucket_vectors, "below 2^32"));
            }
        }
        if let Some(shard_vectors) = self.shard_vectors {
            positive("shard_vectors", shard_vectors)?;
        }
        if self.held_out.of(self.tokens.0) >= self.tokens.0 {
            let expected = format!("less than tokens = {}", self.tokens);
            return Err(ConfigError::value("held_out", self.held_out.of(self.tokens.0), expected));
        }
        Ok(())
    }

    /// The positions whose vectors are not stored, counted from the front, ascending without repeats.
    ///
    /// # Errors
    /// If one lies outside a sequence.
    pub fn dropped_positions(&self) -> Result<Vec<u32>, ConfigError> {
        let length = i64::try_from(self.sequence_length).unwrap_or(i64::MAX);
        let mut positions = BTreeSet::new();
        for &given in &self.drop_positions {
            let position = if given < 0 { given.saturating_add(length) } else { given };
            let inside = (0..length).contains(&position).then(|| u32::try_from(position).ok()).flatten();
            positions.insert(inside.ok_or_else(|| {
                ConfigError::value("drop_positions", given, format!("{} to {}", -length, length - 1))
            })?);
        }
        Ok(positions.into_iter().collect())
    }

    /// Vectors of a bucket on disk.
    #[must_use]
    pub fn bucket_rows(&self) -> u64 {
        self.bucket_vectors.map_or(BUCKET_ROWS, |rows| rows.0)
    }

    /// Vectors of a bucket in memory, where the taps together have `values` values at a token.
    #[must_use]
    pub fn live_bucket_rows(&self, values: usize) -> u64 {
        self.bucket_vectors.map_or_else(|| rows_within(BUCKET_BYTES, values, BUCKET_ROWS), |rows| rows.0)
    }

    /// The most vectors of a shard, where the taps together have `values` values at a token.
    #[must_use]
    pub fn shard_rows(&self, values: usize) -> u64 {
        self.shard_vectors.map_or_else(|| rows_within(SHARD_BYTES, values, SHARD_ROWS), |rows| rows.0)
    }

    /// This with the sizes that were left open as `made` has them: what is already there was made with these.
    #[must_use]
    pub fn as_begun(&self, made: &Self) -> Self {
        Self {
            bucket_vectors: self.bucket_vectors.or(made.bucket_vectors),
            shard_vectors: self.shard_vectors.or(made.shard_vectors),
            ..self.clone()
        }
    }

    /// Whether vectors at special tokens are left out.
    #[must_use]
    pub fn drops_special(&self) -> bool {
        self.drop_tokens.iter().any(|class| class == SPECIAL)
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
            ("part_tokens = 0", "part_tokens"),
            ("drop_positions = [256]", "drop_positions"),
            ("drop_positions = [-257]", "drop_positions"),
        ] {
            let error = config(&format!("{good}{line}\n")).validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{line}: {error}");
        }
        assert!(config("").validate().unwrap_err().to_string().contains("`model`"));
    }

    #[test]
    fn shards_and_live_buckets_shrink_with_what_a_token_takes() {
        let open = HarvestConfig::default();
        // One tap of a small model; 30 of 576 and 126 of 3584 values.
        let sizes = [576, 2304, 30 * 576, 126 * 3584];
        assert_eq!(sizes.map(|values| open.shard_rows(values)), [65_536, 16_384, 2048, 1024]);
        assert_eq!(sizes.map(|values| open.live_bucket_rows(values)), [1_000_000, 262_144, 32_768, 1024]);
        let said = config("shard_vectors = '3k'\nbucket_vectors = '5k'");
        assert_eq!(
            [said.shard_rows(1 << 20), said.live_bucket_rows(1 << 20), said.bucket_rows()],
            [3000, 5000, 5000]
        );
        assert_eq!((open.as_begun(&said), said.as_begun(&open)), (said.clone(), said));
    }

    #[test]
    fn positions_count_from_both_ends() {
        let config = config("sequence_length = 8\ndrop_positions = [-1, 0, 7, -8, 2]\n");
        assert_eq!(config.dropped_positions().unwrap(), [0, 2, 7]);
        assert!(
            !to_toml(&HarvestConfig { token_cache: Some("x".to_owned()), ..config })
                .unwrap()
                .contains("cache")
        );
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
