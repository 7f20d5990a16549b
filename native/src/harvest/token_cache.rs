//! Token sequences kept for the next harvest of the same text with the same tokenizer: other taps, another layer, another
//! model of the family.
//!
//! An entry is a folder named by a hash of all that decides its contents but the bytes of the text; those are compared when
//! it is used. What cannot be read, written or trusted is passed over: the cache saves time and is never needed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use shared::config::harvest::HarvestConfig;

use super::partial;
use super::sequences::Corpus;
use super::source::Encode;
use crate::store::manifest::{FileInfo, TextCounts, TextFile, TokenizerInfo};
use crate::store::{self, Split};
use crate::text::TextSource;
use crate::{files, places};

/// Raised when the same key would give other sequences.
const VERSION: u32 = 1;
/// The file that makes an entry whole.
const ENTRY: &str = "tokens.json";

/// What an entry says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    n_sequences: [usize; 2],
    tokens: [FileInfo; 2],
    wanted: [usize; 2],
    documents: [u64; 2],
    text: Vec<TextFile>,
    /// The place of each text file among the sources.
    places: Vec<usize>,
    counts: TextCounts,
}

/// The place of one entry.
#[derive(Debug)]
pub(super) struct TokenCache {
    folder: PathBuf,
}

impl TokenCache {
    /// The entry of this text under these settings; `None` if nothing is to be kept.
    pub(super) fn of(
        config: &HarvestConfig,
        encode: &dyn Encode,
        tokenizer: &TokenizerInfo,
        sources: &[TextSource],
    ) -> Result<Option<Self>> {
        let root = match config.token_cache.as_deref() {
            None | Some("none") => return Ok(None),
            Some("auto") => places::cache_folder()?.join("tokens"),
            Some(folder) => PathBuf::from(folder),
        };
        let Some(identity) = encode.identity() else { return Ok(None) };
        let key = json!({
            "version": VERSION,
            "tokenizer": identity,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos,
            "separator": tokenizer.separator,
            "sources": sources.iter().map(|source| (source.name(), source.bytes)).collect::<Vec<_>>(),
            "text_column": config.text_column,
            "token_column": config.token_column,
            "unwrap_lines": config.unwrap_lines,
            "max_document_bytes": config.max_document_bytes.0,
            "interleave_files": config.interleave_files,
            "part_tokens": config.part_tokens,
            "pack": config.pack,
            "tokens": config.tokens.0,
            "held_out": config.held_out.of(config.tokens.0),
            "sequence_length": config.sequence_length,
            "seed": config.seed,
        });
        Ok(Some(Self { folder: root.join(files::sha256(key.to_string().as_bytes())) }))
    }

    /// The sequences kept here, if they are whole and the text is still the same.
    pub(super) fn read(&self, config: &HarvestConfig, sources: &[TextSource]) -> Option<Corpus> {
        if !self.folder.join(ENTRY).is_file() {
            return None;
        }
        match self.try_read(config, sources) {
            Ok(corpus) => {
                tracing::info!("tokens taken from {}", self.folder.display());
                Some(corpus)
            }
            Err(error) => {
                tracing::warn!("tokens in {} are not used: {error:#}", self.folder.display());
                None
            }
        }
    }

    fn try_read(&self, config: &HarvestConfig, sources: &[TextSource]) -> Result<Corpus> {
        let entry: Entry = serde_json::from_slice(&fs::read(self.folder.join(ENTRY))?)?;
        ensure!(entry.places.len() == entry.text.len(), "{ENTRY} is inconsistent");
        for (&place, file) in entry.places.iter().zip(&entry.text) {
            let source = sources.get(place).context("it names a file that is not among the texts")?;
            // A file of the hub is fixed by the commit in its name, which is part of the key.
            if !source.is_remote() {
                let found = files::sha256_file(&source.local()?)?;
                ensure!(found == file.sha256, "{} has changed since", file.name);
            }
        }
        let half = |split: Split| {
            let (file, n) = (&entry.tokens[split as usize], entry.n_sequences[split as usize]);
            store::read_tokens(&self.folder, split, file, n, config.sequence_length)
        };
        let halves = [half(Split::Train)?, half(Split::HeldOut)?];
        let Entry { wanted, documents, text, places, counts, .. } = entry;
        Ok(Corpus { halves, wanted, documents, text, places, counts })
    }

    /// Keeps the sequences; a failure is only reported.
    pub(super) fn write(&self, corpus: &Corpus) {
        match self.try_write(corpus) {
            Ok(()) => tracing::info!("tokens kept in {}", self.folder.display()),
            Err(error) => tracing::warn!("tokens are not kept: {error:#}"),
        }
    }

    fn try_write(&self, corpus: &Corpus) -> Result<()> {
        let write = |split: Split| {
            partial::write_tokens(&store::tokens_path(&self.folder, split), &corpus.halves[split as usize])
        };
        let tokens = [write(Split::Train)?, write(Split::HeldOut)?];
        let n_sequences = corpus.halves.each_ref().map(store::Tokens::n_sequences);
        let Corpus { wanted, documents, text, places, counts, .. } = corpus.clone();
        let entry = Entry { n_sequences, tokens, wanted, documents, text, places, counts };
        files::write_bytes(&self.folder.join(ENTRY), &serde_json::to_vec_pretty(&entry)?)
    }
}
