//! A tiny language model with a tokenizer and text, and vectors to train on, for tests that run whole commands.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use shared::config::harvest::HarvestConfig;
use shared::config::resolve;

/// The golden Llama checkpoint with a tokenizer of 101 numbered words, and text in those words.
pub(crate) fn prepare(folder: &Path) -> HarvestConfig {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/lm/llama");
    let (model, text) = (folder.join("model"), folder.join("text"));
    fs::create_dir_all(&model).unwrap();
    fs::create_dir_all(&text).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), model.join(name)).unwrap();
    }
    let vocabulary: BTreeMap<String, u32> = (0..101u32)
        .map(|id| {
            (["<unk>", "<s>", "</s>"].get(id as usize).map_or(format!("w{id}"), |s| (*s).to_owned()), id)
        })
        .collect();
    let special = |id: u32, content: &str| {
        serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let hints = r#"{"bos_token": "<s>", "add_bos_token": true}"#;
    fs::write(model.join("tokenizer_config.json"), hints).unwrap();
    let mut state = 1u64;
    for file in 0..5 {
        let mut words = String::new();
        for _ in 0..3000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            words.push_str(&format!("w{} ", 3 + (state >> 33) % 98));
        }
        fs::write(text.join(format!("{file}.txt")), words).unwrap();
    }
    let path = |p: PathBuf| p.to_str().unwrap().to_owned();
    let text = format!(
        "model = {:?}\ntext = [{:?}]\ntaps = [\"resid.1\", \"attn.0\"]\ntokens = \"9k\"\nheld_out = \"10%\"\n\
         part_tokens = 64\nmax_document_bytes = 600\nsequence_length = 32\nbatch = 3\nbucket_vectors = 1500\nshard_vectors = 700\n",
        path(model),
        path(text)
    );
    resolve(&text, &[]).unwrap()
}

/// This test program again, running only `test`, with nothing to say.
pub(crate) fn this_program(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test]).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Kills a training process at some moment after its log `log` has so many lines; says whether it was still running. A log goes
/// back to the last checkpoint when a run is resumed, so that growing numbers of lines are moments further and further on.
pub(crate) fn kill_after_lines(mut child: Child, log: &Path, lines: usize) -> bool {
    while child.try_wait().unwrap().is_none() {
        if fs::read_to_string(log).is_ok_and(|text| text.lines().count() >= lines) {
            // Somewhere between two lines.
            std::thread::sleep(Duration::from_millis(lines as u64 * 7 % 11));
            let running = child.try_wait().unwrap().is_none();
            child.kill().unwrap();
            child.wait().unwrap();
            return running;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// Every file below `folder`, by its path from there.
pub(crate) fn files_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut all, mut folders) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else {
                all.insert(entry.strip_prefix(folder).unwrap().to_owned(), fs::read(&entry).unwrap());
            }
        }
    }
    all
}

/// The bytes of the weights that training wrote into `out`.
pub(crate) fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("sae_weights.safetensors")).unwrap()
}

/// Sparse sums of 24 directions in 16 dimensions, with some noise, and one vector a thousand times as long.
pub(crate) fn write_vectors(path: &Path) {
    let mut state = 5u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    let directions: Vec<f32> = (0..24 * 16).map(|_| uniform() - 0.5).collect();
    let mut x = Vec::new();
    for row in 0..3000 {
        let mut v: Vec<f32> = (0..16).map(|_| 0.02 * (uniform() - 0.5)).collect();
        for direction in directions.chunks_exact(16) {
            let weight = if uniform() < 0.1 { 0.5 + uniform() } else { 0.0 };
            v.iter_mut().zip(direction).for_each(|(v, d)| *v += weight * d);
        }
        let size = if row == 1234 { 1000.0 } else { 1.0 };
        x.extend(v.into_iter().map(|v| v * size));
    }
    let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    let held: Vec<u8> = x[..500 * 16].iter().flat_map(|v| v.to_le_bytes()).collect();
    let views = HashMap::from([
        ("x", TensorView::new(Dtype::F32, vec![3000, 16], &bytes).unwrap()),
        ("held_out", TensorView::new(Dtype::F32, vec![500, 16], &held).unwrap()),
    ]);
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
