//! Text to token sequences: documents divided between training and held-out, packed and shuffled.
//!
//! A hash of its text decides which half a document is in, so that equal documents fall on the same side and no document
//! is on both. The parts of one half follow one another, a separator between those that do not continue each other, and
//! are cut into sequences.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use indicatif::ProgressBar;
use shared::config::harvest::HarvestConfig;

use super::random;
use super::reading::{Part, Reading};
use super::source::Encode;
use super::token_cache::TokenCache;
use crate::progress;
use crate::stop::{StopFlag, Stopped};
use crate::store::describe::grouped;
use crate::store::manifest::{TextCounts, TextFile, TokenizerInfo};
use crate::store::{Split, Tokens};
use crate::text::TextSource;

/// A half that comes from fewer documents says little about others.
const FEW_DOCUMENTS: u64 = 4;

/// The sequences of both halves, in the order they go through the model, and where they came from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Corpus {
    /// Training and held-out sequences.
    pub(super) halves: [Tokens; 2],
    /// Sequences asked for in each half.
    pub(super) wanted: [usize; 2],
    /// Documents each half has tokens of.
    pub(super) documents: [u64; 2],
    /// The files that were read.
    pub(super) text: Vec<TextFile>,
    /// The place of each of them among the sources.
    pub(super) places: Vec<usize>,
    /// What was found in them.
    pub(super) counts: TextCounts,
}

/// The token sequences that `config` asks for: from the cache, or tokenised and then kept there.
pub(super) fn corpus(
    config: &HarvestConfig,
    encode: &dyn Encode,
    tokenizer: &TokenizerInfo,
    stop: &StopFlag,
) -> Result<Corpus> {
    let sources = crate::text::find(&config.text)?;
    let cache = TokenCache::of(config, encode, tokenizer, &sources)?;
    let kept = cache.as_ref().and_then(|cache| cache.read(config, &sources));
    let corpus = match kept {
        Some(corpus) => corpus,
        None => {
            let started = Instant::now();
            let bar = progress::bar(config.tokens.0, "tokenise", "tokens");
            let corpus = collect(config, encode, tokenizer, &sources, &bar, stop)?;
            bar.finish_and_clear();
            let n: u64 = corpus.halves.iter().map(|half| half.ids.len() as u64).sum();
            let seconds = started.elapsed().as_secs_f64();
            let rate = n as f64 / seconds.max(1e-9);
            tracing::info!("{} tokens from text in {seconds:.1} s, {rate:.0} tokens/s", grouped(n));
            if let Some(cache) = &cache {
                cache.write(&corpus);
            }
            corpus
        }
    };
    corpus.warn();
    Ok(corpus)
}

impl Corpus {
    /// Says what is less than was asked for.
    fn warn(&self) {
        for (split, wanted) in Split::ALL.into_iter().zip(self.wanted) {
            let found = self.halves[split as usize].n_sequences();
            if found < wanted {
                tracing::warn!("the text ends early: {found} of {wanted} {} sequences", split.folder());
            }
        }
        let held_out = self.documents[Split::HeldOut as usize];
        if self.wanted[Split::HeldOut as usize] > 0 && held_out < FEW_DOCUMENTS {
            tracing::warn!(
                "only {held_out} of {} documents are held out, so measurements on them say little about others: \
                 give more documents, or cut long ones with max_document_bytes",
                self.counts.documents
            );
        }
        if self.counts.short > 0 {
            tracing::warn!(
                "{} documents are shorter than a sequence and not used: set pack, or lower sequence_length",
                grouped(self.counts.short)
            );
        }
    }
}

/// Reads text until both halves have what `config` asks for, or the text ends.
pub(super) fn collect(
    config: &HarvestConfig,
    encode: &dyn Encode,
    tokenizer: &TokenizerInfo,
    sources: &[TextSource],
    bar: &ProgressBar,
    stop: &StopFlag,
) -> Result<Corpus> {
    let wanted = wanted(config)?;
    let share = wanted[1] as f64 / (wanted[0] + wanted[1]) as f64;
    let mut halves = wanted.map(|n| Half::new(config, n, tokenizer));
    let body = halves[0].body;
    // Without packing, parts are whole sequences, so that nothing is lost between the parts of a document.
    let part_tokens =
        if config.pack { config.part_tokens } else { config.part_tokens.next_multiple_of(body) };
    let mut reading = Reading::new(config, encode, tokenizer, sources, part_tokens);
    let mut short = 0;
    while !halves.iter().all(Half::is_full) {
        if stop.is_raised() {
            return Err(Stopped.into());
        }
        let missing = halves.iter().map(Half::missing).sum();
        let Some(part) = reading.next_part(missing)? else { break };
        short += u64::from(!config.pack && part.number == 0 && part.is_last && part.ids.len() < body);
        let held_out = random::share_of(config.seed, &part.hash, 0) < share;
        halves[usize::from(held_out)].push(&part);
        bar.set_position(halves.iter().map(|h| h.ids.len() as u64).sum());
    }
    let (text, mut counts) = reading.finish();
    counts.short = short;
    check(config, &halves, counts)?;
    let documents = [halves[0].documents, halves[1].documents];
    let mut index = 0;
    let halves = halves.map(|half| {
        index += 1;
        half.shuffled(config.seed, index)
    });
    let (places, text) = text.into_iter().unzip();
    Ok(Corpus { halves, wanted, documents, text, places, counts })
}

/// Whole sequences asked for in each half: at least one where any token is.
fn wanted(config: &HarvestConfig) -> Result<[usize; 2]> {
    let held_out = config.held_out.of(config.tokens.0);
    let sequences = |tokens: u64| tokens.div_ceil(config.sequence_length as u64);
    let wanted = [sequences(config.tokens.0 - held_out), sequences(held_out)];
    ensure!(
        wanted[0] + wanted[1] < u64::from(u32::MAX),
        "`tokens` is {}: more than 2^32 sequences of {}",
        config.tokens,
        config.sequence_length
    );
    Ok([usize::try_from(wanted[0])?, usize::try_from(wanted[1])?])
}

/// # Errors
/// If a half that was asked for has no sequence.
fn check(config: &HarvestConfig, halves: &[Half; 2], counts: TextCounts) -> Result<()> {
    for (half, name) in halves.iter().zip(["training", "held-out"]) {
        if half.wanted == 0 || !half.ids.is_empty() {
            continue;
        }
        let (length, read) = (config.sequence_length, counts.documents);
        if half.documents == 0 && read > 0 {
            bail!(
                "none of the {read} documents of the text falls into the {name} half; documents are held out whole, so \
                 there must be enough of them: give more text, cut long files into more documents with \
                 max_document_bytes, or change held_out (0 holds nothing out)"
            );
        }
        bail!(
            "the text gives no whole {name} sequence of {length} tokens ({read} documents were read): give more text, \
             or lower sequence_length"
        );
    }
    Ok(())
}

/// One half: sequences packed from the parts it was given.
struct Half {
    sequence_length: usize,
    wanted: usize,
    bos: Option<u32>,
    separator: Option<u32>,
    pack: bool,
    /// Tokens of a sequence that come from text.
    body: usize,
    ids: Vec<u32>,
    pending: Vec<u32>,
    documents: u64,
    /// The document and number of the part that would continue the last one.
    next: Option<(u64, u64)>,
}

impl Half {
    fn new(config: &HarvestConfig, wanted: usize, tokenizer: &TokenizerInfo) -> Self {
        let sequence_length = config.sequence_length;
        Self {
            sequence_length,
            wanted,
            bos: tokenizer.bos,
            separator: tokenizer.separator,
            pack: config.pack,
            body: sequence_length - usize::from(tokenizer.bos.is_some()),
            ids: Vec::new(),
            pending: Vec::new(),
            documents: 0,
            next: None,
        }
    }

    /// Tokens still to come.
    fn missing(&self) -> u64 {
        (self.wanted * self.sequence_length).saturating_sub(self.ids.len()) as u64
    }

    fn is_full(&self) -> bool {
        self.missing() == 0
    }

    fn push(&mut self, part: &Part) {
        if self.is_full() {
            return;
        }
        self.documents += u64::from(part.number == 0);
        if self.pack && self.next.is_some_and(|next| next != (part.document, part.number)) {
            self.pending.extend(self.separator);
        }
        self.next = Some((part.document, part.number + 1));
        self.pending.extend(&part.ids);
        let (mut windows, mut used) = (self.pending.chunks_exact(self.body), 0);
        while self.ids.len() < self.wanted * self.sequence_length
            && let Some(window) = windows.next()
        {
            self.ids.extend(self.bos);
            self.ids.extend(window);
            used += self.body;
        }
        self.pending.drain(..used);
        if !self.pack {
            self.pending.clear();
        }
    }

    /// The sequences in random order, so that a bucket of vectors is a sample of the whole text.
    fn shuffled(self, seed: u64, index: u64) -> Tokens {
        let tokens = Tokens { sequence_length: self.sequence_length, ids: self.ids };
        // Below 2^32 sequences: checked when they were asked for.
        let order = random::permutation(tokens.n_sequences() as u32, seed, "sequences", index);
        let ids = order.iter().flat_map(|&i| tokens.sequence(i as usize)).copied().collect();
        Tokens { ids, ..tokens }
    }
}

#[cfg(test)]
mod tests;
