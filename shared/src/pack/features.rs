//! `features/NNNNN.{safetensors,json}`: what a few neighbouring latents respond to.
//!
//! In memory a shard is a list of [`Feature`]s; on disk it is flat arrays with offsets, which compress
//! well and load without parsing. Words are indices into one table a shard.

use serde::{Deserialize, Serialize};

use super::error::{PackError, check};
use super::tensors::{Reader, Writer};
use super::{HISTOGRAM_BINS, TOP_K, shard_numbers, shard_words};

/// The features of the latents of one shard.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FeatureShard {
    /// Every distinct word of the shard.
    pub words: Vec<String>,
    /// One feature a latent, in order.
    pub features: Vec<Feature>,
}

/// What one latent responds to and does.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Feature {
    /// Tokens in each of [`HISTOGRAM_BINS`] uniform bins over `(0, max_activation]`.
    pub histogram: Vec<u32>,
    /// Nearest latents by cosine of decoder directions, descending, at most [`TOP_K`].
    pub neighbours: Vec<(u32, f32)>,
    /// Words (indices) whose logits it raises most, with the logit of a unit activation, descending.
    pub top_logits: Vec<(u32, f32)>,
    /// Words (indices) whose logits it lowers most, ascending.
    pub bottom_logits: Vec<(u32, f32)>,
    /// Places in the corpus where it is active.
    pub examples: Vec<Example>,
}

/// Why an example was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Among the largest activations.
    Top,
    /// From quarter 1 (lowest) to 4 (highest) of the range `(0, max_activation]`.
    Quantile(u8),
    /// Drawn uniformly among all tokens where the latent is active.
    Random,
}

impl Group {
    /// The number in the file.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Top => 0,
            Self::Quantile(quarter) => quarter,
            Self::Random => 255,
        }
    }

    /// The group of a number in a file.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Top),
            1..=4 => Some(Self::Quantile(code)),
            255 => Some(Self::Random),
            _ => None,
        }
    }
}

/// A window of text around a token on which a latent is active.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Why it was chosen.
    pub group: Group,
    /// The sequence of the corpus.
    pub sequence: u32,
    /// Position of the first token of the window in the sequence.
    pub start: u32,
    /// Index of the chosen token inside the window.
    pub peak: u16,
    /// The window's words (indices).
    pub words: Vec<u32>,
    /// The latent's activation on each token of the window; zero where it is not active.
    pub values: Vec<f32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Words {
    words: Vec<String>,
    top_logits: Vec<Vec<u32>>,
    bottom_logits: Vec<Vec<u32>>,
}

const TENSORS: [&str; 13] = [
    "histogram",
    "neighbours",
    "neighbour_cosines",
    "top_logit_values",
    "bottom_logit_values",
    "example_offsets",
    "example_group",
    "example_sequence",
    "example_start",
    "example_peak",
    "token_offsets",
    "token_words",
    "token_values",
];

impl FeatureShard {
    /// Reads shard `shard` of a pack, which holds `n` of the dictionary's `n_latents` latents.
    ///
    /// # Errors
    /// If a tensor or list is missing, stray or misshapen, an offset, index or value out of range.
    pub fn read(
        shard: usize,
        n: usize,
        n_latents: usize,
        numbers: &[u8],
        words: &[u8],
    ) -> Result<Self, PackError> {
        let (file, words_file) = (shard_numbers(shard), shard_words(shard));
        let reader = Reader::new(&file, numbers, &TENSORS)?;
        let words: Words = super::from_json(&words_file, words)?;
        let histogram: Vec<u32> = reader.values("histogram", &[n, HISTOGRAM_BINS])?;
        let columns = |name: &str| match reader.shape(name)?[..] {
            [_, k] if k <= TOP_K => Ok(k),
            ref other => {
                Err(PackError::invalid(&file, name, format!("[{n}, at most {TOP_K}]"), format!("{other:?}")))
            }
        };
        let (k_near, k_logits) = (columns("neighbours")?, columns("top_logit_values")?);
        let neighbours: Vec<u32> = reader.values("neighbours", &[n, k_near])?;
        let cosines: Vec<f32> = reader.values("neighbour_cosines", &[n, k_near])?;
        let top: Vec<f32> = reader.values("top_logit_values", &[n, k_logits])?;
        let bottom: Vec<f32> = reader.values("bottom_logit_values", &[n, k_logits])?;
        let mut examples = read_examples(&reader, &file, n)?.into_iter();
        for (name, lists) in [("top_logits", &words.top_logits), ("bottom_logits", &words.bottom_logits)] {
            let fits = lists.len() == n && lists.iter().all(|l| l.len() == k_logits);
            check(fits, &words_file, name, format!("{n} lists of {k_logits}"), lists.len())?;
        }
        let features = (0..n)
            .map(|i| Feature {
                histogram: histogram[i * HISTOGRAM_BINS..(i + 1) * HISTOGRAM_BINS].to_vec(),
                neighbours: zip_row(&neighbours, &cosines, i, k_near),
                top_logits: zip_row(&words.top_logits[i], &top[i * k_logits..], 0, k_logits),
                bottom_logits: zip_row(&words.bottom_logits[i], &bottom[i * k_logits..], 0, k_logits),
                examples: examples.next().unwrap_or_default(),
            })
            .collect();
        let read = Self { words: words.words, features };
        read.validate(shard, n_latents)?;
        Ok(read)
    }

    /// The bytes of the two files of shard `shard` of a dictionary of `n_latents`.
    ///
    /// # Errors
    /// If features have lists of different lengths, or an index or value is out of range.
    pub fn write(&self, shard: usize, n_latents: usize) -> Result<(Vec<u8>, Vec<u8>), PackError> {
        self.validate(shard, n_latents)?;
        let (file, n) = (shard_numbers(shard), self.features.len());
        let mut writer = Writer::new(&file);
        let all = |f: fn(&Feature) -> &Vec<(u32, f32)>| self.features.iter().flat_map(f);
        let k_near = self.features.first().map_or(0, |f| f.neighbours.len());
        let k_logits = self.features.first().map_or(0, |f| f.top_logits.len());
        writer.add(
            "histogram",
            &[n, HISTOGRAM_BINS],
            self.features.iter().flat_map(|f| f.histogram.iter().copied()),
        )?;
        writer.add("neighbours", &[n, k_near], all(|f| &f.neighbours).map(|p| p.0))?;
        writer.add("neighbour_cosines", &[n, k_near], all(|f| &f.neighbours).map(|p| p.1))?;
        writer.add("top_logit_values", &[n, k_logits], all(|f| &f.top_logits).map(|p| p.1))?;
        writer.add("bottom_logit_values", &[n, k_logits], all(|f| &f.bottom_logits).map(|p| p.1))?;
        self.write_examples(&mut writer, &file)?;
        let indices = |f: fn(&Feature) -> &Vec<(u32, f32)>| -> Vec<Vec<u32>> {
            self.features.iter().map(|feature| f(feature).iter().map(|p| p.0).collect()).collect()
        };
        let words = Words {
            words: self.words.clone(),
            top_logits: indices(|f| &f.top_logits),
            bottom_logits: indices(|f| &f.bottom_logits),
        };
        Ok((writer.finish()?, super::to_json(&shard_words(shard), &words, false)?))
    }

    fn write_examples(&self, writer: &mut Writer<'_>, file: &str) -> Result<(), PackError> {
        let examples: Vec<&Example> = self.features.iter().flat_map(|f| &f.examples).collect();
        let example_offsets = offsets(file, self.features.iter().map(|f| f.examples.len()))?;
        let token_offsets = offsets(file, examples.iter().map(|e| e.words.len()))?;
        let (s, e) = (example_offsets.len(), examples.len());
        let t = token_offsets.last().map_or(0, |&t| t as usize);
        writer.add("example_offsets", &[s], example_offsets)?;
        writer.add("example_group", &[e], examples.iter().map(|x| x.group.code()))?;
        writer.add("example_sequence", &[e], examples.iter().map(|x| x.sequence))?;
        writer.add("example_start", &[e], examples.iter().map(|x| x.start))?;
        writer.add("example_peak", &[e], examples.iter().map(|x| x.peak))?;
        writer.add("token_offsets", &[e + 1], token_offsets)?;
        writer.add("token_words", &[t], examples.iter().flat_map(|x| x.words.iter().copied()))?;
        writer.add("token_values", &[t], examples.iter().flat_map(|x| x.values.iter().copied()))
    }

    fn validate(&self, shard: usize, n_latents: usize) -> Result<(), PackError> {
        let (file, words_file) = (shard_numbers(shard), shard_words(shard));
        let n_words = self.words.len();
        for (i, feature) in self.features.iter().enumerate() {
            let at = |name: &str| format!("{name} of latent {i} of the shard");
            let bins = feature.histogram.len();
            check(bins == HISTOGRAM_BINS, &file, &at("histogram"), format!("{HISTOGRAM_BINS} bins"), bins)?;
            let stray = feature.neighbours.iter().find(|p| p.0 as usize >= n_latents);
            check(
                stray.is_none(),
                &file,
                &at("neighbours"),
                format!("latents below {n_latents}"),
                format!("{stray:?}"),
            )?;
            for (name, list) in
                [("top_logits", &feature.top_logits), ("bottom_logits", &feature.bottom_logits)]
            {
                let stray = list.iter().find(|p| p.0 as usize >= n_words);
                let wanted = format!("word indices below {n_words}");
                check(stray.is_none(), &words_file, &at(name), wanted, format!("{stray:?}"))?;
            }
            let logits = (feature.top_logits.len(), feature.bottom_logits.len());
            check(
                logits.0 == logits.1,
                &file,
                &at("logits"),
                "as many top as bottom",
                format!("{logits:?}"),
            )?;
            for example in &feature.examples {
                example.validate(&file, &at("examples"), n_words)?;
            }
        }
        Ok(())
    }
}

impl Example {
    fn validate(&self, file: &str, field: &str, n_words: usize) -> Result<(), PackError> {
        let tokens = self.words.len();
        check(tokens == self.values.len(), file, field, format!("{tokens} values"), self.values.len())?;
        check(usize::from(self.peak) < tokens, file, field, format!("a peak below {tokens}"), self.peak)?;
        check(
            Group::from_code(self.group.code()) == Some(self.group),
            file,
            field,
            "a known group",
            format!("{:?}", self.group),
        )?;
        let stray = self.words.iter().find(|&&w| w as usize >= n_words);
        check(stray.is_none(), file, field, format!("word indices below {n_words}"), format!("{stray:?}"))?;
        let bad = self.values.iter().find(|&&v| !(v >= 0.0 && v.is_finite()));
        check(bad.is_none(), file, field, "activations of at least 0", format!("{bad:?}"))
    }
}

/// The examples of each of `n` latents.
fn read_examples(reader: &Reader<'_>, file: &str, n: usize) -> Result<Vec<Vec<Example>>, PackError> {
    let example_offsets: Vec<u32> = reader.values("example_offsets", &[n + 1])?;
    let e = reader.shape("example_group")?.first().copied().unwrap_or(0);
    let groups: Vec<u8> = reader.values("example_group", &[e])?;
    let sequences: Vec<u32> = reader.values("example_sequence", &[e])?;
    let starts: Vec<u32> = reader.values("example_start", &[e])?;
    let peaks: Vec<u16> = reader.values("example_peak", &[e])?;
    let token_offsets: Vec<u32> = reader.values("token_offsets", &[e + 1])?;
    let t = reader.shape("token_words")?.first().copied().unwrap_or(0);
    let words: Vec<u32> = reader.values("token_words", &[t])?;
    let values: Vec<f32> = reader.values("token_values", &[t])?;
    check_offsets(file, "example_offsets", &example_offsets, e)?;
    check_offsets(file, "token_offsets", &token_offsets, t)?;
    let example = |i: usize| -> Result<Example, PackError> {
        let tokens = token_offsets[i] as usize..token_offsets[i + 1] as usize;
        let group = Group::from_code(groups[i])
            .ok_or_else(|| PackError::invalid(file, "example_group", "0 to 4 or 255", groups[i]))?;
        Ok(Example {
            group,
            sequence: sequences[i],
            start: starts[i],
            peak: peaks[i],
            words: words[tokens.clone()].to_vec(),
            values: values[tokens].to_vec(),
        })
    };
    example_offsets.windows(2).map(|w| (w[0] as usize..w[1] as usize).map(example).collect()).collect()
}

/// Offsets start at 0, never fall, and end at `total`.
pub(super) fn check_offsets(file: &str, name: &str, offsets: &[u32], total: usize) -> Result<(), PackError> {
    let ends = offsets.first() == Some(&0) && offsets.last().is_some_and(|&l| l as usize == total);
    let holds = ends && offsets.windows(2).all(|w| w[0] <= w[1]);
    check(holds, file, name, format!("0 = first ≤ … ≤ last = {total}"), "other offsets")
}

/// Where each of these lengths begins, and where the last ends.
pub(super) fn offsets(file: &str, lengths: impl Iterator<Item = usize>) -> Result<Vec<u32>, PackError> {
    let mut out = vec![0u32];
    let mut sum = 0usize;
    for length in lengths {
        sum += length;
        out.push(
            u32::try_from(sum).map_err(|_| PackError::invalid(file, "offsets", "at most 2^32 - 1", sum))?,
        );
    }
    Ok(out)
}

fn zip_row(a: &[u32], b: &[f32], row: usize, k: usize) -> Vec<(u32, f32)> {
    a[row * k..(row + 1) * k].iter().copied().zip(b[row * k..(row + 1) * k].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> FeatureShard {
        let example = |group, peak: u16| Example {
            group,
            sequence: 3,
            start: 5,
            peak,
            words: vec![0, 1, 1],
            values: vec![0.0, 2.0, 0.5],
        };
        let feature = |examples| Feature {
            histogram: (0..40).collect(),
            neighbours: vec![(19, 0.5), (2, -0.25)],
            top_logits: vec![(1, 0.75)],
            bottom_logits: vec![(0, -0.75)],
            examples,
        };
        FeatureShard {
            words: vec!["a".to_owned(), " b".to_owned()],
            features: vec![
                feature(vec![example(Group::Top, 1), example(Group::Quantile(4), 2)]),
                feature(vec![]),
                feature(vec![example(Group::Random, 1)]),
            ],
        }
    }

    #[test]
    fn round_trip() {
        let (numbers, words) = shard().write(7, 20).unwrap();
        assert_eq!(FeatureShard::read(7, 3, 20, &numbers, &words).unwrap(), shard());
        assert!(FeatureShard::read(7, 2, 20, &numbers, &words).is_err(), "another number of latents");
        assert!(FeatureShard::read(7, 3, 19, &numbers, &words).is_err(), "a neighbour out of range");
        let error = FeatureShard::read(7, 3, 20, &numbers, b"{}").unwrap_err().to_string();
        assert!(error.starts_with("features/00007.json"), "{error}");
    }

    #[test]
    fn each_rule_is_enforced() {
        let broken: [fn(&mut FeatureShard); 8] = [
            |s| s.words.truncate(1),
            |s| s.features[0].histogram.truncate(39),
            |s| s.features[1].neighbours.truncate(1),
            |s| s.features[1].top_logits.clear(),
            |s| s.features[0].examples[0].peak = 3,
            |s| s.features[0].examples[0].values[0] = -1.0,
            |s| s.features[0].examples[0].group = Group::Quantile(9),
            |s| s.features[0].examples[0].words.truncate(2),
        ];
        for (k, breaks) in broken.iter().enumerate() {
            let mut s = shard();
            breaks(&mut s);
            assert!(s.write(0, 20).is_err(), "rule {k} not enforced");
        }
    }

    /// Damage to any single byte gives an error or another valid shard, never a panic.
    #[test]
    fn damaged_bytes_never_panic() {
        let (numbers, words) = shard().write(0, 20).unwrap();
        let mut refused = 0;
        for at in 0..numbers.len() {
            for value in [0x00, 0x7f, 0xff] {
                let mut damaged = numbers.clone();
                damaged[at] = value;
                refused += usize::from(FeatureShard::read(0, 3, 20, &damaged, &words).is_err());
            }
        }
        assert!(refused > 100, "damage was hardly noticed: {refused}");
    }
}
