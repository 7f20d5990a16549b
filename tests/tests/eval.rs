//! Evaluation and features on a real (tiny) language model: every figure against plain loops or known answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use native::evaluate::{self, EvalReport, Options};
use native::features::select::Amounts;
use native::features::texts::Passage;
use native::features::{self, Names, Source};
use native::files::sha256;
use native::flow::FlowOptions;
use native::model::{self, LoadedModel};
use native::sae_files::SaeFile;
use native::site;
use native::stop::StopFlag;
use native::store::manifest::{Dropped, FileInfo, ShardInfo, SplitInfo, TextCounts, TokenizerInfo};
use native::store::{Manifest, Split, Store, TapInfo};
use shared::lm::{LmError, NoTap, Tap, TapAction, TokenBatch, Until, nll};
use shared::pack::{self, FeatureShard, Group, Index, Text, TextEntry};
use shared::tap::{Site, TapPoint};
use shared::{Activation, RowScaling, Rows, Sae, SaeParts, reference};

const LENGTH: usize = 20;
const N_TRAIN: usize = 30;
const N_HELD_OUT: usize = 12;
const SPECIAL: u32 = 2;
const POINT: TapPoint = TapPoint { site: Site::Resid, layer: 1 };

/// The golden Llama checkpoint with a tokenizer of one word an id.
fn tiny_model(folder: &Path) -> LoadedModel {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/lm/llama");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), folder.join(file)).unwrap();
    }
    let vocabulary: HashMap<String, u32> = (0..101).map(|i| (format!("w{i}"), i)).collect();
    let added = serde_json::json!([{"id": SPECIAL, "content": "w2", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}]);
    let tokenizer = serde_json::json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    model::load(folder).unwrap()
}

struct Capture(Vec<f32>);

impl Tap for Capture {
    fn wants(&self, point: TapPoint) -> bool {
        point == POINT
    }

    fn visit(&mut self, _point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.0.extend_from_slice(value.data());
        Ok(TapAction::Keep)
    }
}

/// Activations `[n, d_model]` of these sequences at the tap.
fn activations(model: &LoadedModel, ids: &[u32], length: usize) -> Vec<f32> {
    let mut capture = Capture(Vec::new());
    let batch = TokenBatch::new(ids, length).unwrap();
    model.model.forward(batch, &mut capture, Until::Layer(POINT.layer)).unwrap();
    capture.0
}

/// Sequences the model itself finds likely: after four random tokens, its own first choices.
fn greedy(model: &LoadedModel, n: usize) -> Vec<u32> {
    let mut random = conformance::fixture_pack::Stream::new(5);
    let mut ids: Vec<u32> = (0..n * LENGTH).map(|_| 3 + random.below(98) as u32).collect();
    for t in 4..LENGTH {
        let logits = model.model.forward(TokenBatch::new(&ids, LENGTH).unwrap(), &mut NoTap, Until::Logits);
        let logits = logits.unwrap().unwrap();
        for s in 0..n {
            let row = &logits[(s * LENGTH + t - 1) * 101..][..101];
            ids[s * LENGTH + t] = (3..101).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        }
    }
    // A special token in the middle, to see that it is left alone.
    ids[10] = SPECIAL;
    ids
}

fn stored(position: usize, id: u32) -> bool {
    position != 0 && id != SPECIAL
}

/// A safetensors file with its tensors in this order, as stores have them.
fn write(path: &Path, tensors: &[(&str, &str, Vec<usize>, &[u8])]) -> FileInfo {
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header
            .push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#));
        data.extend_from_slice(bytes);
    }
    let mut header = format!("{{{}}}", header.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, &bytes).unwrap();
    FileInfo { bytes: bytes.len() as u64, sha256: sha256(&bytes), crc64: None }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| bytes(v)).collect()
}

/// One split of a store in two shards, vectors in a scrambled order.
fn write_split(folder: &Path, split: Split, model: &LoadedModel, ids: &[u32]) -> SplitInfo {
    let width = model.model.spec().d_model;
    let x = activations(model, ids, LENGTH);
    let mut tokens: Vec<usize> = (0..ids.len()).filter(|&t| stored(t % LENGTH, ids[t])).collect();
    tokens.sort_by_key(|t| (t * 7919) % 10007);
    let shards = tokens.chunks(tokens.len().div_ceil(2)).enumerate().map(|(k, tokens)| {
        let rows: Vec<f32> = tokens.iter().flat_map(|t| &x[t * width..(t + 1) * width]).copied().collect();
        let sequences: Vec<u32> = tokens.iter().map(|t| (t / LENGTH) as u32).collect();
        let positions: Vec<u32> = tokens.iter().map(|t| (t % LENGTH) as u32).collect();
        let n = tokens.len();
        let path =
            folder.join(split.folder()).join(POINT.to_string()).join(format!("shard-{k:05}.safetensors"));
        let (rows, sequences, positions) = (
            bytes_of(&rows, f32::to_le_bytes),
            bytes_of(&sequences, u32::to_le_bytes),
            bytes_of(&positions, u32::to_le_bytes),
        );
        let tensors: [(&str, &str, Vec<usize>, &[u8]); 3] = [
            ("x", "F32", vec![n, width], &rows),
            ("sequence", "U32", vec![n], &sequences),
            ("position", "U32", vec![n], &positions),
        ];
        ShardInfo { n_vectors: n as u64, files: vec![write(&path, &tensors)] }
    });
    let shards = shards.collect();
    let n_sequences = ids.len() / LENGTH;
    let id_bytes = bytes_of(ids, u32::to_le_bytes);
    let path = folder.join(split.folder()).join("tokens.safetensors");
    let tokens_file = write(&path, &[("ids", "U32", vec![n_sequences, LENGTH], &id_bytes)]);
    SplitInfo { n_sequences: n_sequences as u64, n_vectors: tokens.len() as u64, tokens: tokens_file, shards }
}

fn tiny_store(folder: &Path, model: &LoadedModel) -> Store {
    let width = model.model.spec().d_model;
    let mut random = conformance::fixture_pack::Stream::new(6);
    let train: Vec<u32> = (0..N_TRAIN * LENGTH).map(|_| 2 + random.below(20) as u32).collect();
    let mean = write(
        &folder.join("train").join(POINT.to_string()).join("mean.safetensors"),
        &[("mean", "F32", vec![width], &vec![0u8; width * 4])],
    );
    let manifest = Manifest {
        format: native::store::manifest::FORMAT.to_owned(),
        version: native::store::manifest::VERSION,
        writer: "a test".to_owned(),
        model: model.provenance.clone(),
        n_layers: model.model.spec().n_layers,
        d_model: width,
        tokenizer: TokenizerInfo {
            vocab_size: 101,
            bos: None,
            separator: None,
            special_ids: vec![SPECIAL],
            dropped_ids: vec![],
        },
        sequence_length: LENGTH,
        dropped: Dropped { special_tokens: true, positions: vec![0] },
        dtype: shared::config::harvest::StoreDtype::F32,
        bucket_vectors: 1000,
        seed: 0,
        taps: vec![TapInfo { point: POINT, width, scale: 1.0, mean }],
        train: write_split(folder, Split::Train, model, &train),
        held_out: write_split(folder, Split::HeldOut, model, &greedy(model, N_HELD_OUT)),
        text: vec![],
        text_counts: TextCounts::default(),
    };
    fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    Store::open(folder).unwrap()
}

fn file(w_enc: Vec<f32>, w_dec: Vec<f32>, activation: Activation, d: usize) -> SaeFile {
    let n = w_enc.len() / d;
    let parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc,
        b_enc: vec![0.0; n],
        w_dec,
        b_dec: vec![0.0; d],
        activation,
        w_skip: None,
        rows: RowScaling::None,
    };
    SaeFile { sae: Sae::new(parts).unwrap(), metadata: Default::default() }
}

/// `x = relu(x) − relu(−x)`: an autoencoder that loses nothing.
fn perfect(d: usize) -> SaeFile {
    let mut rows = vec![0.0; 2 * d * d];
    for i in 0..d {
        rows[i * d + i] = 1.0;
        rows[(d + i) * d + i] = -1.0;
    }
    file(rows.clone(), rows, Activation::Relu, d)
}

fn random(d: usize, n: usize, threshold: f32) -> SaeFile {
    let mut stream = conformance::fixture_pack::Stream::new(9);
    let mut draw = || (0..n * d).map(|_| stream.signed()).collect::<Vec<f32>>();
    let (w_enc, w_dec) = (draw(), draw());
    file(w_enc, w_dec, Activation::JumpRelu { threshold: vec![threshold; n] }, d)
}

fn measure(file: &SaeFile, store: &Store, model: &LoadedModel) -> EvalReport {
    let options = Options { sequences: N_HELD_OUT, density_tokens: 1_000_000 };
    evaluate::evaluate(file, store, Some(model), &options, &StopFlag::default()).unwrap()
}

#[test]
fn perfect_and_empty_autoencoders_give_the_known_ends() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let store = tiny_store(&folder.path().join("store"), &model);
    let d = model.model.spec().d_model;

    let best = measure(&perfect(d), &store, &model);
    assert!(best.reconstruction.fvu.unwrap() < 1e-10, "{best:?}");
    assert!((best.reconstruction.l0 - d as f64).abs() < 1e-9 && best.reconstruction.dead_share == 0.0);
    assert_eq!(best.reconstruction.n_held_out, store.n_vectors(Split::HeldOut));
    assert_eq!(
        best.reconstruction.n_density,
        store.n_vectors(Split::HeldOut) + store.n_vectors(Split::Train)
    );
    let splice = best.splice.clone().unwrap();
    assert!(splice.delta_loss.abs() < 1e-5, "{splice:?}");
    assert!((splice.loss_recovered.unwrap() - 1.0).abs() < 1e-4, "{splice:?}");

    // The clean loss by hand: predictions from a stored position to a stored position.
    let tokens = store.tokens(Split::HeldOut).unwrap();
    let batch = TokenBatch::new(&tokens.ids, LENGTH).unwrap();
    let logits = model.model.forward(batch, &mut NoTap, Until::Logits).unwrap().unwrap();
    let losses = nll(&logits, 101, batch);
    let counts =
        |s: usize, t: usize| stored(t, tokens.sequence(s)[t]) && stored(t + 1, tokens.sequence(s)[t + 1]);
    let (mut sum, mut n) = (0.0, 0u64);
    for s in 0..N_HELD_OUT {
        for t in (0..LENGTH - 1).filter(|&t| counts(s, t)) {
            (sum, n) = (sum + f64::from(losses[s * (LENGTH - 1) + t]), n + 1);
        }
    }
    assert_eq!((splice.n_predictions, splice.n_kept), (n, N_HELD_OUT as u64 + 1));
    assert!((splice.ce_clean - sum / n as f64).abs() < 1e-6);

    // Nothing ever fires and the bias is zero: spliced is the zero-ablation.
    let empty = measure(&random(d, 7, 1e9), &store, &model);
    let ends = empty.splice.clone().unwrap();
    assert_eq!((empty.reconstruction.l0, empty.reconstruction.dead_share), (0.0, 1.0));
    assert!(empty.reconstruction.fvu.unwrap() >= 1.0);
    assert_eq!((ends.ce_spliced, ends.loss_recovered), (ends.ce_zero, Some(0.0)));
    assert!((ends.ce_clean - splice.ce_clean).abs() < 1e-9 && ends.ce_zero > ends.ce_clean, "{ends:?}");

    let text = evaluate::report::markdown(&best);
    assert!(text.contains("| delta loss |") && text.contains("resid.1"));
    let json = serde_json::to_vec(&best).unwrap();
    assert_eq!(serde_json::from_slice::<EvalReport>(&json).unwrap(), best);
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let store = tiny_store(&folder.path().join("store"), &model);
    let options = Options { sequences: 2, density_tokens: 0 };
    let evaluate = |file: &SaeFile| evaluate::evaluate(file, &store, None, &options, &StopFlag::default());
    assert!(evaluate(&random(5, 4, 0.5)).unwrap_err().to_string().contains("width"), "another width");
    let mut elsewhere = random(model.model.spec().d_model, 4, 0.5);
    elsewhere.metadata.tap = Some(TapPoint::new(Site::Mlp, 0));
    assert!(format!("{:#}", evaluate(&elsewhere).unwrap_err()).contains("resid.1"), "another tap");
}

#[test]
fn a_pack_says_what_plain_loops_say() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let store = tiny_store(&folder.path().join("store"), &model);
    let d = model.model.spec().d_model;
    let (n, n_sequences) = (21, 25);
    let file = random(d, n, 1.5);
    let eval = measure(&file, &store, &model);
    let text = |id: &str| Passage {
        id: id.to_owned(),
        title: "T".to_owned(),
        source: "S".to_owned(),
        text: "w5 w2 w9 w77 w4".to_owned(),
    };
    let passages = [text("a"), text("b")];
    let source = Source {
        file: &file,
        store: &store,
        model: &model,
        passages: &passages,
        eval: Some(&eval),
        layers_eval: None,
    };
    let options = features::Options {
        tokens: (n_sequences * LENGTH) as u64 + 3,
        amounts: Amounts { top: 4, per_quarter: 2, random: 3, before: 4, after: 2 },
        latents_per_shard: 8,
        text_tokens: 4,
        seed: 1,
        flow: FlowOptions { texts: 0, latents: 0, effects: 0 },
    };
    let out = folder.path().join("pack");
    features::collect(&source, &options, &Names::default(), &out, &StopFlag::default()).unwrap();
    let manifest = site::verify_pack(&out).unwrap();
    assert_eq!(manifest.metrics, Some(eval.metrics()));
    let read = |path: &str| fs::read(out.join(path)).unwrap();

    // All codes of the chosen sequences, by the reference.
    let tokens = store.tokens(Split::Train).unwrap();
    let x = activations(&model, &tokens.ids[..n_sequences * LENGTH], LENGTH);
    let mut dense = reference::encode(&file.sae, Rows::new(&x, d).unwrap()).unwrap().to_dense();
    let kept: Vec<bool> = (0..n_sequences * LENGTH).map(|t| stored(t % LENGTH, tokens.ids[t])).collect();
    for (t, row) in dense.chunks_exact_mut(n).enumerate() {
        if !kept[t] {
            row.fill(0.0);
        }
    }
    let encoded = kept.iter().filter(|&&k| k).count();
    assert_eq!(manifest.corpus.n_tokens, encoded as u64);
    let logits = model.model.direct_logits(Rows::new(file.sae.w_dec(), d).unwrap()).unwrap();
    let index = Index::read(n, &read(pack::INDEX_NUMBERS), &read(pack::INDEX_WORDS_FILE)).unwrap();
    let mut groups = HashMap::new();
    for shard in 0..manifest.n_shards {
        let range = manifest.shard_range(shard);
        let (numbers, words) = (read(&pack::shard_numbers(shard)), read(&pack::shard_words(shard)));
        let features = FeatureShard::read(shard, range.len(), n, &numbers, &words).unwrap();
        for (latent, feature) in range.zip(&features.features) {
            let values: Vec<f32> =
                dense.iter().skip(latent).step_by(n).copied().filter(|&v| v > 0.0).collect();
            let max = values.iter().copied().fold(0.0, f32::max);
            assert_eq!(feature.histogram.iter().sum::<u32>() as usize, values.len(), "latent {latent}");
            assert!((index.density[latent] - values.len() as f32 / encoded as f32).abs() < 1e-6);
            assert!((index.max_activation[latent] - max).abs() <= 1e-5 * max);
            let mean = values.iter().sum::<f32>() / values.len().max(1) as f32;
            assert!((index.mean_activation[latent] - mean).abs() <= 1e-4 * mean);
            for example in &feature.examples {
                *groups.entry(example.group).or_insert(0) += 1;
                for (k, (&word, &value)) in example.words.iter().zip(&example.values).enumerate() {
                    let token = example.sequence as usize * LENGTH + example.start as usize + k;
                    assert!(
                        (value - dense[token * n + latent]).abs() <= 1e-5 * max,
                        "latent {latent} token {token}"
                    );
                    assert_eq!(features.words[word as usize], format!("w{}", tokens.ids[token]));
                }
                let peak = example.values[usize::from(example.peak)];
                if let Group::Quantile(quarter) = example.group {
                    let low = max * f32::from(quarter - 1) / 4.0;
                    assert!(peak > low * 0.9999 && peak <= low + max / 4.0 * 1.0001);
                }
            }
            let row = &logits[latent * 101..(latent + 1) * 101];
            let mut order: Vec<usize> = (0..101).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            for (k, &(word, value)) in feature.top_logits.iter().enumerate() {
                assert_eq!(
                    (&features.words[word as usize], value),
                    (&format!("w{}", order[k]), row[order[k]])
                );
            }
            assert_eq!(feature.bottom_logits[0].1, row[order[100]]);
            assert_eq!((feature.top_logits.len(), feature.neighbours.len()), (10, 10));
        }
    }
    assert!(
        groups[&Group::Top] >= 40 && groups[&Group::Random] >= 40 && groups[&Group::Quantile(2)] >= 10,
        "{groups:?}"
    );

    let entries = TextEntry::read_list(&read(pack::TEXTS)).unwrap();
    assert_eq!(entries[1].words, ["w5", "w2", "w9", "w77"]);
    let text = Text::read(&entries[1], d, &read(&entries[1].file)).unwrap();
    assert_eq!((&text.tokens[..], &text.skip[..]), (&[5u32, 2, 9, 77][..], &[true, true, false, false][..]));
    let wanted = activations(&model, &[5, 2, 9, 77], 4);
    assert!(text.x.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs())));
}
