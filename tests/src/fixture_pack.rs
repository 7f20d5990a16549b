//! A small synthetic pack whose codes are true: everything in it comes from a random autoencoder and the
//! f64 reference, by obvious loops, so that pages and readers can be tested without a language model.

use std::collections::BTreeMap;

use shared::metrics::{Density, Fvu};
use shared::pack::{
    self, ActivationKind, CorpusInfo, Decoder, Encoder, Example, Feature, FeatureShard, FileEntry,
};
use shared::pack::{
    Group, HISTOGRAM_BINS, Index, Manifest, Metrics, ModelInfo, PackError, SaeInfo, Text, TextEntry,
};
use shared::tap::Site;
use shared::{Activation, Codes, RowScaling, Rows, Sae, SaeParts, reference};

/// Width of the activation vectors.
pub const D_IN: usize = 16;
/// Number of latents; the last four never fire.
pub const N_LATENTS: usize = 64;
const N_DEAD: usize = 4;
const N_SEQUENCES: usize = 48;
const SEQUENCE_LENGTH: usize = 24;
const WINDOW: usize = 6;
const LATENTS_PER_SHARD: usize = 8;

pub(crate) const VOCABULARY: [&str; 32] = [
    "The",
    " the",
    " a",
    " whale",
    " sea",
    " ship",
    " captain",
    " sailed",
    " over",
    " under",
    " cold",
    " grey",
    " water",
    ",",
    ".",
    "\n",
    " \u{201c}",
    "\u{201d}",
    " and",
    " or",
    " not",
    " 18",
    "51",
    " caf\u{e9}",
    " \u{65e5}",
    "\u{672c}",
    "<0xE2>",
    " was",
    " is",
    " white",
    " night",
    "'s",
];

/// A deterministic stream of numbers, the same on every machine.
#[derive(Debug, Clone)]
pub struct Stream(u64);

impl Stream {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    /// A number below `n` (which must not be zero).
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    /// A value in `[-1, 1)`, a multiple of 2⁻¹².
    pub fn signed(&mut self) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "below 2^13")]
        let value = self.below(8192) as f32 / 4096.0 - 1.0;
        value
    }
}

/// The autoencoder of the fixture.
///
/// # Errors
/// Never for these sizes; the constructor checks them.
pub fn sae() -> Result<Sae, PackError> {
    let mut stream = Stream::new(1);
    let mut w_enc = Vec::with_capacity(N_LATENTS * D_IN);
    for _ in 0..N_LATENTS {
        let row: Vec<f32> = (0..D_IN).map(|_| stream.signed()).collect();
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-3);
        w_enc.extend(row.iter().map(|v| v / norm));
    }
    let w_dec = w_enc.iter().map(|w| 0.4 * w + 0.05 * stream.signed()).collect();
    let b_enc = (0..N_LATENTS).map(|_| 0.25 * stream.signed()).collect();
    let b_dec = (0..D_IN).map(|_| 0.1 * stream.signed()).collect();
    let live = |i: usize| i < N_LATENTS - N_DEAD;
    let threshold =
        (0..N_LATENTS).map(|i| if live(i) { 1.0 + 0.25 * stream.signed() } else { 1e6 }).collect();
    let activation = Activation::JumpRelu { threshold };
    Ok(Sae::new(SaeParts {
        d_in: D_IN,
        d_out: D_IN,
        w_enc,
        b_enc,
        w_dec,
        b_dec,
        activation,
        w_skip: None,
        rows: RowScaling::None,
    })?)
}

/// Random sequences with an activation vector a token: the token's own direction and some noise.
pub(crate) struct Corpus {
    pub(crate) tokens: Vec<u32>,
    pub(crate) x: Vec<f32>,
    pub(crate) codes: Codes,
}

/// Tokens of the corpus.
pub(crate) const N_TOKENS: usize = N_SEQUENCES * SEQUENCE_LENGTH;

pub(crate) fn corpus(sae: &Sae, seed: u64, n_tokens: usize) -> Result<Corpus, PackError> {
    let mut stream = Stream::new(seed);
    let tokens: Vec<u32> = (0..n_tokens).map(|_| stream.below(VOCABULARY.len()) as u32).collect();
    let mut x = Vec::with_capacity(n_tokens * D_IN);
    for &token in &tokens {
        let mut own = Stream::new(1000 + u64::from(token));
        x.extend((0..D_IN).map(|_| own.signed() + 0.3 * stream.signed()));
    }
    let codes = reference::encode(sae, Rows::new(&x, D_IN)?)?;
    Ok(Corpus { tokens, x, codes })
}

/// Every file of the pack, by path; the same bytes on every call.
///
/// # Errors
/// Never for these sizes; the writers check them.
pub fn files() -> Result<BTreeMap<String, Vec<u8>>, PackError> {
    let sae = sae()?;
    let corpus = corpus(&sae, 2, N_TOKENS)?;
    let mut files = described(&sae, &corpus)?;
    add_texts(&sae, &mut files)?;
    let manifest = manifest(&sae, &corpus, &files)?;
    files.insert(pack::MANIFEST.to_owned(), manifest.write()?);
    Ok(files)
}

/// The autoencoder, and what its latents respond to in `corpus`.
pub(crate) fn described(sae: &Sae, corpus: &Corpus) -> Result<BTreeMap<String, Vec<u8>>, PackError> {
    let mut files = BTreeMap::new();
    files.insert(pack::ENCODER.to_owned(), Encoder::of(sae).write()?);
    files.insert(pack::DECODER.to_owned(), Decoder::of(sae).write()?);
    let features: Vec<Feature> = (0..N_LATENTS).map(|latent| feature(sae, corpus, latent)).collect();
    let words: Vec<String> = VOCABULARY.iter().map(|&w| w.to_owned()).collect();
    for (shard, features) in features.chunks(LATENTS_PER_SHARD).enumerate() {
        let shard_files = FeatureShard { words: words.clone(), features: features.to_vec() };
        let (numbers, json) = shard_files.write(shard, N_LATENTS)?;
        files.insert(pack::shard_numbers(shard), numbers);
        files.insert(pack::shard_words(shard), json);
    }
    let (numbers, json) = index(corpus, &features).write()?;
    files.insert(pack::INDEX_NUMBERS.to_owned(), numbers);
    files.insert(pack::INDEX_WORDS_FILE.to_owned(), json);
    Ok(files)
}

/// The tokens on which `latent` is active, with its value, largest first.
fn firings(corpus: &Corpus, latent: usize) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> = Vec::new();
    for (t, (latents, values)) in corpus.codes.iter().enumerate() {
        all.extend(latents.iter().zip(values).filter(|(l, _)| **l as usize == latent).map(|(_, v)| (t, *v)));
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

fn feature(sae: &Sae, corpus: &Corpus, latent: usize) -> Feature {
    let firings = firings(corpus, latent);
    let max = firings.first().map_or(0.0, |f| f.1);
    let part = |value: f32, parts: usize| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "small"
        )]
        let part = (value / max * parts as f32).ceil() as usize;
        part.clamp(1, parts) - 1
    };
    let mut histogram = vec![0; HISTOGRAM_BINS];
    for firing in &firings {
        histogram[part(firing.1, HISTOGRAM_BINS)] += 1;
    }
    let mut examples: Vec<Example> =
        firings.iter().take(6).map(|&f| example(corpus, latent, f.0, Group::Top)).collect();
    for quarter in (0..4u8).rev() {
        let inside = firings.iter().filter(|f| part(f.1, 4) == usize::from(quarter)).take(2);
        examples.extend(inside.map(|f| example(corpus, latent, f.0, Group::Quantile(quarter + 1))));
    }
    let mut stream = Stream::new(latent as u64);
    for _ in 0..firings.len().min(3) {
        examples.push(example(corpus, latent, firings[stream.below(firings.len())].0, Group::Random));
    }
    let direction = |i: usize| sae.decoder_direction(i);
    let norm = |i: usize| reference::dot(direction(i), direction(i)).sqrt();
    let cosine = |i: usize| (reference::dot(direction(i), direction(latent)) / norm(i) / norm(latent)) as f32;
    let mut neighbours: Vec<(u32, f32)> =
        (0..N_LATENTS).filter(|&i| i != latent).map(|i| (i as u32, cosine(i))).collect();
    neighbours.sort_by(|a, b| b.1.total_cmp(&a.1));
    neighbours.truncate(pack::TOP_K);
    let mut logits: Vec<(u32, f32)> = (0..VOCABULARY.len() as u32)
        .map(|word| {
            let mut own = Stream::new(1000 + u64::from(word));
            (word, direction(latent).iter().map(|d| d * own.signed()).sum())
        })
        .collect();
    logits.sort_by(|a, b| b.1.total_cmp(&a.1));
    let top_logits = logits[..pack::TOP_K].to_vec();
    let bottom_logits = logits.iter().rev().take(pack::TOP_K).copied().collect();
    Feature { histogram, neighbours, top_logits, bottom_logits, examples }
}

fn example(corpus: &Corpus, latent: usize, token: usize, group: Group) -> Example {
    let (sequence, position) = (token / SEQUENCE_LENGTH, token % SEQUENCE_LENGTH);
    let start = position.saturating_sub(WINDOW);
    let window = start..(position + WINDOW + 1).min(SEQUENCE_LENGTH);
    let value = |position: usize| {
        let (latents, values) = corpus.codes.row(sequence * SEQUENCE_LENGTH + position);
        latents.iter().position(|&l| l as usize == latent).map_or(0.0, |k| values[k])
    };
    Example {
        group,
        sequence: sequence as u32,
        start: start as u32,
        peak: (position - start) as u16,
        words: window.clone().map(|p| corpus.tokens[sequence * SEQUENCE_LENGTH + p]).collect(),
        values: window.map(value).collect(),
    }
}

fn index(corpus: &Corpus, features: &[Feature]) -> Index {
    let mut index = Index::default();
    for (latent, feature) in features.iter().enumerate() {
        let firings = firings(corpus, latent);
        let n = firings.len() as f32;
        index.density.push(n / corpus.tokens.len() as f32);
        index.max_activation.push(firings.first().map_or(0.0, |f| f.1));
        index.mean_activation.push(firings.iter().map(|f| f.1).sum::<f32>() / n.max(1.0));
        let mut totals = vec![0.0f32; VOCABULARY.len()];
        for &(t, value) in &firings {
            totals[corpus.tokens[t] as usize] += value;
        }
        let mut order: Vec<usize> = (0..VOCABULARY.len()).filter(|&w| totals[w] > 0.0).collect();
        order.sort_by(|&a, &b| totals[b].total_cmp(&totals[a]));
        let word = |w: usize| VOCABULARY[w].to_owned();
        index.top_tokens.push(order.into_iter().take(pack::INDEX_WORDS).map(word).collect());
        let top = feature.top_logits.iter().take(pack::INDEX_WORDS);
        index.top_logits.push(top.map(|p| word(p.0 as usize)).collect());
    }
    index
}

fn add_texts(sae: &Sae, files: &mut BTreeMap<String, Vec<u8>>) -> Result<(), PackError> {
    let mut list = Vec::new();
    for (i, (id, title)) in [("first", "First text"), ("second", "Second text")].into_iter().enumerate() {
        let corpus = corpus(sae, 10 + i as u64, 40)?;
        let file = pack::text_numbers(i);
        let words = corpus.tokens.iter().map(|&t| VOCABULARY[t as usize].to_owned()).collect();
        let skip = (0..corpus.tokens.len()).map(|t| t == 0).collect();
        files.insert(file.clone(), Text { tokens: corpus.tokens, x: corpus.x, skip }.write(&file)?);
        let source = "random words".to_owned();
        list.push(TextEntry { id: id.to_owned(), title: title.to_owned(), source, file, words });
    }
    files.insert(pack::TEXTS.to_owned(), TextEntry::write_list(&list)?);
    Ok(())
}

pub(crate) fn manifest(
    sae: &Sae,
    corpus: &Corpus,
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<Manifest, PackError> {
    let mut density = Density::new(N_LATENTS);
    density.update(&corpus.codes)?;
    let mut fvu = Fvu::new(D_IN);
    let reconstruction = reference::decode(sae, Rows::new(&corpus.x, D_IN)?, &corpus.codes)?;
    fvu.update(Rows::new(&corpus.x, D_IN)?, Rows::new(&reconstruction, D_IN)?)?;
    let dead = density.counts().iter().filter(|&&c| c == 0).count();
    let metrics = Metrics {
        l0: Some(corpus.codes.n_active() as f64 / corpus.codes.n_rows() as f64),
        fvu: fvu.value(),
        dead_share: Some(dead as f64 / N_LATENTS as f64),
        ..Metrics::default()
    };
    Ok(Manifest {
        format: pack::FORMAT.to_owned(),
        version: pack::VERSION,
        name: "fixture".to_owned(),
        title: "Synthetic fixture".to_owned(),
        model: ModelInfo {
            name: "random words".to_owned(),
            architecture: "none".to_owned(),
            n_layers: 4,
            d_model: D_IN,
        },
        sae: SaeInfo {
            site: Site::Resid,
            layer: 2,
            d_in: D_IN,
            n_latents: N_LATENTS,
            activation: ActivationKind::of(sae.activation()),
            rows: sae.rows(),
        },
        corpus: CorpusInfo {
            name: "random words".to_owned(),
            n_tokens: corpus.tokens.len() as u64,
            sequence_length: SEQUENCE_LENGTH,
        },
        metrics: Some(metrics),
        latents_per_shard: LATENTS_PER_SHARD,
        n_shards: N_LATENTS.div_ceil(LATENTS_PER_SHARD),
        flow: None,
        density_histogram: density.log10_histogram(-7, 4).into(),
        files: files.iter().map(|(path, bytes)| (path.clone(), FileEntry::of(bytes))).collect(),
        provenance: serde_json::json!({"made_by": "the conformance crate", "weights": "random"}),
    })
}
