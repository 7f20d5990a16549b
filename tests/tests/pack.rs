//! The pack as a whole: what is written is read back, agrees with itself, and damage is noticed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use conformance::fixture_flow;
use conformance::fixture_pack::{self, D_IN, N_LATENTS};
use shared::layer_thresholds::Thinner;
use shared::pack::flow::{self, FlowEntry, FlowLatents, FlowText, FlowThresholds, FlowVectors, LensShard};
use shared::pack::{self, Decoder, Encoder, FeatureShard, Group, Index, Manifest, Text, TextEntry};
use shared::{Rows, reference};

#[test]
fn the_fixture_is_a_valid_pack_that_agrees_with_itself() {
    let files = fixture_pack::files().unwrap();
    assert_eq!(files, fixture_pack::files().unwrap(), "the fixture is not deterministic");
    let manifest = Manifest::read(&files[pack::MANIFEST]).unwrap();
    for (path, entry) in &manifest.files {
        entry.verify(path, &files[path]).unwrap();
    }
    assert_eq!(manifest.files.len() + 1, files.len(), "a file is not in the manifest");

    let encoder = Encoder::read(&manifest.sae, &files[pack::ENCODER]).unwrap();
    let decoder = Decoder::read(&manifest.sae, &files[pack::DECODER]).unwrap();
    let sae = encoder.join(decoder, &manifest.sae).unwrap();
    assert_eq!(sae, fixture_pack::sae().unwrap());

    let index = Index::read(N_LATENTS, &files[pack::INDEX_NUMBERS], &files[pack::INDEX_WORDS_FILE]).unwrap();
    let mut n_examples = 0;
    for shard in 0..manifest.n_shards {
        let range = manifest.shard_range(shard);
        let (numbers, words) = (&files[&pack::shard_numbers(shard)], &files[&pack::shard_words(shard)]);
        let features = FeatureShard::read(shard, range.len(), N_LATENTS, numbers, words).unwrap().features;
        for (latent, feature) in range.zip(features) {
            let fired: u32 = feature.histogram.iter().sum();
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let density = fired as f32 / manifest.corpus.n_tokens as f32;
            assert!((density - index.density[latent]).abs() < 1e-6, "latent {latent}");
            for example in &feature.examples {
                n_examples += 1;
                let peak = example.values[usize::from(example.peak)];
                assert!(peak > 0.0 && peak <= index.max_activation[latent]);
            }
            let top = feature.examples.iter().find(|e| e.group == Group::Top);
            assert_eq!(top.map_or(0.0, |e| e.values[usize::from(e.peak)]), index.max_activation[latent]);
        }
    }
    assert!(n_examples > 500, "only {n_examples} examples");

    let texts = TextEntry::read_list(&files[pack::TEXTS]).unwrap();
    assert_eq!(texts.len(), 2);
    for entry in &texts {
        let text = Text::read(entry, D_IN, &files[&entry.file]).unwrap();
        let codes = reference::encode(&sae, Rows::new(&text.x, D_IN).unwrap()).unwrap();
        assert!(codes.n_active() > 20 && codes.n_active() < N_LATENTS * codes.n_rows() / 2);
    }
}

/// Every file cut short anywhere is refused, by the reader or by the hash; never a panic.
#[test]
fn truncated_files_are_refused() {
    let files = fixture_pack::files().unwrap();
    let manifest = Manifest::read(&files[pack::MANIFEST]).unwrap();
    let n = manifest.latents_per_shard;
    for part in 0..40 {
        let cut = |path: &str| &files[path][..files[path].len() * part / 40];
        assert!(Manifest::read(cut(pack::MANIFEST)).is_err());
        assert!(Encoder::read(&manifest.sae, cut(pack::ENCODER)).is_err());
        assert!(Decoder::read(&manifest.sae, cut(pack::DECODER)).is_err());
        let (numbers, words) = (pack::shard_numbers(0), pack::shard_words(0));
        assert!(FeatureShard::read(0, n, N_LATENTS, cut(&numbers), &files[&words]).is_err());
        assert!(FeatureShard::read(0, n, N_LATENTS, &files[&numbers], cut(&words)).is_err());
        assert!(TextEntry::read_list(cut(pack::TEXTS)).is_err());
        assert!(manifest.files[pack::ENCODER].verify(pack::ENCODER, cut(pack::ENCODER)).is_err());
    }
}

#[test]
fn the_fixture_of_several_layers_is_a_valid_pack_whose_codes_can_be_computed_again() {
    let files = fixture_flow::files().unwrap();
    let manifest = Manifest::read(&files[pack::MANIFEST]).unwrap();
    for (path, entry) in &manifest.files {
        entry.verify(path, &files[path]).unwrap();
    }
    let info = manifest.flow.as_ref().unwrap();
    let (n_layers, sae) = (info.layers.len(), &manifest.sae);
    let encoder = Encoder::read(sae, &files[pack::ENCODER]).unwrap().without_decoder(sae).unwrap();
    let entries = FlowEntry::read_list(&files[flow::FLOW]).unwrap();
    let thresholds = FlowThresholds::read(info, N_LATENTS, &files[flow::FLOW_THRESHOLDS]).unwrap();
    for entry in &entries {
        let text = FlowText::read(entry, n_layers, N_LATENTS, &files[&entry.file]).unwrap();
        let vectors = FlowVectors::read(entry, n_layers, D_IN, &files[&entry.vectors]).unwrap();
        let t = text.tokens.len();
        for layer in 0..n_layers {
            let x = vectors.layer(layer);
            let x = Rows::new(&x, D_IN).unwrap();
            let codes = reference::encode(&encoder, x).unwrap();
            let codes = Thinner::new(&encoder).above(thresholds.layer(layer), x, &codes).unwrap();
            for token in (0..t).filter(|token| !text.skip[layer * t + token]) {
                assert_eq!(text.codes.row(layer * t + token).0, codes.row(token).0, "{token} at {layer}");
            }
        }
        assert!(text.codes.n_active() > 3 * t && text.errors.iter().any(|e| *e > 0.0));
        assert!(text.effects.iter().any(|effect| effect.changes.iter().any(|c| c.latent != effect.latent)));
    }
    let latents = FlowLatents::read(info, N_LATENTS, &files[flow::FLOW_LATENTS]).unwrap();
    assert!(latents.transitions.iter().flatten().any(|t| t.cosine < 0.9));
    for shard in 0..info.n_lenses() {
        let (numbers, words) = (&files[&flow::lens_numbers(shard)], &files[&flow::lens_words(shard)]);
        LensShard::read(shard, info.lens_range(shard).len(), n_layers, numbers, words).unwrap();
    }
}
