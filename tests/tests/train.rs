//! The objectives' f64 reference: golden losses and gradients of every variant from PyTorch autograd, and finite
//! differences where a true gradient exists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use serde::Deserialize;
use shared::Rows;
use shared::loss::{
    AuxForm, AuxK, DeadPull, Examples, Gradients, Latents, MultiTopK, Objective, Parametrisation, Prefix,
    Sparsity, TrainSae,
};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    kind: String,
    d_in: usize,
    d_out: usize,
    pre_bias: bool,
    bandwidth: f64,
    parametrisation: Parametrisation,
    k: usize,
    normaliser: f64,
    sparsity: Term,
    prefixes: Vec<(usize, f64)>,
    multi: Option<(usize, f64)>,
    aux_k: Option<(usize, f64)>,
    dead_pull: Option<f64>,
    dead: Vec<bool>,
    x: Vec<f32>,
    y: Vec<f32>,
    parameters: Tensors,
    losses: GoldenLosses,
    gradients: Tensors,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Term {
    None,
    L0 { lambda: f64 },
    Target { lambda: f64, target: f64 },
    Norm { lambda: f64, p: f64, decoder_norm: bool },
}

#[derive(Deserialize)]
struct Tensors {
    w_enc: Vec<f64>,
    b_enc: Vec<f64>,
    w_dec: Vec<f64>,
    b_dec: Vec<f64>,
    #[serde(default)]
    threshold: Vec<f64>,
    #[serde(default)]
    r_mag: Vec<f64>,
    #[serde(default)]
    b_mag: Vec<f64>,
    #[serde(default)]
    w_skip: Vec<f64>,
}

#[derive(Deserialize)]
struct GoldenLosses {
    mse: f64,
    reconstruction: f64,
    sparsity: f64,
    auxiliary: f64,
    l0: f64,
}

impl Case {
    fn sae(&self) -> TrainSae {
        let p = &self.parameters;
        let latents = match self.kind.as_str() {
            "relu" => Latents::Relu,
            "jumprelu" => Latents::JumpRelu {
                threshold: p.threshold.clone(),
                parametrisation: self.parametrisation,
                bandwidth: self.bandwidth,
            },
            "gated" => Latents::Gated { r_mag: p.r_mag.clone(), b_mag: p.b_mag.clone() },
            "topk" => Latents::TopK { k: self.k },
            "batchtopk" => Latents::BatchTopK { k: self.k },
            other => panic!("{other}"),
        };
        TrainSae {
            d_in: self.d_in,
            d_out: self.d_out,
            w_enc: p.w_enc.clone(),
            b_enc: p.b_enc.clone(),
            w_dec: p.w_dec.clone(),
            b_dec: p.b_dec.clone(),
            latents,
            pre_bias: self.pre_bias,
            w_skip: (!p.w_skip.is_empty()).then(|| p.w_skip.clone()),
        }
    }

    fn objective(&self) -> Objective {
        let sparsity = match self.sparsity {
            Term::None => Sparsity::None,
            Term::L0 { lambda } => Sparsity::L0 { lambda },
            Term::Target { lambda, target } => Sparsity::TargetL0 { lambda, target },
            Term::Norm { lambda, p, decoder_norm } => Sparsity::Norm { lambda, p, decoder_norm },
        };
        let prefix = |&(n_latents, weight): &(usize, f64)| Prefix { n_latents, weight };
        let dead = || self.dead.clone();
        Objective {
            sparsity,
            prefixes: self.prefixes.iter().map(prefix).collect(),
            aux_k: self.aux_k.map(|(k, weight)| AuxK { form: AuxForm::Gao, k, weight, dead: dead() }),
            multi: self.multi.map(|(k, weight)| MultiTopK { k, weight }),
            dead_pull: self.dead_pull.map(|weight| DeadPull { weight, dead: dead() }),
            normaliser: self.normaliser,
            examples: Examples::default(),
            l0_by_layer: false,
        }
    }

    fn rows(&self) -> (Rows<'_>, Rows<'_>) {
        (Rows::new(&self.x, self.d_in).unwrap(), Rows::new(&self.y, self.d_out).unwrap())
    }
}

fn cases() -> Vec<Case> {
    let golden: Golden = serde_json::from_str(include_str!("../golden/train/train.json")).unwrap();
    assert_eq!(golden.cases.len(), 30);
    golden.cases
}

/// The largest difference of two slices relative to the largest value wanted.
fn worst(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().chain(want).all(|v| v.is_finite()));
    let scale = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0f64, |m, (g, w)| m.max((g - w).abs())) / scale
}

/// The worst deviation of losses and of each gradient of `case` from autograd's.
fn deviations(case: &Case, sae: &TrainSae, objective: &Objective) -> Vec<(&'static str, f64)> {
    let (x, y) = case.rows();
    let (losses, g) = sae.backward(x, y, objective).unwrap();
    let (got, want) = (&losses, &case.losses);
    let losses = worst(
        &[got.mse, got.reconstruction, got.sparsity, got.auxiliary, got.l0],
        &[want.mse, want.reconstruction, want.sparsity, want.auxiliary, want.l0],
    );
    let Gradients { w_enc, b_enc, w_dec, b_dec, threshold, r_mag, b_mag, w_skip } = &g;
    let want = &case.gradients;
    vec![
        ("losses", losses),
        ("w_enc", worst(w_enc, &want.w_enc)),
        ("b_enc", worst(b_enc, &want.b_enc)),
        ("w_dec", worst(w_dec, &want.w_dec)),
        ("b_dec", worst(b_dec, &want.b_dec)),
        ("threshold", worst(threshold, &want.threshold)),
        ("r_mag", worst(r_mag, &want.r_mag)),
        ("b_mag", worst(b_mag, &want.b_mag)),
        ("w_skip", worst(w_skip, &want.w_skip)),
    ]
}

#[test]
fn losses_and_gradients_of_every_variant_equal_autograd() {
    for case in cases() {
        for (name, off) in deviations(&case, &case.sae(), &case.objective()) {
            assert!(off < 1e-11, "{}, {name}: off by {off:e}", case.name);
        }
    }
}

/// A mistake in any part of an objective is seen.
#[test]
fn impostors_are_told_apart() {
    let mistakes: [(&str, fn(&mut TrainSae, &mut Objective)); 10] = [
        ("pre-bias", |sae, _| sae.pre_bias = sae.d_in == sae.d_out && sae.w_skip.is_none() && !sae.pre_bias),
        ("normaliser", |_, o| o.normaliser *= 2.0),
        ("prefixes", |_, o| o.prefixes.clear()),
        ("multi", |_, o| o.multi = None),
        ("auxk", |_, o| o.aux_k = None),
        ("dead", |_, o| o.aux_k.iter_mut().for_each(|a| a.dead.reverse())),
        ("dead pull", |_, o| o.dead_pull = None),
        ("sparsity", |_, o| o.sparsity = Sparsity::None),
        ("skip", |sae, _| sae.w_skip = None),
        ("k", |sae, _| match &mut sae.latents {
            Latents::TopK { k } | Latents::BatchTopK { k } => *k += 1,
            Latents::JumpRelu { bandwidth, .. } => *bandwidth *= 1.5,
            Latents::Gated { b_mag, .. } => b_mag[0] += 0.5,
            Latents::Relu => sae.b_enc[0] += 0.5,
        }),
    ];
    let mut seen = 0;
    for case in cases() {
        for (name, mistake) in mistakes {
            let (mut sae, mut objective) = (case.sae(), case.objective());
            mistake(&mut sae, &mut objective);
            if (&sae, &objective) == (&case.sae(), &case.objective()) {
                continue;
            }
            seen += 1;
            let (x, y) = case.rows();
            let (losses, g) = sae.backward(x, y, &objective).unwrap();
            let skip = g.w_skip.len() != case.gradients.w_skip.len();
            let off =
                (losses.total() - case.losses.reconstruction - case.losses.sparsity - case.losses.auxiliary)
                    .abs();
            let gradient =
                worst(&g.w_enc, &case.gradients.w_enc).max(worst(&g.threshold, &case.gradients.threshold));
            assert!(skip || off > 1e-6 || gradient > 1e-6, "{}: a wrong {name} passes", case.name);
        }
    }
    assert!(seen > 90, "only {seen} mistakes were tried");
}

/// Central differences agree wherever the loss has a true gradient: everywhere but at thresholds and at what is held fixed
/// (the frozen decoder of a gate, the target of AuxK).
#[test]
fn gradients_equal_finite_differences() {
    let h = 1e-6;
    for case in cases().into_iter().filter(|case| case.kind != "gated" && case.aux_k.is_none()) {
        let (x, y) = case.rows();
        let objective = case.objective();
        let (_, g) = case.sae().backward(x, y, &objective).unwrap();
        let fields: [(&str, fn(&mut TrainSae) -> Option<&mut Vec<f64>>, &[f64]); 5] = [
            ("w_enc", |s| Some(&mut s.w_enc), &g.w_enc),
            ("b_enc", |s| Some(&mut s.b_enc), &g.b_enc),
            ("w_dec", |s| Some(&mut s.w_dec), &g.w_dec),
            ("b_dec", |s| Some(&mut s.b_dec), &g.b_dec),
            ("w_skip", |s| s.w_skip.as_mut(), &g.w_skip),
        ];
        for (name, field, gradient) in fields {
            for (k, &want) in gradient.iter().enumerate() {
                let at = |shift: f64| {
                    let mut sae = case.sae();
                    field(&mut sae).unwrap()[k] += shift;
                    sae.forward(x, y, &objective).unwrap().losses.total()
                };
                let got = (at(h) - at(-h)) / (2.0 * h);
                let close = (got - want).abs() < 1e-6 * (1.0 + want.abs());
                assert!(close, "{}, {name}[{k}]: {got} against {want}", case.name);
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let case = &cases()[0];
    let (x, y) = case.rows();
    let broken: [(&str, fn(&mut TrainSae)); 4] = [
        ("w_enc", |s| s.w_enc.truncate(3)),
        ("b_dec", |s| s.b_dec.push(0.0)),
        ("threshold", |s| {
            if let Latents::JumpRelu { threshold, .. } = &mut s.latents {
                threshold.pop();
            }
        }),
        ("w_skip", |s| s.w_skip = Some(vec![0.0])),
    ];
    for (name, change) in broken {
        let mut sae = case.sae();
        change(&mut sae);
        let error = sae.forward(x, y, &case.objective()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(
        case.sae()
            .forward(Rows::new(&[], 5).unwrap(), Rows::new(&[], 5).unwrap(), &case.objective())
            .is_err()
    );
}
