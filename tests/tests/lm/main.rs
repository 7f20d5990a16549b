//! The transformer against goldens from transformers (`golden/lm/make_lm_golden.py`), against impostors that must
//! be told apart from it, and against broken files.
//!
//! This file holds what the tests share; `agreement` compares, `broken` damages, `gguf` reads the other format,
//! `gemma_gguf` what it holds of Gemma, `precision` runs in fewer bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod agreement;
mod broken;
mod gemma_gguf;
mod gguf;
mod precision;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use native::model::{self, Rayon};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use shared::lm::{
    Blueprint, BosHints, CandleOps, FloatFormat, Gguf, GgufTensor, LanguageModel, LmError, MlpActivation,
    NoTap, NormKind, Qkv, RopeScaling, SafetensorsHeader, Serial, Splicer, Steerer, Tap, TapAction, Taps,
    TensorSource, TokenBatch, Tokenizer, Until, dequantise, nll,
};
use shared::{Rows, Site, TapPoint};

/// ‖Δ‖/‖reference‖ allowed at every tap, on logits and losses.
const TOLERANCE: f64 = 1e-5;
const CASES: [&str; 13] = [
    "gemma2",
    "gemma3",
    "gemma3-images",
    "gpt2",
    "llama",
    "llama-classic",
    "mistral",
    "nanogpt",
    "nanogpt-untied",
    "neox-serial",
    "pythia",
    "qwen2",
    "qwen3",
];

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/lm").join(case)
}

fn decode(format: FloatFormat, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / format.size()];
    format.decode(bytes, &mut values);
    values
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
        let values = floats.map(|(name, t)| (name.to_owned(), decode(FloatFormat::F32, t.data()))).collect();
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
                memory.0.insert(name.to_owned(), (tensor.shape().to_vec(), decode(format, tensor.data())));
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

    fn read(&mut self, name: &str, out: &mut [f32]) -> Result<(), LmError> {
        let values = &self.0[name].1;
        if values.len() != out.len() {
            return Err(LmError::Read { name: name.to_owned(), message: format!("{} values", values.len()) });
        }
        out.copy_from_slice(values);
        Ok(())
    }
}

fn blueprint(case: &str) -> Blueprint {
    Blueprint::from_config(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap()
}

fn build(blueprint: &Blueprint, memory: &mut Memory) -> Result<LanguageModel, LmError> {
    LanguageModel::build(CandleOps::new(Arc::new(Serial)), blueprint, memory)
}
