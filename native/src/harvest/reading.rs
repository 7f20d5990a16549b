//! Files to documents to parts: in random order, several files side by side, tokenised by all cores ahead of need.
//!
//! The order of parts depends on the seed, the files and the settings alone. How far is read ahead depends on how much is
//! still wanted, and never on the number of threads.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Result, bail};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use shared::config::harvest::HarvestConfig;

use super::random;
use super::source::Encode;
use crate::files;
use crate::store::manifest::{TextCounts, TextFile, TokenizerInfo};
use crate::text::{Document, Documents, ReadOptions, TextSource};

/// At most so many bytes of text wait to be tokenised together.
const READ_AHEAD: u64 = 8 << 20;
/// Bytes of text a token stands for, when it is guessed how much is still to be read.
const BYTES_PER_TOKEN: u64 = 6;

/// A run of tokens of one document.
#[derive(Debug)]
pub(super) struct Part {
    /// The document's number.
    pub(super) document: u64,
    /// The hash of the document.
    pub(super) hash: [u8; 32],
    /// The part's number in it.
    pub(super) number: u64,
    /// Whether the document ends with it.
    pub(super) is_last: bool,
    pub(super) ids: Vec<u32>,
}

/// A document ready to be taken.
struct Ready {
    hash: [u8; 32],
    ids: Vec<u32>,
}

/// The document that parts are being taken from.
struct Current {
    document: u64,
    hash: [u8; 32],
    ids: Arc<[u32]>,
    taken: usize,
    number: u64,
}

/// A file that was opened.
struct Active {
    source: usize,
    documents: Documents,
    ended: bool,
    ready: VecDeque<Ready>,
    current: Option<Current>,
    /// Its place among the files recorded, once something was asked of it.
    record: Option<usize>,
    taken: u64,
}

/// The parts of all files: files in random order, a number of them side by side, a part of each in turn.
pub(super) struct Reading<'a> {
    encode: &'a dyn Encode,
    tokenizer: &'a TokenizerInfo,
    sources: &'a [TextSource],
    options: ReadOptions,
    side_by_side: usize,
    part_tokens: usize,
    waiting: VecDeque<u32>,
    /// Opened before their turn.
    upcoming: VecDeque<Active>,
    active: VecDeque<Active>,
    text: Vec<(usize, TextFile)>,
    counts: TextCounts,
    n_documents: u64,
}

impl<'a> Reading<'a> {
    pub(super) fn new(
        config: &HarvestConfig,
        encode: &'a dyn Encode,
        tokenizer: &'a TokenizerInfo,
        sources: &'a [TextSource],
        part_tokens: usize,
    ) -> Self {
        let options = ReadOptions {
            column: config.token_column.clone().unwrap_or_else(|| config.text_column.clone()),
            ids: config.token_column.is_some(),
            max_bytes: usize::try_from(config.max_document_bytes.0).unwrap_or(usize::MAX),
            unwrap_lines: config.unwrap_lines,
        };
        let n = u32::try_from(sources.len()).unwrap_or(u32::MAX);
        Self {
            encode,
            tokenizer,
            sources,
            options,
            side_by_side: config.interleave_files,
            part_tokens,
            waiting: random::permutation(n, config.seed, "files", 0).into(),
            upcoming: VecDeque::new(),
            active: VecDeque::new(),
            text: Vec::new(),
            counts: TextCounts::default(),
            n_documents: 0,
        }
    }

    /// The next part; `wanted` tokens more are needed, as far as is known.
    pub(super) fn next_part(&mut self, wanted: u64) -> Result<Option<Part>> {
        loop {
            let mut file = match self.next_file()? {
                Some(file) => file,
                None => match self.active.pop_front() {
                    Some(file) => file,
                    None => return Ok(None),
                },
            };
            self.record(&mut file)?;
            if file.current.is_none() {
                if file.ready.is_empty() {
                    self.read_ahead(&mut file, wanted)?;
                }
                let Some(Ready { hash, ids }) = file.ready.pop_front() else {
                    self.close(&file);
                    continue;
                };
                let document = self.n_documents;
                self.n_documents += 1;
                file.taken += 1;
                file.current = Some(Current { document, hash, ids: ids.into(), taken: 0, number: 0 });
            }
            let part = self.cut(&mut file);
            self.active.push_back(file);
            if let Some(part) = part.filter(|part| !part.ids.is_empty()) {
                return Ok(Some(part));
            }
        }
    }

    /// The next part of the file's current document.
    fn cut(&self, file: &mut Active) -> Option<Part> {
        let current = file.current.as_mut()?;
        let end = current.ids.len().min(current.taken.saturating_add(self.part_tokens));
        let ids = current.ids[current.taken..end].to_vec();
        let is_last = end == current.ids.len();
        let part =
            Part { document: current.document, hash: current.hash, number: current.number, is_last, ids };
        (current.taken, current.number) = (end, current.number + 1);
        if is_last {
            file.current = None;
        }
        Some(part)
    }

    /// A further file, if it is the turn of one. Files of the hub come one after another, so that none is fetched before
    /// it is needed.
    fn next_file(&mut self) -> Result<Option<Active>> {
        let may_open = |source: &TextSource, active: usize| {
            if source.is_remote() { active == 0 } else { active < self.side_by_side }
        };
        if let Some(file) = self.upcoming.front() {
            let is_turn = may_open(&self.sources[file.source], self.active.len());
            return Ok(if is_turn { self.upcoming.pop_front() } else { None });
        }
        match self.waiting.front() {
            Some(&index) if may_open(&self.sources[index as usize], self.active.len()) => {
                self.waiting.pop_front();
                self.open(index as usize).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn open(&self, source: usize) -> Result<Active> {
        let documents = Documents::open(&self.sources[source], &self.options)?;
        let ready = VecDeque::new();
        Ok(Active { source, documents, ended: false, ready, current: None, record: None, taken: 0 })
    }

    /// Writes down that a file is read.
    fn record(&mut self, file: &mut Active) -> Result<()> {
        if file.record.is_some() {
            return Ok(());
        }
        let source = &self.sources[file.source];
        let sha256 = match source.known_sha256() {
            Some(sha256) => sha256,
            None => files::sha256_file(&source.local()?)?,
        };
        file.record = Some(self.text.len());
        let entry = TextFile { name: source.name(), bytes: source.bytes, sha256, documents: 0 };
        self.text.push((file.source, entry));
        Ok(())
    }

    /// Reads documents of `file`, which needs one, and of those whose turn comes soon, and tokenises them side by side.
    fn read_ahead(&mut self, file: &mut Active, wanted: u64) -> Result<()> {
        let budget = wanted.saturating_mul(BYTES_PER_TOKEN).clamp(1, READ_AHEAD);
        let mut used = 0u64;
        let mut batch: Vec<(usize, Document)> = Vec::new();
        read_one(file, 0, &mut batch, &mut used)?;
        // Files that will be opened next.
        while used < budget
            && self.active.len() + self.upcoming.len() + 1 < self.side_by_side
            && let Some(&index) = self.waiting.front()
            && !self.sources[index as usize].is_remote()
            && !self.sources[file.source].is_remote()
        {
            self.waiting.pop_front();
            let mut next = self.open(index as usize)?;
            read_one(&mut next, 1 + self.upcoming.len(), &mut batch, &mut used)?;
            self.upcoming.push_back(next);
        }
        // One document after another of every open file, until enough is read or all is.
        let mut before = u64::MAX;
        while used < budget && used != before {
            before = used;
            read_one(file, 0, &mut batch, &mut used)?;
            let others = self.upcoming.iter_mut().chain(&mut self.active);
            for (i, other) in others.enumerate() {
                if used < budget && other.ready.is_empty() {
                    read_one(other, 1 + i, &mut batch, &mut used)?;
                }
            }
        }
        let (encode, tokenizer) = (self.encode, self.tokenizer);
        let ready = batch.par_iter().map(|(_, document)| tokenise(document, encode, tokenizer));
        let ready = ready.collect::<Result<Vec<_>>>()?;
        let mut others: Vec<&mut Active> =
            std::iter::once(file).chain(&mut self.upcoming).chain(&mut self.active).collect();
        for ((slot, _), ready) in batch.iter().zip(ready) {
            others[*slot].ready.push_back(ready);
        }
        Ok(())
    }

    fn close(&mut self, file: &Active) {
        let (counts, sum) = (file.documents.counts(), &mut self.counts);
        if let Some(record) = file.record {
            self.text[record].1.documents = file.taken;
        }
        sum.documents += file.taken;
        sum.empty += counts.empty;
        sum.malformed += counts.malformed;
        sum.invalid_utf8 += counts.invalid_utf8;
        sum.cut += counts.cut;
    }

    /// The files that were read, each with its place among the sources, and what was found in them.
    pub(super) fn finish(mut self) -> (Vec<(usize, TextFile)>, TextCounts) {
        for file in std::mem::take(&mut self.active) {
            self.close(&file);
        }
        (self.text, self.counts)
    }
}

/// Reads one document of `file` into the batch, under the number `slot`.
fn read_one(
    file: &mut Active,
    slot: usize,
    batch: &mut Vec<(usize, Document)>,
    used: &mut u64,
) -> Result<()> {
    if file.ended {
        return Ok(());
    }
    match file.documents.next_document()? {
        Some(document) => {
            *used += match &document {
                Document::Text(text) => text.len() as u64,
                Document::Ids(ids) => 4 * ids.len() as u64,
            };
            batch.push((slot, document));
        }
        None => file.ended = true,
    }
    Ok(())
}

fn tokenise(document: &Document, encode: &dyn Encode, tokenizer: &TokenizerInfo) -> Result<Ready> {
    match document {
        Document::Text(text) => {
            Ok(Ready { hash: Sha256::digest(text.as_bytes()).into(), ids: encode.encode(text)? })
        }
        Document::Ids(ids) => {
            let n = tokenizer.vocab_size;
            if let Some(id) = ids.iter().find(|&&id| id as usize >= n) {
                bail!(
                    "the text holds token id {id}, but the model has {n} tokens: it was made for another tokenizer"
                );
            }
            // Sequences get their beginning when they are cut; one that is there already is not doubled.
            let ids = if ids.first().copied() == tokenizer.bos { &ids[1..] } else { &ids[..] };
            Ok(Ready { hash: Sha256::digest(bytemuck::cast_slice(ids)).into(), ids: ids.to_vec() })
        }
    }
}
