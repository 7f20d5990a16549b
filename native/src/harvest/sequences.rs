//! Text to token sequences: documents tokenised, divided between training and held-out, packed and shuffled.
//!
//! A document is taken in parts of `held_out_part` tokens; a hash of its text and the part's number decides the
//! part's half, so that equal documents always fall on the same side and no text is on both. Parts of one half
//! follow one another, a separator between those that do not continue each other, and are cut into sequences.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};
use shared::config::harvest::HarvestConfig;

use super::random;
use super::source::Encode;
use crate::files;
use crate::stop::{StopFlag, Stopped};
use crate::store::Tokens;
use crate::store::manifest::{TextCounts, TextFile, TokenizerInfo};
use crate::text::{Documents, ReadOptions, TextSource};

/// The sequences of both halves, in the order they go through the model, and where they came from.
#[derive(Debug)]
pub(super) struct Corpus {
    /// Training and held-out sequences.
    pub(super) halves: [Tokens; 2],
    /// Sequences asked for in each half.
    pub(super) wanted: [usize; 2],
    /// The files that were read.
    pub(super) text: Vec<TextFile>,
    /// What was found in them.
    pub(super) counts: TextCounts,
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
    let mut halves = wanted.map(|n| Half::new(config.sequence_length, n, tokenizer));
    let mut reading = Reading::new(config, encode, sources);
    while !halves.iter().all(Half::is_full) {
        if stop.is_raised() {
            return Err(Stopped.into());
        }
        let Some(part) = reading.next_part()? else { break };
        let held_out = random::share_of(config.seed, &part.text, part.number) < share;
        halves[usize::from(held_out)].push(&part);
        bar.set_position(halves.iter().map(|h| h.ids.len() as u64).sum());
    }
    let (text, counts) = reading.finish();
    for (half, name) in halves.iter().zip(["training", "held_out"]) {
        ensure!(
            half.wanted == 0 || !half.ids.is_empty(),
            "the text gives no whole {name} sequence of {} tokens ({} documents were read): \
             give more text, or lower sequence_length or held_out_part",
            config.sequence_length,
            counts.documents
        );
    }
    let mut index = 0;
    let halves = halves.map(|half| {
        index += 1;
        half.shuffled(config.seed, index)
    });
    Ok(Corpus { halves, wanted, text, counts })
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

/// A run of tokens of one document.
struct Part {
    document: u64,
    text: [u8; 32],
    number: u64,
    ids: Vec<u32>,
}

/// One half: sequences packed from the parts it was given.
struct Half {
    sequence_length: usize,
    wanted: usize,
    bos: Option<u32>,
    separator: Option<u32>,
    ids: Vec<u32>,
    pending: Vec<u32>,
    /// The document and number of the part that would continue the last one.
    next: Option<(u64, u64)>,
}

impl Half {
    fn new(sequence_length: usize, wanted: usize, tokenizer: &TokenizerInfo) -> Self {
        let (bos, separator) = (tokenizer.bos, tokenizer.separator);
        Self { sequence_length, wanted, bos, separator, ids: Vec::new(), pending: Vec::new(), next: None }
    }

    fn is_full(&self) -> bool {
        self.ids.len() >= self.wanted * self.sequence_length
    }

    fn push(&mut self, part: &Part) {
        if self.is_full() {
            return;
        }
        if self.next.is_some_and(|next| next != (part.document, part.number)) {
            self.pending.extend(self.separator);
        }
        self.next = Some((part.document, part.number + 1));
        self.pending.extend(&part.ids);
        let body = self.sequence_length - usize::from(self.bos.is_some());
        let (mut windows, mut used) = (self.pending.chunks_exact(body), 0);
        while self.ids.len() < self.wanted * self.sequence_length
            && let Some(window) = windows.next()
        {
            self.ids.extend(self.bos);
            self.ids.extend(window);
            used += body;
        }
        self.pending.drain(..used);
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

/// A file being read, and what is left of its current document.
struct Active {
    file: usize,
    documents: Documents,
    ids: VecDeque<u32>,
    document: u64,
    text: [u8; 32],
    number: u64,
}

/// The parts of all files: files in random order, a number of them side by side, a part of each in turn.
struct Reading<'a> {
    config: &'a HarvestConfig,
    encode: &'a dyn Encode,
    sources: &'a [TextSource],
    options: ReadOptions,
    waiting: VecDeque<u32>,
    active: VecDeque<Active>,
    text: Vec<TextFile>,
    counts: TextCounts,
    n_documents: u64,
}

impl<'a> Reading<'a> {
    fn new(config: &'a HarvestConfig, encode: &'a dyn Encode, sources: &'a [TextSource]) -> Self {
        let options = ReadOptions {
            column: config.text_column.clone(),
            max_bytes: usize::try_from(config.max_document_bytes.0).unwrap_or(usize::MAX),
            unwrap_lines: config.unwrap_lines,
        };
        let n = u32::try_from(sources.len()).unwrap_or(u32::MAX);
        let waiting = random::permutation(n, config.seed, "files", 0).into();
        let (active, text, counts) = (VecDeque::new(), Vec::new(), TextCounts::default());
        Self { config, encode, sources, options, waiting, active, text, counts, n_documents: 0 }
    }

    fn next_part(&mut self) -> Result<Option<Part>> {
        loop {
            // A file is opened only when its turn comes, so that those recorded are those read.
            let next = if self.active.len() < self.config.interleave_files {
                self.waiting.pop_front()
            } else {
                None
            };
            let mut file = match next {
                Some(index) => self.open(index as usize)?,
                None => match self.active.pop_front() {
                    Some(file) => file,
                    None => return Ok(None),
                },
            };
            if file.ids.is_empty() && !self.next_document(&mut file)? {
                self.close(&file);
                continue;
            }
            let n = file.ids.len().min(self.config.held_out_part);
            let ids: Vec<u32> = file.ids.drain(..n).collect();
            let part = Part { document: file.document, text: file.text, number: file.number, ids };
            file.number += 1;
            self.active.push_back(file);
            if !part.ids.is_empty() {
                return Ok(Some(part));
            }
        }
    }

    fn open(&mut self, index: usize) -> Result<Active> {
        let source = &self.sources[index];
        let name = source.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let sha256 = files::sha256_file(&source.path)?;
        let bytes = std::fs::metadata(&source.path)?.len();
        self.text.push(TextFile { name, bytes, sha256, documents: 0 });
        let documents = Documents::open(source, &self.options)?;
        let file = self.text.len() - 1;
        Ok(Active { file, documents, ids: VecDeque::new(), document: 0, text: [0; 32], number: 0 })
    }

    fn next_document(&mut self, file: &mut Active) -> Result<bool> {
        let Some(text) = file.documents.next_document()? else { return Ok(false) };
        file.ids = self.encode.encode(&text)?.into();
        file.text = Sha256::digest(text.as_bytes()).into();
        (file.document, file.number) = (self.n_documents, 0);
        self.n_documents += 1;
        Ok(true)
    }

    fn close(&mut self, file: &Active) {
        let (counts, sum) = (file.documents.counts(), &mut self.counts);
        self.text[file.file].documents = counts.documents;
        sum.documents += counts.documents;
        sum.empty += counts.empty;
        sum.malformed += counts.malformed;
        sum.invalid_utf8 += counts.invalid_utf8;
        sum.cut += counts.cut;
    }

    fn finish(mut self) -> (Vec<TextFile>, TextCounts) {
        for file in std::mem::take(&mut self.active) {
            self.close(&file);
        }
        (self.text, self.counts)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use shared::config::{Count, Portion};

    use super::*;
    use crate::text::find;

    /// A token a word: words are numbers.
    struct Words;

    impl Encode for Words {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
        }
    }

    fn config() -> HarvestConfig {
        HarvestConfig {
            tokens: Count(10_000),
            held_out: Portion::Share(0.2),
            held_out_part: 50,
            sequence_length: 16,
            ..HarvestConfig::default()
        }
    }

    const INFO: TokenizerInfo =
        TokenizerInfo { vocab_size: 100_000, bos: Some(1), separator: Some(2), special_ids: Vec::new() };

    /// Ten files of 1000 distinct words each, 10..10010; the last also at the end of the first.
    fn corpus(folder: &Path) -> Vec<TextSource> {
        for file in 0..10 {
            let words: Vec<_> = (0..1000).map(|i| (10 + file * 1000 + i).to_string()).collect();
            std::fs::write(folder.join(format!("{file}.txt")), words.join(" ")).unwrap();
        }
        find(&[folder.to_str().unwrap().to_owned()]).unwrap()
    }

    fn gather(config: &HarvestConfig, info: &TokenizerInfo, sources: &[TextSource]) -> Corpus {
        collect(config, &Words, info, sources, &ProgressBar::hidden(), &StopFlag::default()).unwrap()
    }

    #[test]
    fn halves_share_no_token_and_have_the_asked_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let sources = corpus(folder.path());
        let all = gather(&HarvestConfig { tokens: Count(4000), ..config() }, &INFO, &sources);
        assert_eq!([all.halves[0].n_sequences(), all.halves[1].n_sequences()], [200, 50]);
        let words = |t: &Tokens| t.ids.iter().copied().filter(|&id| id >= 10).collect::<Vec<_>>();
        let (train, held_out) = (words(&all.halves[0]), words(&all.halves[1]));
        let unique: HashSet<_> = train.iter().chain(&held_out).collect();
        assert_eq!(unique.len(), train.len() + held_out.len(), "a word appears twice");
        assert!(all.halves.iter().all(|t| (0..t.n_sequences()).all(|i| t.sequence(i)[0] == 1)));
        assert_eq!((all.text.len(), all.counts.documents), (10, 10));
        let held_out = Portion::Share(0.0);
        let little = HarvestConfig { tokens: Count(100), held_out_part: 500, held_out, ..config() };
        let little = gather(&little, &INFO, &sources);
        assert!(little.text.len() == 1 && little.text[0].documents == 1, "{:?}", little.text);
    }

    #[test]
    fn separators_stand_exactly_where_the_text_does_not_continue() {
        let folder = tempfile::tempdir().unwrap();
        let all = gather(&config(), &INFO, &corpus(folder.path()));
        let mut separators = 0;
        for half in &all.halves {
            for pair in (0..half.n_sequences()).flat_map(|i| half.sequence(i)[1..].windows(2)) {
                let continues = pair[1] == pair[0] + 1;
                assert!(continues || pair.contains(&2), "{pair:?}");
                separators += usize::from(pair[0] == 2);
            }
        }
        assert!(separators > 10, "{separators}");
    }

    #[test]
    fn equal_documents_fall_on_the_same_side() {
        let folder = tempfile::tempdir().unwrap();
        let lines: String = (0..400)
            .map(|i| format!("{{\"text\": \"{}\"}}\n", (10 + i / 2).to_string() + &" 5".repeat(20)))
            .collect();
        std::fs::write(folder.path().join("a.jsonl"), lines).unwrap();
        let sources = find(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
        let half_held = HarvestConfig { held_out: Portion::Share(0.5), sequence_length: 21, ..config() };
        let info = TokenizerInfo { bos: None, separator: None, ..INFO };
        let all = gather(&half_held, &info, &sources);
        let firsts = |t: &Tokens| t.ids.iter().copied().filter(|&id| id >= 10).collect::<HashSet<_>>();
        let (train, held_out) = (firsts(&all.halves[0]), firsts(&all.halves[1]));
        assert!(train.len() > 50 && held_out.len() > 50 && train.is_disjoint(&held_out));
    }

    #[test]
    fn the_seed_decides_everything() {
        let folder = tempfile::tempdir().unwrap();
        let sources = corpus(folder.path());
        let (a, b) = (gather(&config(), &INFO, &sources), gather(&config(), &INFO, &sources));
        let c = gather(&HarvestConfig { seed: 1, ..config() }, &INFO, &sources);
        assert_eq!(a.halves, b.halves);
        assert_ne!(a.halves, c.halves);
    }

    #[test]
    fn too_little_text_is_said() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.txt"), "10 11 12").unwrap();
        let sources = find(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
        let none = ProgressBar::hidden();
        let error = collect(&config(), &Words, &INFO, &sources, &none, &StopFlag::default()).unwrap_err();
        assert!(error.to_string().contains("no whole training sequence of 16"), "{error}");
    }
}
