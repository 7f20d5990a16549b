//! GGUF files and their tokenizers, written here and read by the library.

use super::*;

/// Writes GGUF files, for tests only.
#[derive(Default)]
pub(super) struct GgufWriter {
    keys: Vec<Vec<u8>>,
    pub(super) tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl GgufWriter {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    pub(super) fn key(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, key);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
        self.keys.push(bytes);
        self
    }

    pub(super) fn string(&mut self, key: &str, value: &str) -> &mut Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, value);
        self.key(key, 8, &bytes)
    }

    pub(super) fn number(&mut self, key: &str, value: usize) -> &mut Self {
        self.key(key, 4, &u32::try_from(value).unwrap().to_le_bytes())
    }

    pub(super) fn strings(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| Self::text(&mut bytes, value));
        self.key(key, 9, &bytes)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
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

/// A tensor of one block in the number format of this number, whose blocks hold `values` in `size` bytes.
pub(super) fn kind(number: u32, values: usize, size: usize) -> GgufTensor {
    let mut writer = GgufWriter::default();
    writer.tensors.push(("x".to_owned(), vec![values], vec![0.0; size.div_ceil(4)]));
    let mut file = writer.bytes();
    let at = file.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0x").unwrap() + 9 + 4 + 8;
    file[at..at + 4].copy_from_slice(&number.to_le_bytes());
    let tensor = Gguf::parse(file.as_slice(), file.len() as u64).unwrap().tensors()["x"].clone();
    assert_eq!(tensor.len, size);
    tensor
}

#[test]
fn quantised_blocks_are_read_as_their_format_says() {
    let half = |x: f32| {
        // 1.5 and 0.25 are exact in half precision.
        if x == 1.5 { 0x3E00u16.to_le_bytes() } else { 0x3400u16.to_le_bytes() }
    };
    let nibbles: Vec<u8> = (0..16).map(|i| (i as u8) | ((15 - i as u8) << 4)).collect();
    let values = |kind, bytes: &[u8], n| {
        let mut values = vec![0.0; n];
        dequantise(kind, bytes, &mut values).map(|()| values)
    };
    let q4_1 = kind(3, 32, 20).kind;
    let bytes = [&half(1.5)[..], &half(0.25), &nibbles].concat();
    let wanted: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32 * 1.5 + 0.25).collect();
    assert_eq!(values(q4_1, &bytes, 32).unwrap(), wanted);
    let q4_0 = kind(2, 32, 18).kind;
    let wanted: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| (q as f32 - 8.0) * 1.5).collect();
    assert_eq!(values(q4_0, &[&half(1.5)[..], &nibbles].concat(), 32).unwrap(), wanted);
    let q8_0 = kind(8, 32, 34).kind;
    let bytes: Vec<u8> = half(0.25).into_iter().chain((0..32).map(|i| (i - 16) as i8 as u8)).collect();
    let wanted: Vec<f32> = (0..32).map(|i| (i - 16) as f32 * 0.25).collect();
    assert_eq!(values(q8_0, &bytes, 32).unwrap(), wanted);
    assert!(values(q8_0, &bytes[1..], 32).is_err() && values(q8_0, &bytes, 31).is_err());
}
