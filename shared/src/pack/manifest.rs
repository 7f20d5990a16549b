//! `pack.json`: what a pack describes, how it was made, and every file with its size and hash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::{PackError, check};
use super::flow::FlowInfo;
use super::{FORMAT, MANIFEST, MAX_LATENTS, MAX_WIDTH, VERSION};
use crate::metrics::Log10Histogram;
use crate::row_scaling::RowScaling;
use crate::tap::Site;

/// Most latents a feature shard may hold.
const MAX_LATENTS_PER_SHARD: usize = 4096;

/// The manifest of a pack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// Always [`VERSION`].
    pub version: u32,
    /// Short name: lower-case letters, digits, `-`, `_`, `.`; the folder's name on a site.
    pub name: String,
    /// Name for people.
    pub title: String,
    /// The language model.
    pub model: ModelInfo,
    /// The autoencoder.
    pub sae: SaeInfo,
    /// The text the features were collected from.
    pub corpus: CorpusInfo,
    /// Measured quality, when it was measured.
    pub metrics: Option<Metrics>,
    /// Latents in each feature shard (the last may hold fewer).
    pub latents_per_shard: usize,
    /// Number of feature shards.
    pub n_shards: usize,
    /// Texts across layers; only for an autoencoder of several layers, whose first is then in `sae`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowInfo>,
    /// Firing densities of all latents.
    pub density_histogram: DensityHistogram,
    /// Every other file of the pack, by path.
    pub files: BTreeMap<String, FileEntry>,
    /// Whatever the maker recorded about how the pack came to be.
    pub provenance: serde_json::Value,
}

/// The language model whose activations were encoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelInfo {
    /// Name of the model.
    pub name: String,
    /// Architecture family, for example `llama`.
    pub architecture: String,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
}

/// The autoencoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaeInfo {
    /// Where in the block it reads.
    pub site: Site,
    /// The block, from 0.
    pub layer: usize,
    /// Width of its input.
    pub d_in: usize,
    /// Number of latents.
    pub n_latents: usize,
    /// Its nonlinearity.
    pub activation: ActivationKind,
    /// How each vector is scaled before it is encoded; absent where it is not.
    #[serde(default, skip_serializing_if = "RowScaling::is_none")]
    pub rows: RowScaling,
}

/// Which nonlinearity turns pre-activations into latents; thresholds are in the encoder file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ActivationKind {
    /// `z · 1[z > θ]`.
    JumpRelu,
    /// `max(z, 0)`; the encoder's thresholds are all zero.
    Relu,
    /// The `k` largest positive pre-activations; the encoder's thresholds are all zero.
    TopK {
        /// How many latents may be active.
        k: usize,
    },
}

/// The text the features were collected from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusInfo {
    /// Name of the text.
    pub name: String,
    /// Number of tokens whose activations were encoded: the denominator of every density.
    pub n_tokens: u64,
    /// Tokens of a sequence.
    pub sequence_length: usize,
}

/// Measured quality on held-out text (Gemma Scope, arXiv 2408.05147 §4); `None` where not measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Mean number of active latents a token.
    pub l0: Option<f64>,
    /// Fraction of variance unexplained.
    pub fvu: Option<f64>,
    /// `ce_spliced − ce_clean`, nats a token.
    pub delta_loss: Option<f64>,
    /// `(ce_zero − ce_spliced) / (ce_zero − ce_clean)`.
    pub loss_recovered: Option<f64>,
    /// Cross-entropy of the untouched model, nats a token.
    pub ce_clean: Option<f64>,
    /// Cross-entropy with the tap replaced by its reconstruction.
    pub ce_spliced: Option<f64>,
    /// Cross-entropy with the tap replaced by zero.
    pub ce_zero: Option<f64>,
    /// Share of latents that never fired.
    pub dead_share: Option<f64>,
}

/// A histogram of `log10(density)` over latents; latents that never fired are in no bin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DensityHistogram {
    /// Ascending bin edges, `[bins + 1]`.
    pub log10_edges: Vec<f64>,
    /// Latents in each bin, `[bins]`.
    pub counts: Vec<u64>,
}

impl From<Log10Histogram> for DensityHistogram {
    fn from(histogram: Log10Histogram) -> Self {
        Self { log10_edges: histogram.log10_edges, counts: histogram.counts }
    }
}

/// Size and hash of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

impl FileEntry {
    /// The entry of a file with these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let sha256 = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        Self { bytes: bytes.len() as u64, sha256 }
    }

    /// `Ok` when `bytes` are the file this entry describes.
    ///
    /// # Errors
    /// If size or hash differ.
    pub fn verify(&self, file: &str, bytes: &[u8]) -> Result<(), PackError> {
        check(self.bytes == bytes.len() as u64, file, "size", format!("{} bytes", self.bytes), bytes.len())?;
        let found = Self::of(bytes).sha256;
        check(self.sha256 == found, file, "sha256", &self.sha256, &found)
    }
}

impl Manifest {
    /// Reads and checks `pack.json`.
    ///
    /// # Errors
    /// If it is not the JSON of this version, or breaks a rule of the format.
    pub fn read(bytes: &[u8]) -> Result<Self, PackError> {
        // Format and version first, so that a later version is named rather than its unknown fields.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = super::from_json(MANIFEST, bytes)?;
        check(head.format == FORMAT, MANIFEST, "format", FORMAT, &head.format)?;
        check(head.version == VERSION, MANIFEST, "version", VERSION.to_string(), head.version)?;
        let manifest: Self = super::from_json(MANIFEST, bytes)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The bytes of `pack.json`.
    ///
    /// # Errors
    /// If the manifest breaks a rule of the format.
    pub fn write(&self) -> Result<Vec<u8>, PackError> {
        self.validate()?;
        super::to_json(MANIFEST, self, true)
    }

    /// The latents `[start, end)` of shard `shard`; empty when there is no such shard.
    #[must_use]
    pub fn shard_range(&self, shard: usize) -> std::ops::Range<usize> {
        let start = shard.saturating_mul(self.latents_per_shard).min(self.sae.n_latents);
        start..start.saturating_add(self.latents_per_shard).min(self.sae.n_latents)
    }

    /// The shard that holds `latent`, and its place inside.
    #[must_use]
    pub fn locate(&self, latent: usize) -> (usize, usize) {
        let per_shard = self.latents_per_shard.max(1);
        (latent / per_shard, latent % per_shard)
    }

    /// Checks every rule that needs no other file.
    ///
    /// # Errors
    /// Names the field that breaks a rule.
    pub fn validate(&self) -> Result<(), PackError> {
        let is = |holds: bool, field: &str, wanted: String, found: &dyn std::fmt::Display| {
            check(holds, MANIFEST, field, wanted, found)
        };
        is(self.format == FORMAT, "format", FORMAT.to_owned(), &self.format)?;
        is(self.version == VERSION, "version", VERSION.to_string(), &self.version)?;
        let slug = !self.name.is_empty()
            && super::is_safe_path(&self.name)
            && self.name.bytes().all(|b| b != b'/' && !b.is_ascii_uppercase());
        is(slug, "name", "lower-case letters, digits, - _ .".to_owned(), &self.name)?;
        let SaeInfo { d_in, n_latents, layer, activation, rows, .. } = self.sae;
        is((1..=MAX_WIDTH).contains(&d_in), "sae.d_in", format!("1 to {MAX_WIDTH}"), &d_in)?;
        is(
            (1..=MAX_LATENTS).contains(&n_latents),
            "sae.n_latents",
            format!("1 to {MAX_LATENTS}"),
            &n_latents,
        )?;
        is(
            layer < self.model.n_layers,
            "sae.layer",
            format!("below {} layers", self.model.n_layers),
            &layer,
        )?;
        if let ActivationKind::TopK { k } = activation {
            is((1..=n_latents).contains(&k), "sae.activation.k", format!("1 to {n_latents}"), &k)?;
        }
        if let RowScaling::Standardise { eps } = rows {
            is(
                eps.is_finite() && eps >= 0.0,
                "sae.rows.eps",
                "a finite number of at least 0".to_owned(),
                &eps,
            )?;
        }
        let per_shard = self.latents_per_shard;
        let wanted = format!("1 to {MAX_LATENTS_PER_SHARD}");
        is((1..=MAX_LATENTS_PER_SHARD).contains(&per_shard), "latents_per_shard", wanted, &per_shard)?;
        let shards = n_latents.div_ceil(per_shard);
        is(self.n_shards == shards, "n_shards", shards.to_string(), &self.n_shards)?;
        self.validate_histogram()?;
        self.validate_files()?;
        match &self.flow {
            Some(flow) => flow.validate(self.model.n_layers, n_latents, &self.files),
            None => Ok(()),
        }
    }

    fn validate_histogram(&self) -> Result<(), PackError> {
        let DensityHistogram { log10_edges: edges, counts } = &self.density_histogram;
        let field = "density_histogram";
        check(edges.len() == counts.len() + 1, MANIFEST, field, "one edge more than counts", edges.len())?;
        let ascending = edges.iter().all(|e| e.is_finite()) && edges.windows(2).all(|w| w[0] < w[1]);
        check(ascending, MANIFEST, field, "ascending finite edges", format!("{edges:?}"))?;
        let total = counts.iter().try_fold(0u64, |sum, &c| sum.checked_add(c));
        let fits = total.is_some_and(|t| t <= self.sae.n_latents as u64);
        check(fits, MANIFEST, field, format!("at most {} latents", self.sae.n_latents), format!("{total:?}"))
    }

    fn validate_files(&self) -> Result<(), PackError> {
        for (path, entry) in &self.files {
            check(super::is_safe_path(path), MANIFEST, "files", "a plain relative path", path)?;
            let hex = entry.sha256.len() == 64
                && entry.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            check(hex, MANIFEST, &format!("files.{path}.sha256"), "64 hexadecimal digits", &entry.sha256)?;
        }
        let fixed =
            [super::ENCODER, super::DECODER, super::INDEX_NUMBERS, super::INDEX_WORDS_FILE, super::TEXTS];
        for path in fixed {
            check(self.files.contains_key(path), MANIFEST, "files", path, "no such entry")?;
        }
        // At most one lookup more than there are entries, whatever `n_shards` claims.
        for shard in 0..self.n_shards {
            for path in [super::shard_numbers(shard), super::shard_words(shard)] {
                check(self.files.contains_key(&path), MANIFEST, "files", &path, "no such entry")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A valid manifest of 20 latents in shards of 8.
    pub(in crate::pack) fn manifest() -> Manifest {
        let entry = FileEntry::of(b"x");
        let mut files: BTreeMap<String, FileEntry> = BTreeMap::new();
        for shard in 0..3 {
            files.insert(super::super::shard_numbers(shard), entry.clone());
            files.insert(super::super::shard_words(shard), entry.clone());
        }
        for path in
            ["encoder.safetensors", "decoder.safetensors", "index.safetensors", "index.json", "texts.json"]
        {
            files.insert(path.to_owned(), entry.clone());
        }
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            name: "tiny-resid-1".to_owned(),
            title: "Tiny".to_owned(),
            model: ModelInfo {
                name: "tiny".to_owned(),
                architecture: "llama".to_owned(),
                n_layers: 2,
                d_model: 4,
            },
            sae: SaeInfo {
                site: Site::Resid,
                layer: 1,
                d_in: 4,
                n_latents: 20,
                activation: ActivationKind::TopK { k: 3 },
                rows: RowScaling::None,
            },
            corpus: CorpusInfo { name: "words".to_owned(), n_tokens: 100, sequence_length: 10 },
            metrics: Some(Metrics { l0: Some(3.0), ..Metrics::default() }),
            latents_per_shard: 8,
            n_shards: 3,
            flow: None,
            density_histogram: DensityHistogram {
                log10_edges: vec![-3.0, -2.0, -1.0, 0.0],
                counts: vec![1, 5, 9],
            },
            files,
            provenance: serde_json::json!({"made_by": "a test"}),
        }
    }

    #[test]
    fn round_trip() {
        let manifest = manifest();
        assert_eq!(Manifest::read(&manifest.write().unwrap()).unwrap(), manifest);
        let written = String::from_utf8(manifest.write().unwrap()).unwrap();
        assert!(!written.contains("rows") && !written.contains("flow"));
        let mut layers = manifest.clone();
        layers.flow = Some(super::super::flow::tests::info(&mut layers.files));
        assert_eq!(Manifest::read(&layers.write().unwrap()).unwrap(), layers);
        layers.files.remove(super::super::flow::FLOW);
        assert!(layers.write().is_err(), "a section without its files");
        for rows in [RowScaling::LAYER_NORM, RowScaling::Norm] {
            let mut scaled = manifest.clone();
            scaled.sae.rows = rows;
            assert_eq!(Manifest::read(&scaled.write().unwrap()).unwrap(), scaled);
        }
        assert_eq!((manifest.shard_range(2), manifest.shard_range(9)), (16..20, 20..20));
        assert_eq!(manifest.locate(17), (2, 1));
    }

    #[test]
    fn each_rule_is_enforced() {
        type Breaks = fn(&mut Manifest);
        let broken: [(&str, Breaks); 15] = [
            ("format", |m| m.format = "other".to_owned()),
            ("version", |m| m.version = 2),
            ("name", |m| m.name = "../up".to_owned()),
            ("name", |m| m.name = "Upper".to_owned()),
            ("d_in", |m| m.sae.d_in = 0),
            ("n_latents", |m| m.sae.n_latents = usize::MAX),
            ("layer", |m| m.sae.layer = 2),
            ("activation.k", |m| m.sae.activation = ActivationKind::TopK { k: 21 }),
            ("rows.eps", |m| m.sae.rows = RowScaling::Standardise { eps: -1.0 }),
            ("latents_per_shard", |m| m.latents_per_shard = 0),
            ("n_shards", |m| m.n_shards = 4),
            ("density_histogram", |m| m.density_histogram.counts[0] = u64::MAX),
            ("density_histogram", |m| m.density_histogram.log10_edges[1] = f64::NAN),
            ("files", |m| drop(m.files.remove("features/00002.json"))),
            ("files", |m| drop(m.files.insert("../evil".to_owned(), FileEntry::of(b"")))),
        ];
        for (field, breaks) in broken {
            let mut m = manifest();
            breaks(&mut m);
            let error = m.validate().expect_err(field).to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
    }

    #[test]
    fn unknown_fields_and_later_versions_are_named() {
        let text = String::from_utf8(manifest().write().unwrap()).unwrap();
        let stray = text.replacen("\"title\"", "\"colour\": 1, \"title\"", 1);
        assert!(Manifest::read(stray.as_bytes()).unwrap_err().to_string().contains("colour"));
        let later = text.replacen("\"version\": 1", "\"version\": 9, \"novelty\": 1", 1);
        assert!(Manifest::read(later.as_bytes()).unwrap_err().to_string().contains("wanted 1, found 9"));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let entry = FileEntry::of(b"abc");
        assert!(entry.sha256.starts_with("ba7816bf"));
        entry.verify("f", b"abc").unwrap();
        assert!(entry.verify("f", b"abd").is_err());
        assert!(entry.verify("f", b"abcd").is_err());
    }
}
