//! A small synthetic pack of a multi-layer autoencoder, as large on the screen as a real one: thirty layers, 128 tokens. Everything
//! in it comes from a random autoencoder and the f64 reference, by obvious loops.
//!
//! There is no language model: a layer's vectors are the layer's before it with something added, and running on without a latent
//! leaves everything else as it is.

use std::collections::BTreeMap;

use shared::multi_layer::Layer;
use shared::pack::flow::{
    self, CHANGES, Change, Effect, FlowEntry, FlowInfo, FlowLatents, FlowText, FlowThresholds, FlowVectors,
    LENS_WORDS, LensCell, LensShard, TRANSITIONS, Transition,
};
use shared::pack::{self, FileEntry, Manifest, PackError, TextEntry};
use shared::tap::{Site, TapPoint};
use shared::{Activation, Codes, CodesBuilder, Rows, Sae, SaeParts, layer_thresholds, reference};

use crate::fixture_pack::{
    Corpus, D_IN, N_LATENTS, N_TOKENS, Stream, VOCABULARY, corpus, described, manifest, sae,
};

/// Number of layers.
pub const N_LAYERS: usize = 30;
/// Tokens of the first text; the second is shorter.
pub const TEXT_TOKENS: usize = 128;
/// Latents that are described, the others are not.
pub const N_DESCRIBED: usize = 40;
const PER_LENS: usize = 8;
const N_EFFECTS: usize = 6;
/// Where the vectors of the corpus at a layer depart from those of the tokens themselves.
const DRIFT: f32 = 0.06;

/// Every file of the pack, by path; the same bytes on every call.
///
/// # Errors
/// Never for these sizes; the writers check them.
pub fn files() -> Result<BTreeMap<String, Vec<u8>>, PackError> {
    let sae = sae()?;
    let base = corpus(&sae, 2, N_TOKENS)?;
    let layers: Vec<Vec<f32>> = (0..N_LAYERS).map(|layer| vectors(&base, layer)).collect();
    let thresholds: Vec<f32> = (0..N_LAYERS).flat_map(|layer| thresholds(&sae, layer)).collect();
    let saes = (0..N_LAYERS).map(|layer| at(&sae, layer)).collect::<Result<Vec<Sae>, PackError>>()?;
    let codes = layers.iter().zip(&saes).map(|(x, sae)| Ok(reference::encode(sae, Rows::new(x, D_IN)?)?));
    let codes: Vec<Codes> = codes.collect::<Result<_, PackError>>()?;
    let sae = layer_thresholds::lowest(sae, &thresholds)?;
    let merged = Corpus { tokens: base.tokens, x: base.x, codes: largest(&codes)? };
    let mut files = described(&sae, &merged)?;
    files.insert(pack::TEXTS.to_owned(), TextEntry::write_list(&[])?);

    let mut entries = Vec::new();
    for (i, (id, title, n)) in
        [("long", "Long text", TEXT_TOKENS), ("short", "Short text", 20)].into_iter().enumerate()
    {
        let base = corpus(&sae, 20 + i as u64, n)?;
        let x: Vec<f32> = (0..N_LAYERS).flat_map(|layer| vectors(&base, layer)).collect();
        let rounded = FlowVectors::round(&x, N_LAYERS);
        let text = text(&saes, &base, &rounded, &layers)?;
        let entry = FlowEntry {
            id: id.to_owned(),
            title: title.to_owned(),
            source: "random words".to_owned(),
            file: flow::flow_text(i),
            vectors: flow::flow_vectors(i),
            words: base.tokens.iter().map(|&t| VOCABULARY[t as usize].to_owned()).collect(),
        };
        files.insert(entry.file.clone(), text.write(&entry.file)?);
        files.insert(entry.vectors.clone(), rounded.write(D_IN, &entry.vectors)?);
        entries.push(entry);
    }
    files.insert(flow::FLOW.to_owned(), FlowEntry::write_list(&entries)?);
    add_latents(&sae, &codes, &mut files)?;
    let thresholds = FlowThresholds::new(thresholds, N_LATENTS);
    files.insert(flow::FLOW_THRESHOLDS.to_owned(), thresholds.write()?);

    let layer = |layer| Layer {
        tap: TapPoint::new(Site::Resid, layer),
        scale: 1.0 + layer as f64,
        max_input_norm: None,
    };
    let info = FlowInfo {
        layers: (0..N_LAYERS).map(layer).collect(),
        thresholds_per_layer: true,
        n_described: N_DESCRIBED,
        latents_per_lens: PER_LENS,
    };
    let one = manifest(&sae, &merged, &files)?;
    let manifest = Manifest {
        name: "fixture-layers".to_owned(),
        title: "Synthetic layers".to_owned(),
        model: pack::ModelInfo { n_layers: N_LAYERS, ..one.model },
        sae: pack::SaeInfo { layer: 0, ..one.sae },
        metrics: None,
        flow: Some(info),
        files: files.iter().map(|(path, bytes)| (path.clone(), FileEntry::of(bytes))).collect(),
        ..one
    };
    files.insert(pack::MANIFEST.to_owned(), manifest.write()?);
    Ok(files)
}

/// The thresholds of a layer: those of the dictionary, some higher and some lower.
fn thresholds(sae: &Sae, layer: usize) -> Vec<f32> {
    let factor = |i: usize| [0.9, 1.0, 1.2][(layer + i) % 3];
    (0..N_LATENTS).map(|i| sae.activation().threshold(i).unwrap_or(0.0) * factor(i)).collect()
}

/// The dictionary with the thresholds of a layer.
fn at(sae: &Sae, layer: usize) -> Result<Sae, PackError> {
    let activation = Activation::JumpRelu { threshold: thresholds(sae, layer) };
    Ok(Sae::new(SaeParts { activation, ..sae.clone().into_parts() })?)
}

/// The vectors of `corpus` at a layer: each layer adds something of its own, and something of the token before.
fn vectors(corpus: &Corpus, layer: usize) -> Vec<f32> {
    let mut x = corpus.x.clone();
    for step in 0..layer {
        let mut own = Stream::new(5000 + step as u64);
        let drift: Vec<f32> = (0..D_IN).map(|_| DRIFT * own.signed()).collect();
        for token in (0..corpus.tokens.len()).rev() {
            for i in 0..D_IN {
                let before = if token > 0 { corpus.x[(token - 1) * D_IN + i] } else { 0.0 };
                x[token * D_IN + i] += drift[i] + 0.02 * before;
            }
        }
    }
    x
}

/// Of every token each latent's largest activation at any layer.
fn largest(layers: &[Codes]) -> Result<Codes, PackError> {
    let mut builder = CodesBuilder::new(N_LATENTS);
    for token in 0..N_TOKENS {
        let mut best: BTreeMap<u32, f32> = BTreeMap::new();
        for (latents, values) in layers.iter().map(|codes| codes.row(token)) {
            for (&latent, &value) in latents.iter().zip(values) {
                let most = best.entry(latent).or_default();
                *most = most.max(value);
            }
        }
        best.into_iter().for_each(|(latent, value)| builder.push(latent, value));
        builder.end_row()?;
    }
    Ok(builder.finish())
}

/// Codes of a text, its first token skipped everywhere.
fn encode(sae: &Sae, x: &[f32]) -> Result<Codes, PackError> {
    let codes = reference::encode(sae, Rows::new(x, D_IN)?)?;
    let mut builder = CodesBuilder::new(N_LATENTS);
    for (token, (latents, values)) in codes.iter().enumerate() {
        if token > 0 {
            latents.iter().zip(values).for_each(|(&latent, &value)| builder.push(latent, value));
        }
        builder.end_row()?;
    }
    Ok(builder.finish())
}

fn text(
    saes: &[Sae],
    base: &Corpus,
    vectors: &FlowVectors,
    corpus: &[Vec<f32>],
) -> Result<FlowText, PackError> {
    let t = base.tokens.len();
    let (mut all, mut errors, mut layers) = (CodesBuilder::new(N_LATENTS), Vec::new(), Vec::new());
    for ((layer, corpus), sae) in corpus.iter().enumerate().zip(saes) {
        let x = vectors.layer(layer);
        let codes = encode(sae, &x)?;
        let rebuilt = reference::decode(sae, Rows::new(&x, D_IN)?, &codes)?;
        let mean = |i: usize| {
            let column = corpus.iter().skip(i).step_by(D_IN).map(|&x| f64::from(x));
            column.sum::<f64>() / N_TOKENS as f64
        };
        let means: Vec<f64> = (0..D_IN).map(mean).collect();
        for token in 0..t {
            let row = token * D_IN..(token + 1) * D_IN;
            let squares = |y: &dyn Fn(usize) -> f64| -> f64 {
                x[row.clone()].iter().enumerate().map(|(i, x)| (f64::from(*x) - y(i)).powi(2)).sum()
            };
            let share = squares(&|i| f64::from(rebuilt[token * D_IN + i])) / squares(&|i| means[i]);
            errors.push(if token == 0 { 0.0 } else { share as f32 });
            let (latents, values) = codes.row(token);
            latents.iter().zip(values).for_each(|(&latent, &value)| all.push(latent, value));
            all.end_row()?;
        }
        layers.push((x, codes));
    }
    let skip = (0..N_LAYERS * t).map(|cell| cell % t == 0).collect();
    let effects = effects(saes, &layers)?;
    Ok(FlowText { tokens: base.tokens.clone(), skip, codes: all.finish(), errors, effects })
}

fn sum(codes: &Codes, latent: u32) -> f32 {
    let on = |row: (&[u32], &[f32])| row.0.binary_search(&latent).map_or(0.0, |at| row.1[at]);
    codes.iter().map(on).sum()
}

/// Takes the strongest latents out at a layer, each by itself, from that layer on.
fn effects(saes: &[Sae], layers: &[(Vec<f32>, Codes)]) -> Result<Vec<Effect>, PackError> {
    let at = N_LAYERS / 3;
    let (_, here) = &layers[at];
    let mut order: Vec<u32> = (0..N_LATENTS as u32).collect();
    order.sort_by(|&a, &b| sum(here, b).total_cmp(&sum(here, a)));
    let mut effects = Vec::new();
    for &latent in &order[..N_EFFECTS] {
        let mut changes = Vec::new();
        for (number, (x, before)) in layers.iter().enumerate().skip(at + 1) {
            let mut without = x.clone();
            for (token, (latents, values)) in here.iter().enumerate() {
                let value = latents.binary_search(&latent).map_or(0.0, |at| values[at]);
                let direction = saes[at].decoder_direction(latent as usize);
                for (x, d) in without[token * D_IN..(token + 1) * D_IN].iter_mut().zip(direction) {
                    *x -= value * d;
                }
            }
            let after = encode(&saes[number], &without)?;
            let difference = |k: &u32| (sum(&after, *k) - sum(before, *k)).abs();
            let mut changed: Vec<u32> = (0..N_LATENTS as u32).filter(|k| difference(k) > 0.0).collect();
            changed.sort_by(|a, b| difference(b).total_cmp(&difference(a)));
            changes.extend(changed.into_iter().take(CHANGES).map(|latent| Change {
                layer: number as u16,
                latent,
                before: sum(before, latent),
                after: sum(&after, latent),
            }));
        }
        effects.push(Effect { latent, layer: at as u16, removed: sum(here, latent), changes });
    }
    Ok(effects)
}

/// The described latents: where they are active, what goes with them, and words by the direction alone.
fn add_latents(sae: &Sae, layers: &[Codes], files: &mut BTreeMap<String, Vec<u8>>) -> Result<(), PackError> {
    let all: Vec<Vec<Vec<f64>>> = layers.iter().map(columns).collect();
    let (mut latents, mut lens) = (FlowLatents::default(), Vec::new());
    for latent in 0..N_DESCRIBED {
        latents.latents.push(latent as u32);
        let mut words: Vec<(u32, f32)> = (0..VOCABULARY.len() as u32)
            .map(|word| {
                let mut own = Stream::new(1000 + u64::from(word));
                (word, sae.decoder_direction(latent).iter().map(|d| d * own.signed()).sum())
            })
            .collect();
        words.sort_by(|a, b| b.1.total_cmp(&a.1));
        words.truncate(LENS_WORDS);
        for (layer, columns) in all.iter().enumerate() {
            let active = columns[latent].iter().filter(|f| **f > 0.0).count();
            let total: f64 = columns[latent].iter().sum();
            latents.totals.push(total as f32);
            latents.counts.push(active as u32);
            let activation = (total / active.max(1) as f64) as f32;
            let raises = if active > 0 { words.clone() } else { Vec::new() };
            lens.push(LensCell { activation, raises });
            if let Some(next) = all.get(layer + 1) {
                latents.transitions.push(transitions(&columns[latent], next));
            }
        }
    }
    files.insert(flow::FLOW_LATENTS.to_owned(), latents.write(N_LAYERS, N_LATENTS)?);
    for (shard, cells) in lens.chunks(PER_LENS * N_LAYERS).enumerate() {
        let words = VOCABULARY.iter().map(|&w| w.to_owned()).collect();
        let (numbers, words) = LensShard { words, cells: cells.to_vec() }.write(shard, N_LAYERS)?;
        files.insert(flow::lens_numbers(shard), numbers);
        files.insert(flow::lens_words(shard), words);
    }
    Ok(())
}

/// The activations of each latent on all tokens.
fn columns(codes: &Codes) -> Vec<Vec<f64>> {
    let mut columns = vec![vec![0.0; codes.n_rows()]; N_LATENTS];
    for (token, (latents, values)) in codes.iter().enumerate() {
        latents.iter().zip(values).for_each(|(&l, &v)| columns[l as usize][token] = f64::from(v));
    }
    columns
}

fn transitions(f: &[f64], next: &[Vec<f64>]) -> Vec<Transition> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let total: f64 = next.iter().map(|g| dot(f, g)).sum();
    let mut all: Vec<Transition> = (0u32..)
        .zip(next)
        .map(|(to, g)| Transition {
            to,
            count: f.iter().zip(g).filter(|(f, g)| **f > 0.0 && **g > 0.0).count() as u32,
            cosine: (dot(f, g) / (dot(f, f) * dot(g, g)).sqrt()).min(1.0) as f32,
            share: (dot(f, g) / total) as f32,
        })
        .filter(|t| t.count >= 3)
        .collect();
    all.sort_by(|a, b| b.cosine.total_cmp(&a.cosine).then(a.to.cmp(&b.to)));
    all.truncate(TRANSITIONS);
    all
}
