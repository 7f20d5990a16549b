//! `manifest.json`: everything a store is, read strictly and checked against itself before anything is trusted.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use shared::config::harvest::StoreDtype;
use shared::tap::TapPoint;

use crate::model::ModelProvenance;

/// The value of [`Manifest::format`].
pub const FORMAT: &str = "stratascope-store";
/// The version this program writes.
pub const VERSION: u32 = 2;
/// The oldest version it reads; the first had no [`FileInfo::crc64`].
pub const OLDEST: u32 = 1;
/// More sequences, vectors or bytes than this are a fault of the manifest, not a store.
const MOST: u64 = 1 << 53;

/// Which half of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What autoencoders are fitted to.
    Train,
    /// What they are measured on; shares no text with [`Split::Train`].
    HeldOut,
}

impl Split {
    /// Both splits, in the order they are harvested.
    pub const ALL: [Self; 2] = [Self::Train, Self::HeldOut];

    /// The name of the split's folder.
    #[must_use]
    pub fn folder(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "held_out",
        }
    }
}

/// A file of the store: its length and its checksums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Its length in bytes.
    pub bytes: u64,
    /// Lower-case hexadecimal SHA-256 of its bytes.
    pub sha256: String,
    /// CRC-64/NVME of its bytes, 16 lower-case hexadecimal digits: what every reading is checked with, because it is
    /// many times faster than SHA-256. Files of version 1 have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc64: Option<String>,
}

/// The tokenizer's part in what a sequence looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerInfo {
    /// The number of ids.
    pub vocab_size: usize,
    /// The token every sequence begins with, where the model wants one.
    pub bos: Option<u32>,
    /// The token put between documents, if any.
    pub separator: Option<u32>,
    /// Ids that stand for structure rather than text, ascending.
    pub special_ids: Vec<u32>,
    /// Ids whose vectors are not stored although they are not special, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped_ids: Vec<u32>,
}

/// Which vectors of a sequence are not stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropped {
    /// Whether vectors at special tokens are left out.
    pub special_tokens: bool,
    /// Positions left out whatever their token, ascending.
    pub positions: Vec<u32>,
}

impl Dropped {
    /// Whether the vector of `token` at `position` is stored.
    #[must_use]
    pub fn keeps(&self, tokenizer: &TokenizerInfo, position: u32, token: u32) -> bool {
        let special = self.special_tokens && tokenizer.special_ids.binary_search(&token).is_ok();
        let named = tokenizer.dropped_ids.binary_search(&token).is_ok();
        !special && !named && self.positions.binary_search(&position).is_err()
    }
}

/// One tap of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapInfo {
    /// Where it was read.
    pub point: TapPoint,
    /// Values of a vector.
    pub width: usize,
    /// C, with C² the mean of ‖x‖² over the stored training vectors: dividing by it makes their mean squared norm 1.
    pub scale: f64,
    /// `train/<tap>/mean.safetensors`: the mean of the stored training vectors, `mean [width]` f32.
    pub mean: FileInfo,
}

/// One shard: the same vectors' activations, in the same order, one file a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// Its number of vectors.
    pub n_vectors: u64,
    /// Its file for each tap, in the order of [`Manifest::taps`].
    pub files: Vec<FileInfo>,
}

/// One half of the text: its tokens and its shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitInfo {
    /// The number of sequences.
    pub n_sequences: u64,
    /// The number of stored vectors of each tap.
    pub n_vectors: u64,
    /// `<split>/tokens.safetensors`: `ids [n_sequences, sequence_length]` u32.
    pub tokens: FileInfo,
    /// The shards in order.
    pub shards: Vec<ShardInfo>,
}

/// A text file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextFile {
    /// Its name without folders.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Documents taken from it.
    pub documents: u64,
}

/// What was found in the text on the way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextCounts {
    /// Documents tokenised.
    pub documents: u64,
    /// Documents and records left out because they hold no text.
    pub empty: u64,
    /// Records left out because they cannot be read or have no text field.
    pub malformed: u64,
    /// Documents in which invalid UTF-8 was replaced by U+FFFD.
    pub invalid_utf8: u64,
    /// Documents cut because they exceed the longest allowed.
    pub cut: u64,
    /// Documents left out because they are shorter than a sequence; only where sequences may not hold several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub short: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The whole of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// [`OLDEST`] to [`VERSION`].
    pub version: u32,
    /// The program that wrote the store.
    pub writer: String,
    /// The model.
    pub model: ModelProvenance,
    /// The number of blocks of the model.
    pub n_layers: usize,
    /// The width of its residual stream.
    pub d_model: usize,
    /// Its tokenizer.
    pub tokenizer: TokenizerInfo,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// What was left out.
    pub dropped: Dropped,
    /// The number type of the vectors.
    pub dtype: StoreDtype,
    /// Vectors shuffled together.
    pub bucket_vectors: u64,
    /// The seed of every choice.
    pub seed: u64,
    /// The taps, ascending.
    pub taps: Vec<TapInfo>,
    /// What autoencoders are fitted to.
    pub train: SplitInfo,
    /// What they are measured on.
    pub held_out: SplitInfo,
    /// The text files, in the order they were opened.
    pub text: Vec<TextFile>,
    /// What was found in them.
    pub text_counts: TextCounts,
}

/// A manifest that contradicts itself or cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}, expected {expected}")]
pub struct ManifestError {
    field: String,
    found: String,
    expected: String,
}

#[expect(clippy::needless_pass_by_value, reason = "callers give numbers and texts made on the spot")]
fn fault(field: impl Into<String>, found: impl ToString, expected: impl Into<String>) -> ManifestError {
    ManifestError { field: field.into(), found: found.to_string(), expected: expected.into() }
}

impl Manifest {
    /// The half `split`.
    #[must_use]
    pub fn split(&self, split: Split) -> &SplitInfo {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }

    /// Whether the vector of `token` at `position` is stored.
    #[must_use]
    pub fn keeps(&self, position: usize, token: u32) -> bool {
        u32::try_from(position).is_ok_and(|position| self.dropped.keeps(&self.tokenizer, position, token))
    }

    /// Every file of the store but the manifest and the settings: its name below the store, and what it must be.
    #[must_use]
    pub fn files(&self) -> Vec<(String, &FileInfo)> {
        let mut files: Vec<_> =
            self.taps.iter().map(|tap| (super::mean_name(tap.point), &tap.mean)).collect();
        for split in Split::ALL {
            let info = self.split(split);
            files.push((super::tokens_name(split), &info.tokens));
            for (index, shard) in info.shards.iter().enumerate() {
                let taps = self.taps.iter().zip(&shard.files);
                files.extend(taps.map(|(tap, file)| (super::shard_name(tap.point, split, index), file)));
            }
        }
        files
    }

    /// Bytes of all shard files together.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        let files = [&self.train, &self.held_out].into_iter().flat_map(|s| &s.shards).flat_map(|s| &s.files);
        files.map(|f| f.bytes).sum()
    }

    /// Checks the manifest against itself: format, ascending taps, counts that add up, sizes that can be meant.
    ///
    /// # Errors
    /// Names the field, what was found and what was expected.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.format != FORMAT {
            return Err(fault("format", format!("`{}`", self.format), format!("`{FORMAT}`")));
        }
        if !(OLDEST..=VERSION).contains(&self.version) {
            return Err(fault("version", self.version, format!("{OLDEST} to {VERSION}")));
        }
        if !(1..=1 << 24).contains(&self.sequence_length) {
            return Err(fault("sequence_length", self.sequence_length, "1 to 2^24"));
        }
        ascending("tokenizer.special_ids", &self.tokenizer.special_ids)?;
        ascending("tokenizer.dropped_ids", &self.tokenizer.dropped_ids)?;
        ascending("dropped.positions", &self.dropped.positions)?;
        self.check_taps()?;
        for split in Split::ALL {
            self.check_split(split)?;
        }
        Ok(())
    }

    fn check_taps(&self) -> Result<(), ManifestError> {
        if self.taps.is_empty() {
            return Err(fault("taps", "empty", "at least one tap"));
        }
        let points: BTreeSet<_> = self.taps.iter().map(|t| t.point).collect();
        if points.len() != self.taps.len() || !self.taps.is_sorted_by_key(|t| t.point) {
            return Err(fault("taps", "unordered or repeated", "ascending taps"));
        }
        for tap in &self.taps {
            if !(1..=1 << 24).contains(&tap.width) {
                return Err(fault(format!("taps[{}].width", tap.point), tap.width, "1 to 2^24"));
            }
            if !(tap.scale.is_finite() && tap.scale > 0.0) {
                return Err(fault(format!("taps[{}].scale", tap.point), tap.scale, "a positive number"));
            }
            check_file(&tap.mean, &format!("taps[{}].mean", tap.point))?;
        }
        Ok(())
    }

    fn check_split(&self, split: Split) -> Result<(), ManifestError> {
        let (info, name) = (self.split(split), split.folder());
        check_file(&info.tokens, &format!("{name}.tokens"))?;
        let most = MOST / self.sequence_length as u64;
        if info.n_sequences > most.min(u64::from(u32::MAX)) {
            return Err(fault(format!("{name}.n_sequences"), info.n_sequences, format!("at most {most}")));
        }
        if info.n_vectors > info.n_sequences * self.sequence_length as u64 {
            return Err(fault(format!("{name}.n_vectors"), info.n_vectors, "at most one a token"));
        }
        let mut total = 0u64;
        for (i, shard) in info.shards.iter().enumerate() {
            let field = format!("{name}.shards[{i}]");
            total = total.saturating_add(shard.n_vectors);
            if shard.n_vectors == 0 {
                return Err(fault(format!("{field}.n_vectors"), 0, "at least 1"));
            }
            if shard.files.len() != self.taps.len() {
                let expected = format!("one for each of {} taps", self.taps.len());
                return Err(fault(format!("{field}.files"), shard.files.len(), expected));
            }
            for (file, tap) in shard.files.iter().zip(&self.taps) {
                check_file(file, &format!("{field}.files[{}]", tap.point))?;
            }
        }
        if total != info.n_vectors {
            let expected = format!("the sum of its shards, {total}");
            return Err(fault(format!("{name}.n_vectors"), info.n_vectors, expected));
        }
        Ok(())
    }
}

fn ascending(field: &str, values: &[u32]) -> Result<(), ManifestError> {
    if values.is_sorted_by(|a, b| a < b) {
        Ok(())
    } else {
        Err(fault(field, "unordered or repeated", "strictly ascending numbers"))
    }
}

fn check_file(file: &FileInfo, field: &str) -> Result<(), ManifestError> {
    if file.bytes > MOST {
        return Err(fault(format!("{field}.bytes"), file.bytes, "below 2^53"));
    }
    let digits = |text: &str, n: usize| {
        text.len() == n && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    for (name, text, n) in [("sha256", Some(&file.sha256), 64), ("crc64", file.crc64.as_ref(), 16)] {
        if let Some(text) = text.filter(|text| !digits(text, n)) {
            let expected = format!("{n} lower-case hexadecimal digits");
            return Err(fault(format!("{field}.{name}"), format!("`{text}`"), expected));
        }
    }
    Ok(())
}
