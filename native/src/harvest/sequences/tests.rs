//! Texts of words that are numbers, so that every token can be traced to its document.

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
        part_tokens: 50,
        sequence_length: 16,
        ..HarvestConfig::default()
    }
}

const INFO: TokenizerInfo = TokenizerInfo {
    vocab_size: 100_000,
    bos: Some(1),
    separator: Some(2),
    special_ids: Vec::new(),
    dropped_ids: Vec::new(),
};

/// A hundred files of 100 distinct words each, 10..10010.
fn corpus(folder: &Path) -> Vec<TextSource> {
    for file in 0..100 {
        let words: Vec<_> = (0..100).map(|i| (10 + file * 100 + i).to_string()).collect();
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
    assert_eq!(all.text.len() as u64, all.counts.documents);
    assert_eq!(all.documents.iter().sum::<u64>(), all.text.iter().map(|t| t.documents).sum::<u64>());
    // No document has tokens in both halves.
    let documents = |ids: &[u32]| ids.iter().map(|id| (id - 10) / 100).collect::<HashSet<_>>();
    let (train, held_out) = (documents(&train), documents(&held_out));
    assert!(train.is_disjoint(&held_out) && held_out.len() > 4, "{held_out:?}");
    let held_out = Portion::Share(0.0);
    let little = HarvestConfig { tokens: Count(80), part_tokens: 500, held_out, ..config() };
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
    assert_eq!(a, b);
    assert_ne!(a.halves, c.halves);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| gather(&config(), &INFO, &sources)), a, "{threads} threads");
    }
}

#[test]
fn too_little_text_is_said() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.txt"), "10 11 12").unwrap();
    let sources = find(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
    let none = ProgressBar::hidden();
    let config = HarvestConfig { held_out: Portion::Share(0.0), ..config() };
    let error = collect(&config, &Words, &INFO, &sources, &none, &StopFlag::default()).unwrap_err();
    assert!(error.to_string().contains("no whole training sequence of 16"), "{error}");
}

#[test]
fn a_half_without_documents_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let words: Vec<_> = (10..2010).map(|i| i.to_string()).collect();
    std::fs::write(folder.path().join("a.txt"), words.join(" ")).unwrap();
    let sources = find(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
    let run = |config: &HarvestConfig| {
        collect(config, &Words, &INFO, &sources, &ProgressBar::hidden(), &StopFlag::default())
    };
    let error = run(&config()).unwrap_err().to_string();
    assert!(error.contains("1 documents") && error.contains("max_document_bytes"), "{error}");
    let cut = run(&HarvestConfig { max_document_bytes: Count(100), ..config() }).unwrap();
    assert!(cut.documents[1] > 4 && cut.counts.cut > 50);
}

#[test]
fn without_packing_every_sequence_lies_in_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let sources = corpus(folder.path());
    // 100 words make 6 sequences of 15 and a rest; parts of 20 become 30.
    let config = HarvestConfig { pack: false, part_tokens: 20, ..config() };
    let all = gather(&config, &INFO, &sources);
    assert_eq!(all.halves.iter().map(Tokens::n_sequences).sum::<usize>(), 600);
    for half in &all.halves {
        for sequence in (0..half.n_sequences()).map(|i| half.sequence(i)) {
            assert!(sequence[0] == 1 && sequence[1..].windows(2).all(|w| w[1] == w[0] + 1), "{sequence:?}");
            assert_eq!((sequence[1] - 10) / 100, (sequence[15] - 10) / 100);
        }
    }
    assert_eq!(all.counts.short, 0);
    let long = HarvestConfig { sequence_length: 102, ..config };
    let error = collect(&long, &Words, &INFO, &sources, &ProgressBar::hidden(), &StopFlag::default());
    assert!(error.unwrap_err().to_string().contains("no whole training sequence"));
    std::fs::write(folder.path().join("short.txt"), "9999").unwrap();
    let sources = find(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
    assert_eq!(gather(&HarvestConfig { sequence_length: 16, ..long }, &INFO, &sources).counts.short, 1);
}

#[test]
fn ids_are_used_as_they_are_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..50)
        .map(|i| {
            let ids: Vec<u32> = std::iter::once(1).chain(10 + i * 15..25 + i * 15).collect();
            format!("{{\"input_ids\": {ids:?}}}\n")
        })
        .collect();
    let path = folder.path().join("a.jsonl");
    std::fs::write(&path, &lines).unwrap();
    let sources = find(&[path.to_str().unwrap().to_owned()]).unwrap();
    let config = HarvestConfig { token_column: Some("input_ids".to_owned()), pack: false, ..config() };
    let all = gather(&config, &INFO, &sources);
    assert_eq!(all.halves.iter().map(Tokens::n_sequences).sum::<usize>(), 50);
    for sequence in all.halves.iter().flat_map(|half| half.ids.chunks(16)) {
        // The row's own beginning-of-sequence token is not doubled.
        assert!(sequence[0] == 1 && sequence[1] >= 10 && sequence[15] == sequence[1] + 14, "{sequence:?}");
    }
    std::fs::write(&path, lines.replace("700", "100000")).unwrap();
    let error = collect(&config, &Words, &INFO, &sources, &ProgressBar::hidden(), &StopFlag::default());
    assert!(error.unwrap_err().to_string().contains("id 100000"));
}

#[test]
fn broken_empty_and_odd_documents_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let sources = {
        corpus(folder.path());
        std::fs::write(folder.path().join("empty.txt"), " \n").unwrap();
        std::fs::write(folder.path().join("b.jsonl"), b"nonsense\n{\"text\": \"\"}\n{\"text\": \"77\"}\n")
            .unwrap();
        find(&[folder.path().to_str().unwrap().to_owned()]).unwrap()
    };
    let counts = gather(&HarvestConfig { tokens: Count(1 << 20), ..config() }, &INFO, &sources).counts;
    assert_eq!((counts.documents, counts.empty, counts.malformed), (101, 2, 1));
}

#[test]
fn files_of_the_hub_are_fetched_one_by_one_and_only_as_far_as_needed() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<(String, Vec<u8>)> = (0..4u32)
        .map(|file| {
            let line = |i: u32| {
                let words: Vec<_> = (0..20).map(|j| (10 + file * 2000 + i * 20 + j).to_string()).collect();
                format!("{{\"text\": \"{}\"}}\n", words.join(" "))
            };
            (format!("data/{file}.jsonl"), (0..100).map(line).collect::<String>().into_bytes())
        })
        .collect();
    let server = crate::hub::tests::dataset(files);
    let settings = crate::hub::tests::settings(&server.address, folder.path());
    let id = crate::hub::DatasetId::parse("hf://datasets/c/d/data/*.jsonl").unwrap().unwrap();
    let sources = crate::text::on_hub(&settings, &id).unwrap();
    assert_eq!(sources.len(), 4);
    let fetched = || server.take().iter().filter(|r| r.path.contains("/resolve/")).count();
    assert_eq!(fetched(), 0);
    let some = gather(&HarvestConfig { tokens: Count(2500), ..config() }, &INFO, &sources);
    // Each file has 2000 words.
    assert_eq!((some.text.len(), fetched()), (2, 2));
    assert!(some.text[0].name.starts_with("hf://datasets/c/d@0123"), "{:?}", some.text);
    assert_eq!(some.text[0].sha256.len(), 64);
    // All of it: what is there is not fetched again.
    let all = gather(&HarvestConfig { tokens: Count(8000), ..config() }, &INFO, &sources);
    assert_eq!((all.text.len(), fetched()), (4, 2));
}

/// [`Words`] that say who they are.
struct Known(&'static str);

impl Encode for Known {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Words.encode(text)
    }

    fn identity(&self) -> Option<String> {
        Some(self.0.to_owned())
    }
}

#[test]
fn kept_tokens_are_used_again_until_anything_that_matters_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (text, cache) = (folder.path().join("text"), folder.path().join("cache"));
    std::fs::create_dir(&text).unwrap();
    corpus(&text);
    let config = HarvestConfig {
        text: vec![text.to_str().unwrap().to_owned()],
        token_cache: Some(cache.to_str().unwrap().to_owned()),
        ..config()
    };
    let entries = || std::fs::read_dir(&cache).map_or(0, Iterator::count);
    let run = |config: &HarvestConfig, who| {
        super::corpus(config, &Known(who), &INFO, &StopFlag::default()).unwrap()
    };
    let first = run(&config, "a");
    assert_eq!(entries(), 1);
    assert_eq!(run(&HarvestConfig { taps: vec!["mlp.7".to_owned()], ..config.clone() }, "a"), first);
    assert_eq!(entries(), 1);
    run(&config, "b");
    run(&HarvestConfig { seed: 1, ..config.clone() }, "a");
    assert_eq!(entries(), 3);
    // An entry that says something else is really what is read.
    let entry = std::fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).find(|folder| {
        let text = std::fs::read_to_string(folder.join("tokens.json")).unwrap();
        let kept: serde_json::Value = serde_json::from_str(&text).unwrap();
        kept["counts"]["documents"] == first.counts.documents
            && std::fs::write(folder.join("tokens.json"), text.replace("\"empty\": 0", "\"empty\": 5"))
                .is_ok()
    });
    let entry = entry.unwrap();
    assert!([run(&config, "a"), run(&config, "b")].iter().any(|corpus| corpus.counts.empty == 5));
    // Damaged tokens are not used, and neither are those of another text of the same length.
    let path = entry.join("train/tokens.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!([run(&config, "a"), run(&config, "b")], [first.clone(), first.clone()]);
    let changed = text.join(&first.text[0].name);
    let words = std::fs::read_to_string(&changed).unwrap();
    let (one, rest) = words.split_once(' ').unwrap();
    std::fs::write(&changed, format!("{} {rest}", "9".repeat(one.len()))).unwrap();
    assert_ne!(run(&config, "a").text, first.text);
}
