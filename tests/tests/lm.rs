//! The transformer against goldens from transformers (`golden/lm/make_lm_golden.py`), against impostors that must
//! be told apart from it, and against broken files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use native::model::{self, Rayon};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use shared::lm::{
    Blueprint, BosHints, CandleOps, FloatFormat, Gguf, GgufTensor, LanguageModel, LmError, NoTap,
    SafetensorsHeader, Serial, Splicer, Tap, TapAction, TensorSource, TokenBatch, Tokenizer, Until,
    dequantise, nll,
};
use shared::{Rows, Site, TapPoint};

/// ‖Δ‖/‖reference‖ allowed at every tap, on logits and losses.
const TOLERANCE: f64 = 1e-5;
const CASES: [&str; 3] = ["gemma2", "llama", "llama-classic"];

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/lm").join(case)
}

/// The expected values of a golden, and its tokens.
struct Expected {
    values: BTreeMap<String, Vec<f32>>,
    ids: Vec<u32>,
    seq: usize,
}

impl Expected {
    fn read(case: &str) -> Self {
        let bytes = std::fs::read(golden(case).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("input_ids").unwrap();
        let seq = ids.shape()[1];
        let ids =
            ids.data().as_chunks().0.iter().map(|b| u32::try_from(i64::from_le_bytes(*b)).unwrap()).collect();
        let floats = file.iter().filter(|(name, _)| *name != "input_ids");
        let values = floats.map(|(name, t)| (name.to_owned(), FloatFormat::F32.decode(t.data()))).collect();
        Self { values, ids, seq }
    }

    fn tokens(&self) -> TokenBatch<'_> {
        TokenBatch::new(&self.ids, self.seq).unwrap()
    }
}

/// ‖found − wanted‖ / ‖wanted‖; refuses empty, unequal and non-finite input.
fn distance(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    assert!(!wanted.is_empty() && found.iter().chain(wanted).all(|x| x.is_finite()));
    let square = |x: f64| x * x;
    let norm: f64 = wanted.iter().map(|&w| square(f64::from(w))).sum();
    assert!(norm > 0.0);
    let delta: f64 = found.iter().zip(wanted).map(|(&f, &w)| square(f64::from(f) - f64::from(w))).sum();
    (delta / norm).sqrt()
}

#[derive(Default)]
struct Keep(BTreeMap<String, Vec<f32>>);

impl Tap for Keep {
    fn wants(&self, _point: TapPoint) -> bool {
        true
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        assert!(self.0.insert(point.to_string(), value.data().to_vec()).is_none(), "{point} visited twice");
        Ok(TapAction::Keep)
    }
}

/// Everything the model computes, under the names of the goldens.
fn run(model: &LanguageModel, tokens: TokenBatch<'_>) -> BTreeMap<String, Vec<f32>> {
    let mut keep = Keep::default();
    let logits = model.forward(tokens, &mut keep, Until::Logits).unwrap().unwrap();
    keep.0.insert("nll".to_owned(), nll(&logits, model.spec().vocab_size, tokens));
    keep.0.insert("logits".to_owned(), logits);
    keep.0
}

/// The largest distance over all values, and where.
fn worst(found: &BTreeMap<String, Vec<f32>>, expected: &Expected) -> (f64, String) {
    assert!(found.keys().eq(expected.values.keys()), "{:?}", found.keys());
    let distances =
        expected.values.iter().map(|(name, wanted)| (distance(&found[name], wanted), name.clone()));
    distances.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

/// Tensors in memory, so that tests can break them.
#[derive(Clone, Default)]
struct Memory(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Memory {
    fn read(case: &str) -> Self {
        let mut memory = Self::default();
        let mut files: Vec<_> = golden(case).read_dir().unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|f| {
            f.file_name().unwrap().to_string_lossy().starts_with("model") && f.extension().unwrap() != "json"
        });
        for file in files {
            let bytes = std::fs::read(file).unwrap();
            for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let format = match tensor.dtype() {
                    Dtype::F32 => FloatFormat::F32,
                    Dtype::F16 => FloatFormat::F16,
                    Dtype::BF16 => FloatFormat::Bf16,
                    other => panic!("{other:?}"),
                };
                memory.0.insert(name.to_owned(), (tensor.shape().to_vec(), format.decode(tensor.data())));
            }
        }
        memory
    }
}

impl TensorSource for Memory {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn read(&mut self, name: &str) -> Result<Vec<f32>, LmError> {
        Ok(self.0[name].1.clone())
    }
}

fn blueprint(case: &str) -> Blueprint {
    Blueprint::from_config(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap()
}

fn build(blueprint: &Blueprint, memory: &mut Memory) -> Result<LanguageModel, LmError> {
    LanguageModel::build(CandleOps::new(Arc::new(Serial)), blueprint, memory)
}

#[test]
fn every_tap_logit_and_loss_agrees_with_transformers() {
    for case in CASES {
        let expected = Expected::read(case);
        let (model, provenance) = model::load_weights(&golden(case)).unwrap();
        assert_eq!(provenance.source, case);
        assert_eq!(provenance.sha256.len(), 64);
        let found = run(&model, expected.tokens());
        assert_eq!(found.len(), 3 * model.spec().n_layers + 3);
        let (error, name) = worst(&found, &expected);
        assert!(error <= TOLERANCE, "{case}: {name} is off by {error:e}");
        let direct = model.forward_nll(expected.tokens(), &mut NoTap).unwrap();
        assert!(distance(&direct, &expected.values["nll"]) <= TOLERANCE);
    }
}

#[test]
fn impostors_are_told_apart() {
    let gemma: [(&str, fn(&mut Blueprint)); 9] = [
        ("window ignored", |b| b.spec.attention.windows.fill(None)),
        ("window one too long", |b| b.spec.attention.windows.iter_mut().flatten().for_each(|w| *w += 1)),
        ("window on odd layers", |b| b.spec.attention.windows.rotate_left(1)),
        ("query scale from head width", |b| b.spec.attention.query_scale = 1.0 / 10f32.sqrt()),
        ("no attention soft-cap", |b| b.spec.attention.softcap = None),
        ("no final soft-cap", |b| b.spec.final_softcap = None),
        ("embedding not scaled", |b| b.spec.embed_scale = 1.0),
        ("gain without its one", |b| b.spec.norm.unit_offset = false),
        ("SiLU for GELU", |b| b.spec.mlp.activation = shared::lm::GateActivation::Silu),
    ];
    let llama: [(&str, fn(&mut Blueprint)); 4] = [
        ("rotary scaling ignored", |b| b.spec.attention.rope.scaling = shared::lm::RopeScaling::None),
        ("interleaved rotary pairs", |b| b.interleaved_rope = true),
        ("eps of another family", |b| b.spec.norm.eps = 1e-3),
        ("exact GELU for SiLU", |b| b.spec.mlp.activation = shared::lm::GateActivation::Gelu),
    ];
    let all = gemma.iter().map(|i| ("gemma2", i)).chain(llama.iter().map(|i| ("llama", i)));
    for (case, (name, change)) in all {
        let expected = Expected::read(case);
        let mut impostor = blueprint(case);
        change(&mut impostor);
        let model = build(&impostor, &mut Memory::read(case)).unwrap();
        let (error, _) = worst(&run(&model, expected.tokens()), &expected);
        assert!(error > 10.0 * TOLERANCE, "{case}: {name} passes with {error:e}");
    }
    // Right values under the wrong layer.
    let expected = Expected::read("llama");
    for site in [Site::Resid, Site::Mlp, Site::Attn] {
        let (a, b) = (TapPoint::new(site, 0).to_string(), TapPoint::new(site, 1).to_string());
        assert!(distance(&expected.values[&a], &expected.values[&b]) > 10.0 * TOLERANCE);
    }
}

#[test]
fn stopping_early_changes_nothing_and_does_less() {
    for case in CASES {
        let expected = Expected::read(case);
        let (model, _) = model::load_weights(&golden(case)).unwrap();
        let full = run(&model, expected.tokens());
        let mut keep = Keep::default();
        assert_eq!(model.forward(expected.tokens(), &mut keep, Until::Layer(0)).unwrap(), None);
        assert_eq!(keep.0.len(), 4, "{:?}", keep.0.keys());
        assert!(keep.0.iter().all(|(name, values)| *values == full[name]));
        let n_layers = model.spec().n_layers;
        let beyond = model.forward(expected.tokens(), &mut NoTap, Until::Layer(n_layers));
        assert!(matches!(beyond, Err(LmError::Layer { .. })));
    }
}

#[test]
fn sequences_do_not_see_each_other_nor_the_future() {
    let expected = Expected::read("gemma2");
    let (model, _) = model::load_weights(&golden("gemma2")).unwrap();
    let full = run(&model, expected.tokens());
    let vocab = model.spec().vocab_size;
    let alone = TokenBatch::new(expected.tokens().sequence(1), expected.seq).unwrap();
    let alone = model.forward(alone, &mut NoTap, Until::Logits).unwrap().unwrap();
    assert!(distance(&alone, &full["logits"][expected.seq * vocab..]) < 1e-6);
    let prefix = TokenBatch::new(&expected.ids[..11], 11).unwrap();
    let prefix = model.forward(prefix, &mut NoTap, Until::Logits).unwrap().unwrap();
    assert!(distance(&prefix, &full["logits"][..11 * vocab]) < 1e-6);
}

#[test]
fn splicing_the_identity_changes_nothing_and_kept_positions_stay() {
    let expected = Expected::read("gemma2");
    let (model, _) = model::load_weights(&golden("gemma2")).unwrap();
    let tokens = expected.tokens();
    let clean = model.forward(tokens, &mut NoTap, Until::Logits).unwrap().unwrap();
    let keep: Vec<bool> = (0..tokens.n_tokens()).map(|i| i % expected.seq < 2).collect();
    for site in [Site::Resid, Site::Mlp, Site::Attn] {
        let point = TapPoint::new(site, 1);
        let mut identity = Splicer::new(point, keep.clone(), |rows: Rows<'_>| Ok(rows.data().to_vec()));
        let spliced = model.forward(tokens, &mut identity, Until::Logits).unwrap().unwrap();
        assert_eq!(spliced, clean, "{point}");
        let mut zero = Splicer::new(point, keep.clone(), |rows: Rows<'_>| {
            assert_eq!(rows.n_rows(), keep.iter().filter(|k| !**k).count());
            Ok(vec![0.0; rows.data().len()])
        });
        let zeroed = model.forward(tokens, &mut zero, Until::Logits).unwrap().unwrap();
        let vocab = model.spec().vocab_size;
        for (i, (a, b)) in zeroed.chunks(vocab).zip(clean.chunks(vocab)).enumerate() {
            // Kept positions come first, so nothing they see has changed.
            assert_eq!(a == b, keep[i], "{point}: row {i}");
        }
    }
}

#[test]
fn splicing_refuses_what_does_not_fit() {
    let expected = Expected::read("llama");
    let (model, _) = model::load_weights(&golden("llama")).unwrap();
    let (tokens, point) = (expected.tokens(), TapPoint::new(Site::Resid, 0));
    let keep = vec![false; tokens.n_tokens()];
    let mut short = Splicer::new(point, keep.clone(), |_: Rows<'_>| Ok(vec![0.0]));
    let result = model.forward(tokens, &mut short, Until::Logits);
    assert!(matches!(result, Err(LmError::Replacement { found: 1, .. })));
    let mut mask = Splicer::new(point, keep[1..].to_vec(), |rows: Rows<'_>| Ok(rows.data().to_vec()));
    assert!(matches!(model.forward(tokens, &mut mask, Until::Logits), Err(LmError::Tap { .. })));
    let ids = [0, 1, u32::try_from(model.spec().vocab_size).unwrap()];
    let result = model.forward(TokenBatch::new(&ids, 3).unwrap(), &mut NoTap, Until::Logits);
    assert!(matches!(result, Err(LmError::TokenId { position: 2, .. })));
    assert!(
        TokenBatch::new(&ids, 2).is_err()
            && TokenBatch::new(&ids, 0).is_err()
            && TokenBatch::new(&[], 1).is_err()
    );
}

#[test]
fn direct_logits_are_the_gain_times_the_unembedding() {
    for (case, table, offset) in
        [("gemma2", "model.embed_tokens.weight", 1.0), ("llama", "lm_head.weight", 0.0)]
    {
        let memory = Memory::read(case);
        let model = build(&blueprint(case), &mut memory.clone()).unwrap();
        let (d, vocab) = (model.spec().d_model, model.spec().vocab_size);
        let directions: Vec<f32> = (0..2 * d).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.1).collect();
        let found = model.direct_logits(Rows::new(&directions, d).unwrap()).unwrap();
        let (gain, table) = (&memory.0["model.norm.weight"].1, &memory.0[table].1);
        let wanted: Vec<f32> = (0..2 * vocab)
            .map(|i| {
                let (row, token) = (&directions[i / vocab * d..], &table[i % vocab * d..]);
                (0..d)
                    .map(|j| f64::from(row[j]) * f64::from(gain[j] + offset) * f64::from(token[j]))
                    .sum::<f64>() as f32
            })
            .collect();
        assert!(distance(&found, &wanted) < 1e-6, "{case}");
        assert!(model.direct_logits(Rows::new(&directions, 2).unwrap()).is_err());
    }
}

#[test]
fn one_thread_and_many_give_the_same() {
    let expected = Expected::read("gemma2");
    let (threaded, serial) = (CandleOps::new(Arc::new(Rayon)), CandleOps::new(Arc::new(Serial)));
    let run_on = |ops| {
        let model = LanguageModel::build(ops, &blueprint("gemma2"), &mut Memory::read("gemma2")).unwrap();
        run(&model, expected.tokens())
    };
    assert_eq!(run_on(threaded), run_on(serial));
}

#[test]
fn broken_tensors_are_named() {
    let case = "llama";
    let broken = |change: &dyn Fn(&mut Memory)| {
        let mut memory = Memory::read(case);
        change(&mut memory);
        build(&blueprint(case), &mut memory).unwrap_err()
    };
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let error = broken(&|m| drop(m.0.remove(Q)));
    assert!(matches!(&error, LmError::MissingTensor { name, .. } if name == Q), "{error}");
    let error = broken(&|m| m.0.get_mut(Q).unwrap().0.reverse());
    assert!(matches!(&error, LmError::TensorShape { name, .. } if name == Q), "{error}");
    let error = broken(&|m| m.0.get_mut(Q).unwrap().1[5] = f32::NAN);
    assert!(matches!(&error, LmError::NotFinite { index: 5, .. }), "{error}");
    let error = broken(&|m| assert!(m.0.get_mut(Q).unwrap().1.pop().is_some()));
    assert!(matches!(&error, LmError::TensorShape { .. }), "{error}");
    let error = broken(&|m| {
        drop(m.0.insert("model.layers.1.self_attn.q_norm.weight".to_owned(), (vec![1], vec![1.0])))
    });
    assert!(matches!(&error, LmError::UnknownTensors { count: 1, .. }), "{error}");
    let error = broken(&|m| drop(m.0.remove("lm_head.weight")));
    assert!(matches!(&error, LmError::MissingTensor { .. }), "{error}");
}

#[test]
fn a_model_saved_without_its_head_is_read_too() {
    let mut memory = Memory::default();
    for (name, tensor) in Memory::read("gemma2").0 {
        memory.0.insert(name.strip_prefix("model.").unwrap().to_owned(), tensor);
    }
    let expected = Expected::read("gemma2");
    let model = build(&blueprint("gemma2"), &mut memory).unwrap();
    assert!(worst(&run(&model, expected.tokens()), &expected).0 <= TOLERANCE);
}

#[test]
fn hostile_configurations_are_refused() {
    let good: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("gemma2").join("config.json")).unwrap()).unwrap();
    let with = |field: &str, value: serde_json::Value| {
        let mut config = good.clone();
        config[field] = value;
        let blueprint = Blueprint::from_config(config.to_string().as_bytes())?;
        build(&blueprint, &mut Memory::read("gemma2")).map(drop)
    };
    with("vocab_size", 96.into()).unwrap();
    for (field, value) in [
        ("model_type", serde_json::json!("mamba")),
        ("model_type", serde_json::Value::Null),
        ("hidden_size", (-1).into()),
        ("hidden_size", serde_json::json!("24")),
        ("hidden_size", serde_json::json!(1e300)),
        ("hidden_size", u64::MAX.into()),
        ("hidden_size", 25.into()),
        ("num_hidden_layers", 0.into()),
        ("num_hidden_layers", 16_000_000.into()),
        ("num_hidden_layers", 2.into()),
        ("num_key_value_heads", 3.into()),
        ("head_dim", 9.into()),
        ("head_dim", 16_777_216.into()),
        ("rms_norm_eps", serde_json::json!(0.0)),
        ("query_pre_attn_scalar", serde_json::json!(-3)),
        ("sliding_window", 0.into()),
        ("layer_types", serde_json::json!(["full_attention"])),
        ("layer_types", serde_json::json!(["full_attention", "full_attention", 7])),
        ("hidden_activation", serde_json::json!("quick_gelu")),
        ("rope_parameters", serde_json::json!({"rope_type": "yarn", "factor": 2.0})),
        ("rope_parameters", serde_json::json!({"rope_type": "linear"})),
        ("rope_parameters", serde_json::json!([1])),
        ("partial_rotary_factor", serde_json::json!(0.25)),
        ("use_bidirectional_attention", true.into()),
        ("attention_bias", true.into()),
        ("tie_word_embeddings", false.into()),
    ] {
        assert!(with(field, value.clone()).is_err(), "{field} = {value} was accepted");
    }
    for text in ["", "[]", "null", "{\"model_type\"", "\u{0}"] {
        assert!(Blueprint::from_config(text.as_bytes()).is_err());
    }
}

#[test]
fn hostile_safetensors_are_refused() {
    let values = [1.0f32, 2.0, 3.0, 4.0];
    let view = TensorView::new(Dtype::F32, vec![2, 2], bytemuck_bytes(&values)).unwrap();
    let good = safetensors::serialize([("x", view)], None).unwrap();
    let parse = |bytes: &[u8]| SafetensorsHeader::parse(bytes, bytes.len() as u64);
    assert_eq!(parse(&good).unwrap().tensors()["x"].shape, [2, 2]);
    for end in 0..good.len() {
        assert!(parse(&good[..end]).is_err(), "{end} bytes of {} were accepted", good.len());
    }
    let header = |json: &str| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.extend([0; 64]);
        parse(&bytes)
    };
    header(r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#).unwrap();
    for json in [
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,17]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[60,76]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,18446744073709551616]}}"#,
        r#"{"x":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}"#,
        r#"{"x":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#,
        r#"{"x":7}"#,
        "[]",
        "{",
    ] {
        assert!(header(json).is_err(), "{json} was accepted");
    }
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.extend([b'{'; 8]);
    assert!(parse(&huge).is_err());
}

fn bytemuck_bytes(values: &[f32]) -> &[u8] {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    bytes.leak()
}

/// Writes GGUF files, for tests only.
#[derive(Default)]
struct GgufWriter {
    keys: Vec<Vec<u8>>,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl GgufWriter {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, key);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
        self.keys.push(bytes);
        self
    }

    fn string(&mut self, key: &str, value: &str) -> &mut Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, value);
        self.key(key, 8, &bytes)
    }

    fn number(&mut self, key: &str, value: usize) -> &mut Self {
        self.key(key, 4, &u32::try_from(value).unwrap().to_le_bytes())
    }

    fn strings(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| Self::text(&mut bytes, value));
        self.key(key, 9, &bytes)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        self.keys.iter().for_each(|key| out.extend(key));
        let mut data = Vec::new();
        for (name, shape, values) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            Self::text(&mut out, name);
            out.extend(u32::try_from(shape.len()).unwrap().to_le_bytes());
            shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// The classic Llama golden as a GGUF: renamed, query and key rows interleaved.
fn gguf_of_golden() -> GgufWriter {
    let spec = blueprint("llama-classic").spec;
    let mut writer = GgufWriter::default();
    writer
        .string("general.architecture", "llama")
        .string("general.name", "Tiny")
        .number("llama.block_count", spec.n_layers)
        .number("llama.embedding_length", spec.d_model)
        .number("llama.feed_forward_length", spec.d_ff)
        .number("llama.context_length", spec.context_length)
        .number("llama.attention.head_count", spec.attention.n_heads)
        .number("llama.attention.head_count_kv", spec.attention.n_kv_heads)
        .number("llama.rope.dimension_count", spec.attention.head_dim)
        .key("llama.attention.layer_norm_rms_epsilon", 6, &spec.norm.eps.to_le_bytes())
        .key("llama.rope.freq_base", 6, &700f32.to_le_bytes())
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &["<|s|>", "Ġ", "1", ".", "ĠĠ", "Ġ1", "Ċ", "â"])
        .strings("tokenizer.ggml.merges", &["Ġ Ġ", "Ġ 1"])
        .number("tokenizer.ggml.bos_token_id", 0)
        .key("tokenizer.ggml.add_bos_token", 7, &[0]);
    let mut kinds = 5u32.to_le_bytes().to_vec();
    kinds.extend(8u64.to_le_bytes());
    [3i32, 1, 1, 1, 1, 1, 1, 1].iter().for_each(|kind| kinds.extend(kind.to_le_bytes()));
    writer.key("tokenizer.ggml.token_type", 9, &kinds);
    for (name, (shape, mut values)) in Memory::read("llama-classic").0 {
        let mut renamed = name.clone();
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("model.layers.", "blk."),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            renamed = renamed.replace(from, to);
        }
        if renamed.contains("attn_q.") || renamed.contains("attn_k.") {
            let (d, half, source) = (spec.d_model, spec.attention.head_dim / 2, values.clone());
            for (row, out) in values.chunks_exact_mut(d).enumerate() {
                let (head, within) = (row / (2 * half), row % (2 * half));
                let from = head * 2 * half + within % 2 * half + within / 2;
                out.copy_from_slice(&source[from * d..(from + 1) * d]);
            }
        }
        writer.tensors.push((renamed, shape, values));
    }
    writer
}

#[test]
fn a_gguf_means_the_same_as_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, gguf_of_golden().bytes()).unwrap();
    let expected = Expected::read("llama-classic");
    for path in [path.as_path(), folder.path()] {
        let loaded = model::load(path).unwrap();
        assert_eq!((loaded.provenance.name.as_str(), loaded.provenance.format.as_str()), ("Tiny", "gguf"));
        let (error, name) = worst(&run(&loaded.model, expected.tokens()), &expected);
        assert!(error <= TOLERANCE, "{name} is off by {error:e}");
    }
    let missing = model::load(&folder.path().join("nowhere")).unwrap_err().to_string();
    assert!(missing.contains("config.json") && missing.contains(".gguf"), "{missing}");
}

#[test]
fn the_gguf_tokenizer_isolates_digits() {
    let parse = |writer: &GgufWriter| {
        let bytes = writer.bytes();
        Gguf::parse(bytes.as_slice(), bytes.len() as u64).unwrap()
    };
    let mut writer = gguf_of_golden();
    let tokenizer = Tokenizer::from_gguf(&parse(&writer)).unwrap();
    assert_eq!(tokenizer.encode("  1.").unwrap(), [4, 2, 3]);
    assert_eq!(tokenizer.encode("<|s|> 1").unwrap(), [0, 1, 2]);
    assert_eq!(
        (tokenizer.bos(), tokenizer.prepend_bos(), tokenizer.special_ids()),
        (Some(0), false, &[0][..])
    );
    assert_eq!(tokenizer.vocab_size(), 8);
    let pieces: Vec<String> = (0..9).map(|id| tokenizer.piece(id)).collect();
    assert_eq!(pieces, ["<|s|>", " ", "1", ".", "  ", " 1", "\n", "<0xE2>", ""]);
    // With the plain GPT-2 pattern the second space belongs to the digit.
    let pre = writer.keys.iter().position(|key| key.ends_with(b"smollm")).unwrap();
    writer.keys.remove(pre);
    writer.string("tokenizer.ggml.pre", "gpt-2");
    assert_eq!(Tokenizer::from_gguf(&parse(&writer)).unwrap().encode("  1.").unwrap(), [1, 5, 3]);
    writer.keys.pop();
    writer.string("tokenizer.ggml.pre", "qwen2");
    assert!(Tokenizer::from_gguf(&parse(&writer)).is_err());
}

#[test]
fn a_tokenizer_template_tells_the_first_token() {
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "added_tokens": [{"id": 2, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": {"a": 0, "▁b": 1, "<bos>": 2}, "merges": []}
    });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), &BosHints::default()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.prepend_bos()), (Some(2), true));
    assert_eq!((tokenizer.encode("a").unwrap(), tokenizer.piece(1)), (vec![0], " b".to_owned()));
    let hints = BosHints { token: None, id: None, prepend: Some(false) };
    assert!(!Tokenizer::from_json(json.to_string().as_bytes(), &hints).unwrap().prepend_bos());
    assert!(Tokenizer::from_json(b"{}", &hints).is_err());
}

#[test]
fn hostile_ggufs_are_refused() {
    let good = gguf_of_golden().bytes();
    let parse = |bytes: &[u8]| Gguf::parse(bytes, bytes.len() as u64);
    let header: Vec<GgufTensor> = parse(&good).unwrap().tensors().values().cloned().collect();
    let data = header.iter().map(|t| t.start).min().unwrap() as usize;
    for end in (0..data).chain([good.len() - 1]) {
        assert!(parse(&good[..end]).is_err(), "{end} bytes of {} were accepted", good.len());
    }
    // Whatever single byte of the header is changed, the answer is a value or an error.
    for i in 0..data {
        for flip in [0x01, 0x80, 0xFF] {
            let mut bytes = good.clone();
            bytes[i] ^= flip;
            if let Ok(gguf) = parse(&bytes) {
                let _ = (gguf.blueprint(&mut Memory::default()), Tokenizer::from_gguf(&gguf));
            }
        }
    }
    // Counts that the file cannot hold.
    for at in [8, 16] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&bytes).is_err());
    }
    let claims = |key: u32, n: u64| {
        let mut writer = GgufWriter::default();
        let mut value = key.to_le_bytes().to_vec();
        value.extend(n.to_le_bytes());
        writer.key("x", 9, &value);
        parse(&writer.bytes())
    };
    assert!(claims(4, 0).is_ok());
    assert!(
        claims(4, 1 << 24).is_err()
            && claims(8, 1 << 60).is_err()
            && claims(9, 1).is_err()
            && claims(99, 1).is_err()
    );
    let tensor = |shape: Vec<usize>| {
        let mut writer = GgufWriter::default();
        writer.tensors.push(("x".to_owned(), shape, vec![0.0; 4]));
        parse(&writer.bytes())
    };
    assert!(tensor(vec![2, 2]).is_ok());
    assert!(
        tensor(vec![3, 2]).is_err() && tensor(vec![1 << 40, 1 << 40]).is_err() && tensor(vec![]).is_err()
    );
    let mut twice = gguf_of_golden();
    twice.tensors.push(twice.tensors[0].clone());
    assert!(parse(&twice.bytes()).is_err());
}

#[test]
fn quantised_blocks_are_read_as_their_format_says() {
    let half = |x: f32| {
        // 1.5 and 0.25 are exact in half precision.
        if x == 1.5 { 0x3E00u16.to_le_bytes() } else { 0x3400u16.to_le_bytes() }
    };
    let nibbles: Vec<u8> = (0..16).map(|i| (i as u8) | ((15 - i as u8) << 4)).collect();
    let kind = |number: u32, bytes: usize| {
        let mut writer = GgufWriter::default();
        writer.tensors.push(("x".to_owned(), vec![32], vec![0.0; bytes.div_ceil(4)]));
        let mut file = writer.bytes();
        let at = file.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0x").unwrap() + 9 + 4 + 8;
        file[at..at + 4].copy_from_slice(&number.to_le_bytes());
        Gguf::parse(file.as_slice(), file.len() as u64).unwrap().tensors()["x"].clone()
    };
    let q4_1 = kind(3, 20);
    assert_eq!(q4_1.len, 20);
    let bytes = [&half(1.5)[..], &half(0.25), &nibbles].concat();
    let wanted: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32 * 1.5 + 0.25).collect();
    assert_eq!(dequantise(q4_1.kind, &bytes, 32).unwrap(), wanted);
    let q4_0 = kind(2, 18);
    let wanted: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| (q as f32 - 8.0) * 1.5).collect();
    assert_eq!(dequantise(q4_0.kind, &[&half(1.5)[..], &nibbles].concat(), 32).unwrap(), wanted);
    let q8_0 = kind(8, 34);
    let bytes: Vec<u8> = half(0.25).into_iter().chain((0..32).map(|i| (i - 16) as i8 as u8)).collect();
    let wanted: Vec<f32> = (0..32).map(|i| (i - 16) as f32 * 0.25).collect();
    assert_eq!(dequantise(q8_0.kind, &bytes, 32).unwrap(), wanted);
    assert!(dequantise(q8_0.kind, &bytes[1..], 32).is_err() && dequantise(q8_0.kind, &bytes, 31).is_err());
}
