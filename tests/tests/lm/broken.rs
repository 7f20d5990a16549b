//! Damaged tensors, configurations and files: refused by name, never a panic.

use super::*;

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
    assert!(matches!(&error, LmError::Read { .. }), "{error}");
    let error = broken(&|m| {
        drop(m.0.insert("model.layers.1.self_attn.q_norm.weight".to_owned(), (vec![1], vec![1.0])));
    });
    assert!(matches!(&error, LmError::UnknownTensors { count: 1, .. }), "{error}");
    let error = broken(&|m| drop(m.0.remove("lm_head.weight")));
    assert!(matches!(&error, LmError::MissingTensor { .. }), "{error}");
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
        ("partial_rotary_factor", serde_json::json!(1.5)),
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
fn configurations_of_every_family_are_checked() {
    let refused = |case: &str, change: &dyn Fn(&mut serde_json::Value), what: &str| {
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden(case).join("config.json")).unwrap()).unwrap();
        change(&mut config);
        let built = Blueprint::from_config(config.to_string().as_bytes())
            .and_then(|blueprint| build(&blueprint, &mut Memory::read(case)).map(drop));
        let error = built.unwrap_err().to_string();
        assert!(error.contains(what), "{case}: {error}");
    };
    refused(
        "gpt2",
        &|c| c["model_type"] = "mamba".into(),
        "gemma2, gemma3, gemma3_text, gpt2, gpt_neox, llama",
    );
    refused("gpt2", &|c| c["add_cross_attention"] = true.into(), "add_cross_attention");
    refused("gpt2", &|c| c["n_positions"] = 21.into(), "transformer.wpe.weight");
    refused("gpt2", &|c| c["n_inner"] = serde_json::Value::Null, "c_fc.weight: expected shape [24, 96]");
    refused("gpt2", &|c| c["n_head"] = 0.into(), "n_head");
    refused("gpt2", &|c| c["n_layer"] = 2.into(), "transformer.h.2.");
    refused("nanogpt", &|c| c["block_size"] = serde_json::Value::Null, "block_size: missing");
    refused("nanogpt", &|c| c["bias"] = true.into(), "c_attn.bias is missing");
    refused("nanogpt-untied", &|c| c["bias"] = false.into(), "do not belong");
    refused("nanogpt-untied", &|c| c["n_head"] = 5.into(), "shape");
    refused("pythia", &|c| c["rotary_pct"] = 1.5.into(), "at most 1");
    refused("pythia", &|c| c["rotary_pct"] = 0.4.into(), "pairs");
    refused("pythia", &|c| c["attention_bias"] = false.into(), "do not belong");
    refused("gemma3", &|c| c["sliding_window"] = serde_json::Value::Null, "sliding_window");
    refused("gemma3", &|c| c["attn_logit_softcapping"] = 50.0.into(), "attn_logit_softcapping");
    refused(
        "gemma3",
        &|c| c["rope_parameters"] = serde_json::json!({"rope_type": "default"}),
        "full_attention",
    );
    refused("gemma3", &|c| c["sliding_window_pattern"] = 0.into(), "sliding_window_pattern");
    refused("gemma3-images", &|c| c["text_config"] = 7.into(), "text_config");
    refused(
        "gemma3-images",
        &|c| drop(c.as_object_mut().unwrap().remove("text_config")),
        "text_config: missing",
    );
    refused("gemma3-images", &|c| c["model_type"] = "gemma3_text".into(), "missing");
    refused("qwen3", &|c| c["model_type"] = "llama".into(), "norm.weight");
    refused("mistral", &|c| c["sliding_window"] = "4096".into(), "sliding_window");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("qwen3").join(file), folder.path().join(file)).unwrap();
    }
    // The model has 59 rows; added tokens may lie beyond them.
    let write = |words: usize, added: usize| {
        let vocab: serde_json::Map<_, _> = (0..words).map(|i| (format!("w{i}"), i.into())).collect();
        let added: Vec<_> = (0..added)
            .map(|i| {
                serde_json::json!({"id": words + i, "content": format!("<{i}>"), "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": added,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
        });
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        model::load(folder.path())
    };
    let error = write(60, 0).unwrap_err().to_string();
    assert!(error.contains("60 tokens") && error.contains("only 59"), "{error}");
    let loaded = write(59, 1).unwrap();
    let run = |text: &str| {
        let ids = loaded.tokenizer.encode(text).unwrap();
        loaded.model.forward_nll(TokenBatch::new(&ids, ids.len()).unwrap(), &mut NoTap)
    };
    assert_eq!(run("w3 w58 w1").unwrap().len(), 2);
    assert!(matches!(run("w3 <0> w1"), Err(LmError::TokenId { id: 59, position: 1, vocab_size: 59 })));
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
