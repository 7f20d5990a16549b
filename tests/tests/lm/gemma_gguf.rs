//! Gemma in GGUF files: the same model as its folder, its SentencePiece tokenizer, and the quantised formats.

use super::gguf::{GgufWriter, kind as gguf_kind};
use super::*;

const D: usize = 12;
const HEAD: usize = 10;

/// A configuration in which everything that GGUF files leave out is as in the released models.
fn config(architecture: &str) -> serde_json::Value {
    serde_json::json!({
        "model_type": if architecture == "gemma3" { "gemma3_text" } else { architecture },
        "vocab_size": 40, "hidden_size": D, "intermediate_size": 20, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD, "query_pre_attn_scalar": HEAD,
        "sliding_window": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "attn_logit_softcapping": if architecture == "gemma3" { None } else { Some(1.5) },
        "final_logit_softcapping": if architecture == "gemma3" { None } else { Some(2.0) },
    })
}

/// Tensors of that configuration under both names, gains as a folder stores them.
fn tensors(architecture: &str) -> Vec<(String, String, Vec<usize>, Vec<f32>)> {
    let (q, kv, d_ff) = (4 * HEAD, 2 * HEAD, 20);
    let mut named = vec![
        ("model.embed_tokens".to_owned(), "token_embd".to_owned(), vec![40, D]),
        ("model.norm".to_owned(), "output_norm".to_owned(), vec![D]),
    ];
    let mut block = vec![
        ("input_layernorm", "attn_norm", vec![D]),
        ("post_attention_layernorm", "post_attention_norm", vec![D]),
        ("pre_feedforward_layernorm", "ffn_norm", vec![D]),
        ("post_feedforward_layernorm", "post_ffw_norm", vec![D]),
        ("self_attn.q_proj", "attn_q", vec![q, D]),
        ("self_attn.k_proj", "attn_k", vec![kv, D]),
        ("self_attn.v_proj", "attn_v", vec![kv, D]),
        ("self_attn.o_proj", "attn_output", vec![D, q]),
        ("mlp.gate_proj", "ffn_gate", vec![d_ff, D]),
        ("mlp.up_proj", "ffn_up", vec![d_ff, D]),
        ("mlp.down_proj", "ffn_down", vec![D, d_ff]),
    ];
    if architecture == "gemma3" {
        block.push(("self_attn.q_norm", "attn_q_norm", vec![HEAD]));
        block.push(("self_attn.k_norm", "attn_k_norm", vec![HEAD]));
    }
    for layer in 0..7 {
        for (folder, gguf, shape) in &block {
            named.push((
                format!("model.layers.{layer}.{folder}"),
                format!("blk.{layer}.{gguf}"),
                shape.clone(),
            ));
        }
    }
    let mut state = 12345u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    named
        .into_iter()
        .map(|(folder, gguf, shape)| {
            let values = (0..shape.iter().product::<usize>()).map(|_| next() * 0.5).collect();
            (format!("{folder}.weight"), format!("{gguf}.weight"), shape, values)
        })
        .collect()
}

fn gguf(architecture: &str) -> GgufWriter {
    let mut writer = GgufWriter::default();
    let key = |name: &str| format!("{architecture}.{name}");
    writer
        .string("general.architecture", architecture)
        .number(&key("block_count"), 7)
        .number(&key("embedding_length"), D)
        .number(&key("feed_forward_length"), 20)
        .number(&key("context_length"), 64)
        .number(&key("attention.head_count"), 4)
        .number(&key("attention.head_count_kv"), 2)
        .number(&key("attention.key_length"), HEAD)
        .number(&key("attention.value_length"), HEAD)
        .number(&key("attention.sliding_window"), 4)
        .key(&key("attention.layer_norm_rms_epsilon"), 6, &1e-5f32.to_le_bytes())
        .key(&key("rope.freq_base"), 6, &500f32.to_le_bytes())
        .string(&key("rope.scaling.type"), "linear")
        .key(&key("rope.scaling.factor"), 6, &2f32.to_le_bytes());
    if architecture == "gemma2" {
        writer.key(&key("attn_logit_softcapping"), 6, &1.5f32.to_le_bytes());
        writer.key(&key("final_logit_softcapping"), 6, &2f32.to_le_bytes());
    }
    for (_, name, shape, mut values) in tensors(architecture) {
        if name.contains("norm") {
            values.iter_mut().for_each(|w| *w += 1.0);
        }
        writer.tensors.push((name, shape, values));
    }
    writer
}

#[test]
fn a_gguf_of_gemma_means_the_same_as_its_folder() {
    let ids: Vec<u32> = (0..26).map(|i| i * 7 % 40).collect();
    let tokens = TokenBatch::new(&ids, 13).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for architecture in ["gemma2", "gemma3"] {
        let blueprint = Blueprint::from_config(config(architecture).to_string().as_bytes()).unwrap();
        let mut memory = Memory::default();
        for (name, _, shape, values) in tensors(architecture) {
            memory.0.insert(name, (shape, values));
        }
        let wanted = run(&build(&blueprint, &mut memory).unwrap(), tokens);
        let path = folder.path().join(format!("{architecture}.gguf"));
        std::fs::write(&path, gguf(architecture).bytes()).unwrap();
        let (model, provenance) = model::load_weights(&path).unwrap();
        assert_eq!((model.spec().architecture.as_str(), provenance.format.as_str()), (architecture, "gguf"));
        let spec = model.spec();
        assert_eq!(
            (&spec.attention, spec.final_softcap),
            (&blueprint.spec.attention, blueprint.spec.final_softcap)
        );
        let found = run(&model, tokens);
        for (name, wanted) in &wanted {
            let error = distance(&found[name], wanted);
            assert!(error <= 1e-6, "{architecture}: {name} is off by {error:e}");
        }
    }
}

#[test]
fn a_gguf_of_gemma_that_lacks_something_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let refused = |writer: &GgufWriter, what: &str| {
        std::fs::write(&path, writer.bytes()).unwrap();
        let error = format!("{:#}", model::load_weights(&path).unwrap_err());
        assert!(error.contains(what), "{error}");
    };
    let mut writer = gguf("gemma3");
    writer.tensors.retain(|(name, ..)| name != "blk.3.attn_k_norm.weight");
    refused(&writer, "blk.3.attn_k_norm.weight is missing");
    let mut writer = gguf("gemma2");
    writer.tensors.push(("blk.0.attn_q_norm.weight".to_owned(), vec![HEAD], vec![1.0; HEAD]));
    refused(&writer, "do not belong");
    let mut writer = GgufWriter::default();
    writer.string("general.architecture", "mamba");
    refused(&writer, "llama, gemma2 and gemma3");
}

/// `ab` is better than `bc`, so `abc` is `ab` `c`; runs of spaces are spelled with spaces, as some files do.
fn sentencepiece(prefix: bool) -> GgufWriter {
    let tokens: Vec<(&str, f32, i32)> = [
        ("<pad>", -1000.0, 3),
        ("<bos>", -1000.0, 3),
        ("<unk>", -1000.0, 2),
        ("  ", -1000.0, 4),
        ("\n\n", -1000.0, 4),
        ("ab", 0.0, 1),
        ("bc", -1.0, 1),
        ("▁a", -2.0, 1),
        ("abcd", -3.0, 1),
        ("cd", -4.0, 1),
        ("a", -5.0, 1),
        ("b", -6.0, 1),
        ("c", -7.0, 1),
        ("d", -8.0, 1),
        ("▁", -9.0, 1),
        ("\n", -10.0, 1),
        ("<0xC3>", 0.0, 6),
        ("<0xA9>", 0.0, 6),
    ]
    .to_vec();
    let mut writer = GgufWriter::default();
    let names: Vec<&str> = tokens.iter().map(|t| t.0).collect();
    let array = |kind: u32, values: Vec<[u8; 4]>| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.concat());
        bytes
    };
    let scores = array(6, tokens.iter().map(|t| t.1.to_le_bytes()).collect());
    let kinds = array(5, tokens.iter().map(|t| t.2.to_le_bytes()).collect());
    writer
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &names)
        .key("tokenizer.ggml.scores", 9, &scores)
        .key("tokenizer.ggml.token_type", 9, &kinds)
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.unknown_token_id", 2)
        .key("tokenizer.ggml.add_space_prefix", 7, &[u8::from(prefix)]);
    writer
}

fn tokenizer(writer: &GgufWriter) -> Result<Tokenizer, LmError> {
    let bytes = writer.bytes();
    Tokenizer::from_gguf(&Gguf::parse(bytes.as_slice(), bytes.len() as u64)?)
}

#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let plain = tokenizer(&sentencepiece(false)).unwrap();
    let ids = |text: &str| plain.encode(text).unwrap();
    assert_eq!(ids("abc"), [5, 12]);
    assert_eq!(ids("abcd"), [8]);
    assert_eq!(ids("bcd"), [6, 13]);
    assert_eq!(ids(" a"), [7]);
    // Two spaces are one token before any word may take the second.
    assert_eq!(ids("b  a"), [11, 3, 10]);
    assert_eq!(ids("a\n\nb"), [10, 4, 11]);
    assert_eq!(ids("\n\n\n"), [4, 15]);
    assert_eq!(ids("é"), [16, 17]);
    assert_eq!(ids("<bos>a"), [1, 10]);
    assert_eq!(ids("x"), [2]);
    assert_eq!((plain.bos(), plain.prepend_bos(), plain.special_ids()), (Some(1), true, &[0, 1][..]));
    assert_eq!((plain.piece(7), plain.piece(3)), (" a".to_owned(), "  ".to_owned()));
    let prefixed = tokenizer(&sentencepiece(true)).unwrap();
    assert_eq!(prefixed.encode("a").unwrap(), [7]);
    assert_eq!(prefixed.encode("bc").unwrap(), [14, 6]);
    let mut without_scores = GgufWriter::default();
    without_scores.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", &["a"]);
    let error = tokenizer(&without_scores).unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.scores"), "{error}");
    let mut other = GgufWriter::default();
    other.string("tokenizer.ggml.model", "t5");
    assert!(tokenizer(&other).unwrap_err().to_string().contains("SentencePiece"));
}

#[test]
fn every_quantised_format_gives_the_values_of_its_authors() {
    let bytes = std::fs::read(golden("gguf_blocks.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    // Number in the file, bytes a block, values a block.
    for (name, number, size, values) in [
        ("Q4_0", 2, 18, 32),
        ("Q4_1", 3, 20, 32),
        ("Q5_0", 6, 22, 32),
        ("Q5_1", 7, 24, 32),
        ("Q8_0", 8, 34, 32),
        ("Q2_K", 10, 84, 256),
        ("Q3_K", 11, 110, 256),
        ("Q4_K", 12, 144, 256),
        ("Q5_K", 13, 176, 256),
        ("Q6_K", 14, 210, 256),
    ] {
        let blocks = file.tensor(&format!("{name}.bytes")).unwrap().data().to_vec();
        let wanted = decode(FloatFormat::F32, file.tensor(&format!("{name}.values")).unwrap().data());
        assert_eq!((wanted.len(), blocks.len()), (512, 512 / values * size), "{name}");
        let kind = gguf_kind(number, values, size).kind;
        let mut found = vec![0.0; wanted.len()];
        dequantise(kind, &blocks, &mut found).unwrap();
        assert!(found.iter().all(|x| x.is_finite()) && found.iter().any(|x| *x != 0.0));
        assert_eq!(found, wanted, "{name}");
    }
}
