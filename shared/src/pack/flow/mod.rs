//! The section of a pack that only multi-layer autoencoders have: short texts with the latents of every token at every
//! layer, and what leads from layer to layer.
//!
//! Every activation here is in the dictionary's own units: vectors are divided by the scalar of their layer first
//! ([`crate::multi_layer`]), so that layers can be compared.
//!
//! - [`text`]: a text's codes and errors, and what removing a latent changes; [`vectors`]: what its codes come from;
//! - [`latents`]: where the described latents are active, and what goes with them at the next layer;
//! - [`thresholds`]: those of layers that have their own;
//! - [`lens`]: what each of them says about the next token at each layer.

pub mod latents;
pub mod lens;
pub mod text;
pub mod thresholds;
pub mod vectors;

use serde::{Deserialize, Serialize};

use super::error::{PackError, check};
use super::manifest::FileEntry;
use super::{MANIFEST, is_safe_path};
use crate::multi_layer::Layer;
use std::collections::BTreeMap;

pub use latents::{FlowLatents, Transition};
pub use lens::{LensCell, LensShard};
pub use text::{Change, Effect, FlowText};
pub use thresholds::{FLOW_THRESHOLDS, FlowThresholds};
pub use vectors::FlowVectors;

/// Path of the list of texts inside a pack.
pub const FLOW: &str = "flow.json";
/// Path of what is known about the described latents.
pub const FLOW_LATENTS: &str = "flow/latents.safetensors";
/// Most layers of a multi-layer autoencoder.
pub const MAX_LAYERS: usize = 512;
/// Most tokens of a text.
pub const MAX_TOKENS: usize = 1024;
/// Most texts; their files are numbered with two digits.
pub const MAX_TEXTS: usize = 100;
/// Most words of the lens for a latent at a layer.
pub const LENS_WORDS: usize = 5;
/// Most latents of the next layer kept for a latent at a layer.
pub const TRANSITIONS: usize = 4;
/// Most latents whose change is kept for a layer behind a removed latent.
pub const CHANGES: usize = 4;
/// Most latents that a shard of the lens may hold.
const MAX_LATENTS_PER_LENS: usize = 4096;
/// The field of the manifest with the layers.
const LAYERS: &str = "flow.layers";

/// Path of the codes of text `text`.
#[must_use]
pub fn flow_text(text: usize) -> String {
    format!("flow/{text:02}.safetensors")
}

/// Path of the vectors of text `text`.
#[must_use]
pub fn flow_vectors(text: usize) -> String {
    format!("flow/{text:02}.x.safetensors")
}

/// Path of the numbers of shard `shard` of the lens.
#[must_use]
pub fn lens_numbers(shard: usize) -> String {
    format!("flow/lens/{shard:05}.safetensors")
}

/// Path of the words of shard `shard` of the lens.
#[must_use]
pub fn lens_words(shard: usize) -> String {
    format!("flow/lens/{shard:05}.json")
}

/// What `pack.json` says about the section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowInfo {
    /// The layers of the dictionary, in the order of every axis of layers in the section.
    pub layers: Vec<Layer>,
    /// Whether layers have thresholds of their own, in [`FLOW_THRESHOLDS`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub thresholds_per_layer: bool,
    /// Latents described in [`FLOW_LATENTS`] and in the lens.
    pub n_described: usize,
    /// Described latents in each shard of the lens (the last may hold fewer).
    pub latents_per_lens: usize,
}

impl FlowInfo {
    /// Number of shards of the lens.
    #[must_use]
    pub fn n_lenses(&self) -> usize {
        self.n_described.div_ceil(self.latents_per_lens.max(1))
    }

    /// The described latents, by their place in the list, that shard `shard` of the lens holds.
    #[must_use]
    pub fn lens_range(&self, shard: usize) -> std::ops::Range<usize> {
        let start = shard.saturating_mul(self.latents_per_lens).min(self.n_described);
        start..start.saturating_add(self.latents_per_lens).min(self.n_described)
    }

    /// Checks every rule that needs no other file than the manifest.
    ///
    /// # Errors
    /// Names the field that breaks a rule.
    pub(super) fn validate(
        &self,
        n_model_layers: usize,
        n_latents: usize,
        files: &BTreeMap<String, FileEntry>,
    ) -> Result<(), PackError> {
        let n = self.layers.len();
        check((1..=MAX_LAYERS).contains(&n), MANIFEST, LAYERS, format!("1 to {MAX_LAYERS}"), n)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let fresh = self.layers[..i].iter().all(|other| other.tap != layer.tap);
            check(fresh, MANIFEST, LAYERS, "taps that differ", layer.tap)?;
            let inside = layer.tap.layer < n_model_layers;
            check(inside, MANIFEST, LAYERS, format!("taps below {n_model_layers} layers"), layer.tap)?;
            let positive = |scale: f64| scale.is_finite() && scale > 0.0;
            check(positive(layer.scale), MANIFEST, LAYERS, "positive scales", layer.scale)?;
            let limited = layer.max_input_norm.is_none_or(positive);
            check(limited, MANIFEST, LAYERS, "positive norms", format!("{:?}", layer.max_input_norm))?;
        }
        let (described, per_lens) = (self.n_described, self.latents_per_lens);
        let field = "flow.n_described";
        check(described <= n_latents, MANIFEST, field, format!("at most {n_latents}"), described)?;
        let wanted = format!("1 to {MAX_LATENTS_PER_LENS}");
        let fits = (1..=MAX_LATENTS_PER_LENS).contains(&per_lens);
        check(fits, MANIFEST, "flow.latents_per_lens", wanted, per_lens)?;
        let has = |path: &str| check(files.contains_key(path), MANIFEST, "files", path, "no such entry");
        has(FLOW)?;
        has(FLOW_LATENTS)?;
        if self.thresholds_per_layer {
            has(FLOW_THRESHOLDS)?;
        }
        // At most one lookup more than there are entries, whatever `n_described` claims.
        (0..self.n_lenses()).try_for_each(|shard| has(&lens_numbers(shard)).and(has(&lens_words(shard))))
    }
}

/// One text of `flow.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowEntry {
    /// Short name for links.
    pub id: String,
    /// Name for people.
    pub title: String,
    /// Where the text is from.
    pub source: String,
    /// Path of its codes inside the pack.
    pub file: String,
    /// Path of the vectors they come from.
    pub vectors: String,
    /// Its tokens as readable words, `[n_tokens]`.
    pub words: Vec<String>,
}

impl FlowEntry {
    /// Reads `flow.json`.
    ///
    /// # Errors
    /// If it is not a list of texts, an id repeats, a path leaves the pack, or a text is empty or too long.
    pub fn read_list(bytes: &[u8]) -> Result<Vec<Self>, PackError> {
        let list: Vec<Self> = super::from_json(FLOW, bytes)?;
        Self::validate_list(&list)?;
        Ok(list)
    }

    /// The bytes of `flow.json`.
    ///
    /// # Errors
    /// As [`FlowEntry::read_list`].
    pub fn write_list(list: &[Self]) -> Result<Vec<u8>, PackError> {
        Self::validate_list(list)?;
        super::to_json(FLOW, &list, false)
    }

    fn validate_list(list: &[Self]) -> Result<(), PackError> {
        check(list.len() <= MAX_TEXTS, FLOW, "list", format!("at most {MAX_TEXTS} texts"), list.len())?;
        for (i, entry) in list.iter().enumerate() {
            let fresh = list[..i].iter().all(|other| other.id != entry.id);
            check(fresh && is_safe_path(&entry.id), FLOW, "id", "a new plain name", &entry.id)?;
            for path in [&entry.file, &entry.vectors] {
                check(is_safe_path(path), FLOW, "file", "a plain relative path", path)?;
            }
            let n = entry.words.len();
            check((1..=MAX_TOKENS).contains(&n), FLOW, "words", format!("1 to {MAX_TOKENS}"), n)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn entry(id: &str) -> FlowEntry {
        FlowEntry {
            id: id.to_owned(),
            title: "T".to_owned(),
            source: "S".to_owned(),
            file: flow_text(0),
            vectors: flow_vectors(0),
            words: vec!["a".to_owned(), " b".to_owned()],
        }
    }

    /// A section of three layers with five described latents, and the files it needs.
    pub(in crate::pack) fn info(files: &mut BTreeMap<String, FileEntry>) -> FlowInfo {
        let layer = |layer: usize| Layer {
            tap: crate::TapPoint::new(crate::Site::Resid, layer),
            scale: 1.5,
            max_input_norm: None,
        };
        let info = FlowInfo {
            layers: vec![layer(0), layer(1)],
            thresholds_per_layer: false,
            n_described: 5,
            latents_per_lens: 2,
        };
        let lenses = (0..info.n_lenses()).flat_map(|shard| [lens_numbers(shard), lens_words(shard)]);
        for path in lenses.chain([FLOW.to_owned(), FLOW_LATENTS.to_owned()]) {
            files.insert(path, FileEntry::of(b"x"));
        }
        info
    }

    #[test]
    fn the_list_of_texts_comes_back_and_keeps_its_rules() {
        let list = vec![entry("one"), entry("two")];
        assert_eq!(FlowEntry::read_list(&FlowEntry::write_list(&list).unwrap()).unwrap(), list);
        let refused = |list: &[FlowEntry]| FlowEntry::write_list(list).unwrap_err().to_string();
        assert!(refused(&[entry("one"), entry("one")]).contains("id"));
        assert!(refused(&[FlowEntry { vectors: "../x".to_owned(), ..entry("one") }]).contains("file"));
        assert!(refused(&[FlowEntry { words: vec![], ..entry("one") }]).contains("words"));
        assert!(refused(&[FlowEntry { words: vec![String::new(); 1025], ..entry("one") }]).contains("words"));
    }

    #[test]
    fn shards_of_the_lens_cover_the_described_latents() {
        let info = info(&mut BTreeMap::new());
        assert_eq!((info.n_lenses(), info.lens_range(2), info.lens_range(9)), (3, 4..5, 5..5));
        assert_eq!(FlowInfo { n_described: 0, ..info }.n_lenses(), 0);
    }

    #[test]
    fn each_rule_of_the_section_is_enforced() {
        type Breaks = fn(&mut FlowInfo, &mut BTreeMap<String, FileEntry>);
        let broken: [(&str, Breaks); 11] = [
            (FLOW_THRESHOLDS, |i, _| i.thresholds_per_layer = true),
            (LAYERS, |i, _| i.layers.clear()),
            (LAYERS, |i, _| i.layers = vec![i.layers[0].clone(); 2]),
            (LAYERS, |i, _| i.layers[1].tap.layer = 2),
            (LAYERS, |i, _| i.layers[1].scale = f64::NAN),
            (LAYERS, |i, _| i.layers[1].max_input_norm = Some(-1.0)),
            ("n_described", |i, _| i.n_described = 21),
            ("latents_per_lens", |i, _| i.latents_per_lens = 0),
            (FLOW, |_, f| drop(f.remove(FLOW))),
            (FLOW_LATENTS, |_, f| drop(f.remove(FLOW_LATENTS))),
            ("flow/lens/00002.json", |_, f| drop(f.remove(&lens_words(2)))),
        ];
        for (field, breaks) in broken {
            let mut files = BTreeMap::new();
            let mut info = info(&mut files);
            info.validate(2, 20, &files).unwrap();
            breaks(&mut info, &mut files);
            let error = info.validate(2, 20, &files).expect_err(field).to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
    }
}
