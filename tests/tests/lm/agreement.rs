//! Every value the model computes, spliced and stopped, against goldens and impostors.

use super::*;

#[test]
fn every_tap_logit_and_loss_agrees_with_transformers() {
    for case in CASES {
        let expected = Expected::read(case);
        let (model, provenance) = model::load_weights(&golden(case)).unwrap();
        assert_eq!(provenance.source, case);
        assert_eq!(provenance.sha256.len(), 64);
        let found = run(&model, expected.tokens());
        assert_eq!(found.len(), 4 * model.spec().n_layers + 3);
        let (error, name) = worst(&found, &expected);
        assert!(error <= TOLERANCE, "{case}: {name} is off by {error:e}");
        let direct = model.forward_nll(expected.tokens(), &mut NoTap).unwrap();
        assert!(distance(&direct, &expected.values["nll"]) <= TOLERANCE);
    }
}

/// A mistake in reading a model, by what it is.
type Impostor = (&'static str, fn(&mut Blueprint));

const GEMMA2: [Impostor; 9] = [
    ("window ignored", |b| b.spec.attention.windows.fill(None)),
    ("window one too long", |b| b.spec.attention.windows.iter_mut().flatten().for_each(|w| *w += 1)),
    ("window on odd layers", |b| b.spec.attention.windows.rotate_left(1)),
    ("query scale from head width", |b| b.spec.attention.query_scale = 1.0 / 10f32.sqrt()),
    ("no attention soft-cap", |b| b.spec.attention.softcap = None),
    ("no final soft-cap", |b| b.spec.final_softcap = None),
    ("embedding not scaled", |b| b.spec.embed_scale = 1.0),
    ("gain without its one", |b| b.spec.norm.unit_offset = false),
    ("SiLU for GELU", |b| b.spec.mlp.activation = MlpActivation::Silu),
];
const GEMMA3: [Impostor; 6] = [
    ("global layer taken for a sliding one", |b| b.spec.attention.windows[2] = Some(5)),
    ("pattern of six layers", |b| b.spec.attention.windows.fill(Some(5))),
    ("global rotary base on sliding layers", |b| b.spec.attention.local_rope = None),
    ("local rotary base everywhere", |b| b.spec.attention.rope.base = 60.0),
    ("global frequencies not stretched", |b| b.spec.attention.rope.scaling = RopeScaling::None),
    ("sliding frequencies stretched too", |b| {
        b.spec.attention.local_rope.as_mut().unwrap().scaling = RopeScaling::Linear { factor: 4.0 };
    }),
];
const LLAMA: [Impostor; 5] = [
    ("rotary scaling ignored", |b| b.spec.attention.rope.scaling = RopeScaling::None),
    ("interleaved rotary pairs", |b| b.interleaved_rope = true),
    ("eps of another family", |b| b.spec.norm.eps = 1e-3),
    ("exact GELU for SiLU", |b| b.spec.mlp.activation = MlpActivation::Gelu),
    ("layer norm for RMS", |b| b.spec.norm.kind = NormKind::Layer),
];
const PYTHIA: [Impostor; 5] = [
    ("one after the other", |b| b.spec.parallel = false),
    ("heads not interleaved", |b| b.names.qkv = Qkv::Stacked("attention.query_key_value")),
    ("all of a head turned", |b| b.spec.attention.rope.dim = 8),
    ("tanh GELU for exact", |b| b.spec.mlp.activation = MlpActivation::GeluTanh),
    ("RMS for layer norm", |b| b.spec.norm.kind = NormKind::Rms),
];
const NEOX_SERIAL: [Impostor; 3] = [
    ("side by side", |b| b.spec.parallel = true),
    ("a quarter of a head turned", |b| b.spec.attention.rope.dim = 2),
    ("exact GELU for tanh", |b| b.spec.mlp.activation = MlpActivation::Gelu),
];
const GPT2: [Impostor; 3] = [
    ("attention not scaled by layer", |b| b.spec.attention.scale_by_layer = false),
    ("attention not scaled", |b| b.spec.attention.query_scale = 1.0),
    ("heads interleaved", |b| b.names.qkv = Qkv::HeadByHead("attn.c_attn")),
];
const OTHERS: [(&str, Impostor); 5] = [
    ("gemma3", ("no final soft-cap", |b| b.spec.final_softcap = None)),
    ("nanogpt", ("tanh GELU for exact", |b| b.spec.mlp.activation = MlpActivation::GeluTanh)),
    ("mistral", ("window ignored", |b| b.spec.attention.windows.fill(None))),
    ("qwen2", ("window on the first layer too", |b| b.spec.attention.windows.fill(Some(4)))),
    (
        "gemma3-images",
        ("stretched frequencies on sliding layers", |b| {
            b.spec.attention.local_rope = Some(b.spec.attention.rope.clone());
        }),
    ),
];

#[test]
fn impostors_are_told_apart() {
    let families = [
        ("gemma2", GEMMA2.as_slice()),
        ("gemma3", &GEMMA3),
        ("llama", &LLAMA),
        ("pythia", &PYTHIA),
        ("neox-serial", &NEOX_SERIAL),
        ("gpt2", &GPT2),
    ];
    let all = families.into_iter().flat_map(|(case, impostors)| impostors.iter().map(move |i| (case, *i)));
    for (case, (name, change)) in all.chain(OTHERS) {
        let expected = Expected::read(case);
        let mut impostor = blueprint(case);
        change(&mut impostor);
        let model = build(&impostor, &mut Memory::read(case)).unwrap();
        let (error, _) = worst(&run(&model, expected.tokens()), &expected);
        assert!(error > 10.0 * TOLERANCE, "{case}: {name} passes with {error:e}");
    }
    // Tensors that a mistaken reader would leave out.
    for (case, tensor, value) in [
        ("gemma3", "model.layers.1.self_attn.q_norm.weight", -0.5),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight", 1.0),
        ("gpt2", "transformer.wpe.weight", 0.0),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias", 0.0),
        ("pythia", "gpt_neox.layers.2.post_attention_layernorm.bias", 0.0),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias", 0.0),
        ("nanogpt-untied", "_orig_mod.lm_head.weight", 0.1),
    ] {
        let expected = Expected::read(case);
        let mut memory = Memory::read(case);
        memory.0.get_mut(tensor).unwrap().1.fill(value);
        let model = build(&blueprint(case), &mut memory).unwrap();
        let (error, _) = worst(&run(&model, expected.tokens()), &expected);
        assert!(error > 10.0 * TOLERANCE, "{case}: {tensor} is not read: {error:e}");
    }
    // Right values under the wrong layer.
    let expected = Expected::read("llama");
    for site in [Site::Resid, Site::Mlp, Site::Attn, Site::MlpIn] {
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
        assert_eq!(keep.0.len(), 5, "{:?}", keep.0.keys());
        assert!(keep.0.iter().all(|(name, values)| *values == full[name]));
        let n_layers = model.spec().n_layers;
        let beyond = model.forward(expected.tokens(), &mut NoTap, Until::Layer(n_layers));
        assert!(matches!(beyond, Err(LmError::Layer { .. })));
    }
}

#[test]
fn other_spellings_of_the_same_tensors_are_read() {
    for (case, from, to) in [
        ("gemma2", "model.", ""),
        ("gemma3-images", "model.language_model.", "language_model.model."),
        ("gemma3-images", "model.vision_tower.", "vision_tower."),
        ("pythia", "lm_head.", "embed_out."),
        ("neox-serial", "gpt_neox.", ""),
        ("gpt2", "transformer.", ""),
        ("nanogpt", "", "_orig_mod."),
    ] {
        let mut memory = Memory::default();
        for (name, tensor) in Memory::read(case).0 {
            let name = name.strip_prefix(from).map_or(name.clone(), |rest| format!("{to}{rest}"));
            memory.0.insert(name, tensor);
        }
        let expected = Expected::read(case);
        let model = build(&blueprint(case), &mut memory).unwrap();
        assert!(worst(&run(&model, expected.tokens()), &expected).0 <= TOLERANCE, "{case} with {to}");
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
    for site in [Site::Resid, Site::Mlp, Site::Attn, Site::MlpIn] {
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
fn steering_moves_the_tap_by_exactly_the_step() {
    let expected = Expected::read("pythia");
    let (model, _) = model::load_weights(&golden("pythia")).unwrap();
    let tokens = expected.tokens();
    let clean = run(&model, tokens);
    let keep: Vec<bool> = (0..tokens.n_tokens()).map(|i| i % expected.seq < 3).collect();
    for site in [Site::Embed, Site::Resid, Site::Mlp, Site::Attn, Site::MlpIn] {
        let point = TapPoint::new(site, usize::from(site != Site::Embed));
        let width = model.spec().site_width(site);
        let direction: Vec<f32> = (0..width).map(|i| (i as f32 - 9.5) * 0.25).collect();
        let steered = |strength: f32| {
            let mut kept = Keep::default();
            let mut steerer = Steerer::new(point, keep.clone(), &direction, strength);
            let logits = {
                let mut taps = Taps::new(vec![&mut steerer, &mut kept]);
                model.forward(tokens, &mut taps, Until::Logits).unwrap().unwrap()
            };
            (kept.0, logits)
        };
        let (values, logits) = steered(0.0);
        assert!(values.iter().all(|(name, values)| *values == clean[name]), "{point} by nothing");
        assert_eq!(logits, clean["logits"], "{point} by nothing");
        let (values, logits) = steered(0.5);
        let (values, before) = (&values[&point.to_string()], &clean[&point.to_string()]);
        for (i, (row, before)) in values.chunks(width).zip(before.chunks(width)).enumerate() {
            let step = if keep[i] { 0.0 } else { 0.5 };
            let wanted: Vec<f32> = before.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            assert_eq!(row, wanted, "{point}: row {i}");
        }
        let vocab = model.spec().vocab_size;
        for (i, (a, b)) in logits.chunks(vocab).zip(clean["logits"].chunks(vocab)).enumerate() {
            assert_eq!(a == b, keep[i], "{point}: logits of row {i}");
        }
        let mut narrow = Steerer::new(point, keep.clone(), &direction[1..], 1.0);
        assert!(matches!(model.forward(tokens, &mut narrow, Until::Logits), Err(LmError::Shape(_))));
        let mut short = Steerer::new(point, keep[1..].to_vec(), &direction, 1.0);
        assert!(matches!(model.forward(tokens, &mut short, Until::Logits), Err(LmError::Tap { .. })));
    }
}

#[test]
fn taps_at_one_point_see_what_those_before_made() {
    let expected = Expected::read("llama");
    let (model, _) = model::load_weights(&golden("llama")).unwrap();
    let (tokens, point) = (expected.tokens(), TapPoint::new(Site::Resid, 1));
    let keep = vec![false; tokens.n_tokens()];
    let double = |rows: Rows<'_>| Ok(rows.data().iter().map(|x| 2.0 * x).collect());
    let ones = vec![1.0; model.spec().d_model];
    let order = |steer_first: bool| {
        let (mut splice, mut kept) = (Splicer::new(point, keep.clone(), double), Keep::default());
        let mut steer = Steerer::new(point, keep.clone(), &ones, 3.0);
        let (first, second): (&mut dyn Tap, &mut dyn Tap) =
            if steer_first { (&mut steer, &mut splice) } else { (&mut splice, &mut steer) };
        model.forward(tokens, &mut Taps::new(vec![first, second, &mut kept]), Until::Layer(1)).unwrap();
        kept.0.remove(&point.to_string()).unwrap()
    };
    let clean = &run(&model, tokens)[&point.to_string()];
    assert!(order(true).iter().zip(clean).all(|(y, x)| *y == 2.0 * (x + 3.0)));
    assert!(order(false).iter().zip(clean).all(|(y, x)| *y == 2.0 * x + 3.0));
    let (mut short, mut steer) = (
        Splicer::new(point, keep.clone(), |_: Rows<'_>| Ok(vec![0.0])),
        Steerer::new(point, keep, &ones, 3.0),
    );
    let result = model.forward(tokens, &mut Taps::new(vec![&mut short, &mut steer]), Until::Logits);
    assert!(matches!(result, Err(LmError::Replacement { found: 1, .. })));
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
fn a_text_longer_than_the_learned_positions_is_refused() {
    for (case, positions) in [("gpt2", 20), ("nanogpt", 24)] {
        let (model, _) = model::load_weights(&golden(case)).unwrap();
        let run = |n: usize| {
            let ids = vec![1; n];
            model.forward(TokenBatch::new(&ids, n).unwrap(), &mut NoTap, Until::Layer(0))
        };
        run(positions).unwrap();
        let error = run(positions + 1).unwrap_err();
        assert!(matches!(error, LmError::TooLong { context_length, .. } if context_length == positions));
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
