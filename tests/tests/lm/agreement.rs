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
