//! The pack of a multi-layer autoencoder on a real (tiny) language model: every number against plain loops in double
//! precision, and against the whole model run again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

#[path = "../support/mod.rs"]
mod support;
mod world;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use native::features::{self, Names, Source};
use native::stop::StopFlag;
use shared::layer_thresholds::Thinner;
use shared::lm::{TokenBatch, Until};
use shared::pack::flow::{CHANGES, FlowText, FlowVectors, LENS_WORDS, TRANSITIONS, Transition};
use shared::pack::{Encoder, Index};
use shared::tap::TapPoint;
use shared::{Codes, RowScaling, Rows, reference};
use world::{DESCRIBED, EFFECTS, Flow, N, Probe, TAPS, World, flow, read, world};

fn close(found: f32, wanted: f64, what: &str) {
    assert!(
        (f64::from(found) - wanted).abs() <= 1e-4 * wanted.abs().max(1e-3),
        "{what}: {found}, not {wanted}"
    );
}

#[test]
fn every_number_is_that_of_plain_loops() {
    let kinds = [(RowScaling::None, false), (RowScaling::LAYER_NORM, false), (RowScaling::None, true)];
    for (rows, own_thresholds) in kinds {
        let world = world(rows, own_thresholds);
        let out = world.collect();
        let flow = flow(&out);
        let info = flow.manifest.flow.as_ref().unwrap();
        assert_eq!(info.n_described, DESCRIBED);
        let (metrics, report) = (flow.manifest.metrics.as_ref().unwrap(), &world.report);
        let mean = report.layers.iter().map(|layer| layer.l0).sum::<f64>() / TAPS.len() as f64;
        close(metrics.l0.unwrap() as f32, mean, "L0 of the evaluation");
        assert!(metrics.fvu.is_some() && metrics.delta_loss.is_none());
        assert_eq!(flow.manifest.provenance["evaluation"]["layers"].as_array().unwrap().len(), TAPS.len());
        for (found, wanted) in info.layers.iter().zip(world.layers()) {
            // JSON may lose the last bit.
            assert!(found.tap == wanted.tap && (found.scale / wanted.scale - 1.0).abs() < 1e-14);
        }
        assert_eq!(flow.entries.iter().map(|e| &e.id[..]).collect::<Vec<_>>(), ["one", "two"]);
        assert!(flow.manifest.title.contains("3 layers"), "{}", flow.manifest.title);
        let corpus = corpus(&world);
        texts(&world, &flow, &corpus);
        latents(&world, &flow, &corpus);
        lens(&world, &flow, &corpus);
        index(&out, &flow, &corpus);
        same_again(&out, &flow);
    }
}

/// Of each layer the latents of every stored token, and the vectors that were encoded, in the dictionary's units.
struct Corpus {
    codes: Vec<BTreeMap<(u32, u32), BTreeMap<u32, f32>>>,
    vectors: Vec<Vec<Vec<f32>>>,
}

fn corpus(world: &World) -> Corpus {
    let (mut codes, mut vectors) = (Vec::new(), Vec::new());
    for (number, layer) in world.layers().iter().enumerate() {
        let all = read(&world.store, layer.tap);
        codes.push(all.iter().map(|(place, raw)| (*place, world.codes(number, raw))).collect());
        let kept = all.values().filter(|raw| world.kept(number, raw));
        vectors.push(
            kept.map(|raw| raw.iter().map(|&x| (f64::from(x) / layer.scale) as f32).collect()).collect(),
        );
    }
    Corpus { codes, vectors }
}

impl Corpus {
    fn mean(&self, layer: usize) -> Vec<f64> {
        let all = &self.vectors[layer];
        let column = |i: usize| all.iter().map(|x| f64::from(x[i])).sum::<f64>() / all.len() as f64;
        (0..all[0].len()).map(column).collect()
    }

    /// A latent's activation at a layer on every token, in order.
    fn column(&self, layer: usize, latent: u32) -> Vec<f64> {
        self.codes[layer].values().map(|row| f64::from(row.get(&latent).copied().unwrap_or(0.0))).collect()
    }
}

fn texts(world: &World, flow: &Flow, corpus: &Corpus) {
    let (sae, d) = (&world.file.sae, world.file.sae.dims().d_in);
    let (mut active, mut beyond, mut changed) = (0, 0, 0);
    for ((text, vectors), passage) in flow.texts.iter().zip(&world.passages) {
        let t = text.tokens.len();
        assert_eq!((t, text.tokens[0]), (24, 1), "BOS comes first");
        let ids = world.model.tokenizer.encode(&passage.text).unwrap();
        assert_eq!(text.tokens[1..], ids[..23]);
        let batch = TokenBatch::new(&text.tokens, t).unwrap();
        let mut probe = Probe::default();
        world.model.model.forward(batch, &mut probe, Until::Logits).unwrap();
        for (number, layer) in world.layers().iter().enumerate() {
            let (mean, stored) = (corpus.mean(number), vectors.layer(number));
            for (token, raw) in probe.seen[&layer.tap].chunks_exact(d).enumerate() {
                let cell = number * t + token;
                let skip = token == 0 || !world.kept(number, raw);
                assert_eq!(text.skip[cell], skip, "token {token} of layer {number}");
                beyond += usize::from(skip && token > 0);
                if skip {
                    continue;
                }
                let x = &stored[token * d..(token + 1) * d];
                for (x, raw) in x.iter().zip(raw) {
                    let wanted = f64::from(*raw) / layer.scale;
                    assert!((f64::from(*x) - wanted).abs() <= wanted.abs() * 5e-4 + 1e-7, "{x} for {wanted}");
                }
                let codes = world.encode(number, x);
                let (latents, values) = text.codes.row(cell);
                assert_eq!(latents, codes.keys().copied().collect::<Vec<_>>(), "the same active latents");
                for (value, wanted) in values.iter().zip(codes.values()) {
                    assert!((value - wanted).abs() <= wanted * 2f32.powi(-11), "{value} for {wanted}");
                }
                active += latents.len();
                let one = Rows::new(x, d).unwrap();
                let rebuilt =
                    reference::decode(sae, one, &reference::encode(&world.sae(number), one).unwrap())
                        .unwrap();
                let off =
                    |y: &dyn Fn(usize) -> f64| (0..d).map(|i| (f64::from(x[i]) - y(i)).powi(2)).sum::<f64>();
                close(text.errors[cell], off(&|i| f64::from(rebuilt[i])) / off(&|i| mean[i]), "an error");
            }
        }
        changed += effects(world, text, vectors);
    }
    assert!(
        active > 300 && beyond > 3 && changed > 20,
        "{active} active, {beyond} beyond, {changed} changed"
    );
}

/// Runs the whole model again without each removed latent; returns how many changes there were.
fn effects(world: &World, text: &FlowText, vectors: &FlowVectors) -> usize {
    let (sae, d, t) = (&world.file.sae, world.file.sae.dims().d_in, text.tokens.len());
    let values =
        |codes: &BTreeMap<u32, f32>, latent: u32| f64::from(codes.get(&latent).copied().unwrap_or(0.0));
    let codes: Vec<Vec<BTreeMap<u32, f32>>> = (0..TAPS.len())
        .map(|layer| {
            let x = vectors.layer(layer);
            let rows = x.chunks_exact(d).enumerate();
            rows.map(|(i, x)| if text.skip[layer * t + i] { BTreeMap::new() } else { world.encode(layer, x) })
                .collect()
        })
        .collect();
    let sum = |layer: usize, latent: u32| codes[layer].iter().map(|row| values(row, latent)).sum::<f64>();
    assert_eq!(text.effects.len(), EFFECTS);
    assert!(text.effects.is_sorted_by(|a, b| a.removed >= b.removed), "strongest first");
    let mut n_changes = 0;
    for effect in &text.effects {
        let (layer, latent) = (usize::from(effect.layer), effect.latent);
        assert!(layer < 2, "nothing lies behind the last layer");
        close(effect.removed, sum(layer, latent), "what was removed");
        assert!(sum(1 - layer, latent) <= sum(layer, latent), "removed where it is strongest");
        let (info, x) = (&world.layers()[layer], vectors.layer(layer));
        let taken = x.chunks_exact(d).zip(&codes[layer]).flat_map(|(x, row)| {
            let by = values(row, latent) * info.scale * sae.rows().undo(x).scale;
            sae.decoder_direction(latent as usize).iter().map(move |d| (by * f64::from(*d)) as f32)
        });
        let mut probe = Probe { remove: Some((info.tap, taken.collect())), ..Probe::default() };
        let batch = TokenBatch::new(&text.tokens, t).unwrap();
        world.model.model.forward(batch, &mut probe, Until::Logits).unwrap();
        for later in layer + 1..TAPS.len() {
            let raw = &probe.seen[&world.layers()[later].tap];
            let rows = raw.chunks_exact(d).enumerate().map(|(i, raw)| {
                let scale = world.layers()[later].scale;
                let x: Vec<f32> = raw.iter().map(|&x| (f64::from(x) / scale) as f32).collect();
                // One at a time, a vector is rounded at least as finely as together with others.
                let x = FlowVectors::round(&x, 1).layer(0);
                if text.skip[later * t + i] { BTreeMap::new() } else { world.encode(later, &x) }
            });
            let after: Vec<BTreeMap<u32, f32>> = rows.collect();
            let after = |latent: u32| after.iter().map(|row| values(row, latent)).sum::<f64>();
            let mut wanted: Vec<(u32, f64)> =
                (0..N as u32).map(|k| (k, (after(k) - sum(later, k)).abs())).filter(|c| c.1 > 1e-6).collect();
            wanted.sort_by(|a, b| b.1.total_cmp(&a.1));
            let found: Vec<_> = effect.changes.iter().filter(|c| usize::from(c.layer) == later).collect();
            assert_eq!(found.len(), wanted.len().min(CHANGES), "layer {later} without {latent} at {layer}");
            for (change, (_, size)) in found.into_iter().zip(wanted) {
                close(change.before, sum(later, change.latent), "before");
                close(change.after, after(change.latent), "after");
                close((change.after - change.before).abs(), size, "the size of a change");
                n_changes += 1;
            }
        }
    }
    n_changes
}

fn latents(world: &World, flow: &Flow, corpus: &Corpus) {
    let mut sums = [0.0f64; N];
    for (text, _) in &flow.texts {
        for (latents, values) in text.codes.iter() {
            latents.iter().zip(values).for_each(|(&l, &v)| sums[l as usize] += f64::from(v));
        }
    }
    let mut order: Vec<u32> = (0..N as u32).collect();
    order.sort_by(|&a, &b| sums[b as usize].total_cmp(&sums[a as usize]));
    let strongest: HashSet<u32> = order[..DESCRIBED].iter().copied().collect();
    assert_eq!(flow.latents.latents.iter().copied().collect::<HashSet<_>>(), strongest);
    let mut n_transitions = 0;
    for (place, &latent) in flow.latents.latents.iter().enumerate() {
        for layer in 0..world.layers().len() {
            let f = corpus.column(layer, latent);
            let at = place * TAPS.len() + layer;
            close(flow.latents.totals[at], f.iter().sum(), "summed activation");
            assert_eq!(flow.latents.counts[at] as usize, f.iter().filter(|f| **f > 0.0).count());
            if layer + 1 == TAPS.len() {
                continue;
            }
            let found = flow.latents.transitions(place, layer, TAPS.len());
            n_transitions += found.len();
            transitions(found, &f, corpus, layer + 1);
        }
    }
    assert!(n_transitions > 50, "{n_transitions} transitions");
}

fn transitions(found: &[Transition], f: &[f64], corpus: &Corpus, next: usize) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let all: Vec<Vec<f64>> = (0..N as u32).map(|k| corpus.column(next, k)).collect();
    let together = |g: &[f64]| f.iter().zip(g).filter(|(f, g)| **f > 0.0 && **g > 0.0).count();
    let cosine = |g: &[f64]| dot(f, g) / (dot(f, f) * dot(g, g)).sqrt();
    let mut wanted: Vec<f64> = all.iter().filter(|g| together(g) >= 3).map(|g| cosine(g)).collect();
    wanted.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(found.len(), wanted.len().min(TRANSITIONS));
    let total: f64 = all.iter().map(|g| dot(f, g)).sum();
    for (found, wanted) in found.iter().zip(wanted) {
        let g = &all[found.to as usize];
        // Half precision.
        let near = |found: f32, wanted: f64| (f64::from(found) - wanted).abs() < 5e-4;
        assert!(near(found.cosine, wanted) && near(found.cosine, cosine(g)), "{found:?}, {wanted}");
        assert!(near(found.share, dot(f, g) / total), "{found:?}");
        assert_eq!(found.count as usize, together(g));
    }
}

/// Logits of the whole model with `residual` in the place of what its last block leaves.
fn logits(world: &World, residual: &[f64]) -> Vec<f32> {
    let last = TapPoint::new(shared::Site::Resid, world.model.model.spec().n_layers - 1);
    let row = residual.iter().map(|&x| x as f32).collect();
    let mut probe = Probe { put: Some((last, row)), ..Probe::default() };
    let batch = TokenBatch::new(&[5], 1).unwrap();
    world.model.model.forward(batch, &mut probe, Until::Logits).unwrap().unwrap()
}

fn lens(world: &World, flow: &Flow, corpus: &Corpus) {
    let (sae, info) = (&world.file.sae, flow.manifest.flow.as_ref().unwrap());
    let mut n_cells = 0;
    for (layer, of) in world.layers().iter().enumerate() {
        let mean: Vec<f64> = corpus.mean(layer).iter().map(|x| x * of.scale).collect();
        let without = logits(world, &mean);
        let vectors = &corpus.vectors[layer];
        let scale = vectors.iter().map(|x| sae.rows().undo(x).scale).sum::<f64>() / vectors.len() as f64;
        for (place, &latent) in flow.latents.latents.iter().enumerate() {
            let shard = &flow.lens[place / info.latents_per_lens];
            let cell = shard.cell(place % info.latents_per_lens, layer, TAPS.len()).unwrap();
            let f: Vec<f64> = corpus.column(layer, latent).into_iter().filter(|f| *f > 0.0).collect();
            if f.is_empty() {
                assert!(cell.raises.is_empty());
                continue;
            }
            n_cells += 1;
            let activation = f.iter().sum::<f64>() / f.len() as f64;
            close(cell.activation, activation, "mean activation");
            let direction = sae.decoder_direction(latent as usize);
            let added =
                mean.iter().zip(direction).map(|(m, d)| m + activation * scale * of.scale * f64::from(*d));
            let with = logits(world, &added.collect::<Vec<_>>());
            let mut rises: Vec<f32> = with.iter().zip(&without).map(|(a, b)| a - b).collect();
            for (word, rise) in &cell.raises {
                let id = world.model.tokenizer.encode(&shard.words[*word as usize]).unwrap()[0];
                assert!((rises[id as usize] - rise).abs() < 1e-4, "{rise} for {}", rises[id as usize]);
            }
            rises.sort_by(|a, b| b.total_cmp(a));
            assert_eq!(cell.raises.len(), LENS_WORDS);
            assert!(cell.raises.iter().zip(rises).all(|((_, found), wanted)| (found - wanted).abs() < 1e-4));
        }
    }
    assert!(n_cells > DESCRIBED, "{n_cells} cells");
}

/// A latent is active on a token where it is at any layer, with its largest activation.
fn index(out: &Path, flow: &Flow, corpus: &Corpus) {
    let read = |path: &str| fs::read(out.join(path)).unwrap();
    let index =
        Index::read(N, &read(shared::pack::INDEX_NUMBERS), &read(shared::pack::INDEX_WORDS_FILE)).unwrap();
    assert_eq!(flow.manifest.corpus.n_tokens as usize, corpus.codes[0].len());
    for latent in 0..N as u32 {
        let columns: Vec<Vec<f64>> = (0..TAPS.len()).map(|layer| corpus.column(layer, latent)).collect();
        let best = (0..columns[0].len()).map(|t| columns.iter().map(|c| c[t]).fold(0.0, f64::max));
        let active: Vec<f64> = best.filter(|f| *f > 0.0).collect();
        let l = latent as usize;
        close(index.density[l], active.len() as f64 / columns[0].len() as f64, "density");
        close(index.max_activation[l], active.iter().copied().fold(0.0, f64::max), "largest");
        close(index.mean_activation[l], active.iter().sum::<f64>() / active.len().max(1) as f64, "mean");
    }
}

/// What a page does: the encoder and the vectors of the pack alone give the codes of the pack.
fn same_again(out: &Path, flow: &Flow) {
    let info = &flow.manifest.sae;
    let encoder = fs::read(out.join(shared::pack::ENCODER)).unwrap();
    let sae = Encoder::read(info, &encoder).unwrap().without_decoder(info).unwrap();
    for (text, vectors) in &flow.texts {
        for layer in 0..TAPS.len() {
            let x = vectors.layer(layer);
            let x = Rows::new(&x, info.d_in).unwrap();
            let mut codes: Codes = reference::encode(&sae, x).unwrap();
            if let Some(thresholds) = &flow.thresholds {
                codes = Thinner::new(&sae).above(thresholds.layer(layer), x, &codes).unwrap();
            }
            for token in (0..text.tokens.len()).filter(|t| !text.skip[layer * text.tokens.len() + t]) {
                assert_eq!(text.codes.row(layer * text.tokens.len() + token).0, codes.row(token).0);
            }
        }
    }
}

#[test]
fn a_stopped_or_misfit_flow_leaves_nothing() {
    let mut world = world(RowScaling::None, false);
    let out = world.folder.path().join("pack");
    let stop = StopFlag::default();
    stop.raise();
    assert!(features::collect(&world.source(), &world.options, &Names::default(), &out, &stop).is_err());
    let go = StopFlag::default();
    world.report.layers.swap(0, 1);
    let error = features::collect(&world.source(), &world.options, &Names::default(), &out, &go)
        .unwrap_err()
        .to_string();
    assert!(error.contains("other layers"), "{error}");
    world.file.metadata.layers.as_mut().unwrap().layers[1].tap = "mlp.0".parse().unwrap();
    let error = features::collect(&unmeasured(&world), &world.options, &Names::default(), &out, &go)
        .unwrap_err()
        .to_string();
    assert!(error.contains("mlp.0"), "{error}");
    world.file.metadata.layers.as_mut().unwrap().layers.clear();
    assert!(features::collect(&unmeasured(&world), &world.options, &Names::default(), &out, &go).is_err());
    assert!(!out.exists());
}

fn unmeasured(world: &World) -> Source<'_> {
    Source { layers_eval: None, ..world.source() }
}
