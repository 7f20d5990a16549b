//! From text to a store: tokens through the language model, taps into shards.
pub(crate) const PARTIAL_MANIFEST: &str = "manifest.partial.json";
