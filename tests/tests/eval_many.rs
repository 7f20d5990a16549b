//! Several autoencoders measured at once are each measured as if alone, and a transcoder is put where it writes: against a
//! plain loop over the tiny language model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use native::evaluate::{EvalReport, Options, evaluate, evaluate_all};
use native::harvest::{self, Inputs};
use native::model::{self, LoadedModel};
use native::sae_files::SaeFile;
use native::stop::StopFlag;
use native::store::{Split, Store};
use shared::format::SaeMetadata;
use shared::lm::{LmError, NoTap, Tap, TapAction, TokenBatch};
use shared::tap::TapPoint;
use shared::{Activation, RowScaling, Rows, Sae, SaeParts, reference};
use support::prepare;

const OPTIONS: Options = Options { sequences: 6, density_tokens: 500 };

fn point(text: &str) -> TapPoint {
    text.parse().unwrap()
}

/// Random weights of `n` latents, with a skip connection when it is a transcoder.
fn random(d: usize, n: usize, input: &str, target: Option<&str>) -> SaeFile {
    let mut stream = conformance::fixture_pack::Stream::new(n as u64);
    let mut draw = |len: usize| (0..len).map(|_| 0.3 * stream.signed()).collect::<Vec<f32>>();
    let parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc: draw(n * d),
        b_enc: draw(n),
        w_dec: draw(n * d),
        b_dec: draw(d),
        activation: Activation::JumpRelu { threshold: vec![0.05; n] },
        w_skip: target.map(|_| draw(d * d)),
        rows: RowScaling::None,
    };
    let metadata =
        SaeMetadata { tap: Some(point(input)), target: target.map(point), ..SaeMetadata::default() };
    SaeFile { sae: Sae::new(parts).unwrap(), metadata }
}

/// Encodes at one tap and writes at another, where a token is not kept.
struct ByHand<'a> {
    file: &'a SaeFile,
    kept: &'a [bool],
    read: Vec<f32>,
}

impl Tap for ByHand<'_> {
    fn wants(&self, at: TapPoint) -> bool {
        Some(at) == self.file.metadata.tap || Some(at) == self.file.metadata.target
    }

    fn visit(&mut self, at: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        if Some(at) == self.file.metadata.tap {
            self.read = value.data().to_vec();
        }
        if at != self.file.metadata.target.unwrap_or(self.file.metadata.tap.unwrap()) {
            return Ok(TapAction::Keep);
        }
        let x = Rows::new(&self.read, value.width()).unwrap();
        let codes = reference::encode(&self.file.sae, x).unwrap();
        let written = reference::decode(&self.file.sae, x, &codes).unwrap();
        let rows = value.data().chunks(value.width()).zip(written.chunks(value.width())).zip(self.kept);
        Ok(TapAction::Replace(
            rows.flat_map(|((own, new), kept)| if *kept { own } else { new }).copied().collect(),
        ))
    }
}

fn by_hand(file: &SaeFile, store: &Store, model: &LoadedModel) -> f64 {
    let tokens = store.tokens(Split::HeldOut).unwrap();
    let length = tokens.sequence_length;
    let ids = &tokens.ids[..OPTIONS.sequences * length];
    let keeps = |i: usize| !store.manifest().keeps(i % length, ids[i]);
    let kept: Vec<bool> = (0..ids.len()).map(keeps).collect();
    let batch = TokenBatch::new(ids, length).unwrap();
    let mut tap = ByHand { file, kept: &kept, read: Vec::new() };
    let losses = model.model.forward_nll(batch, &mut tap).unwrap();
    let counted = |i: &usize| {
        let t = i / (length - 1) * length + i % (length - 1);
        !kept[t] && !kept[t + 1]
    };
    let counted: Vec<f64> = (0..losses.len()).filter(counted).map(|i| f64::from(losses[i])).collect();
    counted.iter().sum::<f64>() / counted.len() as f64
}

#[test]
fn each_is_measured_as_if_alone_and_where_it_writes() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = prepare(folder.path());
    settings.taps = ["resid.0", "resid.1", "mlp_in.1", "mlp.1", "attn.0"].map(str::to_owned).to_vec();
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let out = folder.path().join("store");
    harvest::run(&settings, &out, &Inputs::of(&loaded, &settings).unwrap(), &StopFlag::default()).unwrap();
    let store = Store::open(&out).unwrap();
    let width = |tap: &str| store.tap(point(tap)).unwrap().width;
    let d = loaded.model.spec().d_model;
    let files = [
        random(d, 40, "resid.1", None),
        random(d, 24, "mlp_in.1", Some("mlp.1")),
        random(width("attn.0"), 30, "attn.0", None),
        random(d, 12, "resid.0", None),
    ];
    let stop = StopFlag::default();
    let all = evaluate_all(&files, &store, Some(&loaded), &OPTIONS, &stop).unwrap();
    for (file, report) in files.iter().zip(&all) {
        assert_eq!(evaluate(file, &store, Some(&loaded), &OPTIONS, &stop).unwrap(), *report);
        let splice = report.splice.as_ref().unwrap();
        let expected = by_hand(file, &store, &loaded);
        assert!((splice.ce_spliced - expected).abs() < 1e-5, "{}: {expected}, {splice:?}", report.tap);
        assert!((splice.ce_spliced - splice.ce_clean).abs() > 1e-3, "a random autoencoder must hurt");
        let again: EvalReport = serde_json::from_slice(&serde_json::to_vec(report).unwrap()).unwrap();
        assert_eq!((again.tap, again.target), (report.tap, report.target));
    }
    assert_eq!(all[1].target, Some(point("mlp.1")));
    // The FVU of a transcoder is of what it writes.
    let mut squares = 0.0;
    let read = |tap: &str| -> Vec<f32> {
        let n = store.n_shards(Split::HeldOut);
        (0..n).flat_map(|i| store.read_shard(point(tap), Split::HeldOut, i).unwrap().vectors).collect()
    };
    let (x, y) = (read("mlp_in.1"), read("mlp.1"));
    let x = Rows::new(&x, d).unwrap();
    let sae = &files[1].sae;
    let rebuilt = reference::decode(sae, x, &reference::encode(sae, x).unwrap()).unwrap();
    for column in 0..d {
        let values: Vec<f64> = y.iter().skip(column).step_by(d).map(|v| f64::from(*v)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        squares += values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    }
    let errors = y.iter().zip(&rebuilt).map(|(y, r)| (f64::from(*y) - f64::from(*r)).powi(2)).sum::<f64>();
    let fvu = all[1].reconstruction.fvu.unwrap();
    assert!((fvu - errors / squares).abs() < 1e-6 * fvu, "{fvu} against {}", errors / squares);

    // Beside one that leaves out long vectors, another is measured without them too.
    let mut strict = random(d, 24, "mlp_in.1", None);
    let mut norms: Vec<f64> = x.iter().map(|x| reference::dot(x, x).sqrt()).collect();
    norms.sort_by(f64::total_cmp);
    strict.metadata.provenance.insert("max_input_norm".to_owned(), norms[norms.len() / 2].into());
    let open = random(d, 30, "mlp_in.1", None);
    let both = evaluate_all(&[strict.clone(), open.clone()], &store, None, &OPTIONS, &stop).unwrap();
    let [alone, strict_alone] =
        [&open, &strict].map(|file| evaluate(file, &store, None, &OPTIONS, &stop).unwrap());
    assert_eq!(both[0], strict_alone);
    assert!(both[1].n_outliers == strict_alone.n_outliers && alone.n_outliers == 0);
    assert_eq!(both[1].reconstruction.variance, strict_alone.reconstruction.variance);

    let mut lost = random(d, 24, "mlp_in.1", Some("mlp.0"));
    assert!(format!("{:#}", evaluate(&lost, &store, None, &OPTIONS, &stop).unwrap_err()).contains("mlp.0"));
    lost.metadata.target = None;
    assert!(evaluate(&lost, &store, None, &OPTIONS, &stop).is_ok());
}

#[test]
fn going_on_from_a_block_is_running_through_it() {
    let folder = tempfile::tempdir().unwrap();
    let loaded = model::load(prepare(folder.path()).model.as_ref()).unwrap();
    let ids: Vec<u32> = (0..48).map(|i| 3 + (i * 37) % 98).collect();
    let tokens = TokenBatch::new(&ids, 16).unwrap();
    let whole = loaded.model.forward_nll(tokens, &mut NoTap).unwrap();
    struct Grab(TapPoint, Vec<f32>);
    impl Tap for Grab {
        fn wants(&self, at: TapPoint) -> bool {
            at == self.0
        }
        fn visit(&mut self, _: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
            self.1 = value.data().to_vec();
            Ok(TapAction::Keep)
        }
    }
    let d = loaded.model.spec().d_model;
    for (tap, first) in [("embed.0", 0), ("resid.0", 1), ("resid.1", 2)] {
        let mut grab = Grab(point(tap), Vec::new());
        loaded.model.forward_nll(tokens, &mut grab).unwrap();
        let residual = Rows::new(&grab.1, d).unwrap();
        let rest = loaded.model.forward_nll_from(tokens, residual, first, &mut NoTap).unwrap();
        assert_eq!(rest, whole, "from block {first}");
        let short = Rows::new(&grab.1[d..], d).unwrap();
        assert!(loaded.model.forward_nll_from(tokens, short, first, &mut NoTap).is_err());
    }
}
