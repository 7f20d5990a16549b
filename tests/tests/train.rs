//! Training: golden losses and gradients, the sparse step against the dense reference, and resuming.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use serde::Deserialize;
use shared::Rows;
use shared::loss::{Losses, Parametrisation, Sparsity, TrainSae};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    d_in: usize,
    parametrisation: Parametrisation,
    pre_bias: bool,
    bandwidth: f64,
    lambda: f64,
    target: Option<f64>,
    x: Vec<f32>,
    parameters: Tensors,
    losses: GoldenLosses,
    gradients: Tensors,
}

#[derive(Deserialize)]
struct Tensors {
    w_enc: Vec<f64>,
    b_enc: Vec<f64>,
    w_dec: Vec<f64>,
    b_dec: Vec<f64>,
    threshold: Vec<f64>,
}

#[derive(Deserialize)]
struct GoldenLosses {
    mse: f64,
    sparsity: f64,
    l0: f64,
}

impl Case {
    fn sae(&self) -> TrainSae {
        TrainSae {
            d_in: self.d_in,
            w_enc: self.parameters.w_enc.clone(),
            b_enc: self.parameters.b_enc.clone(),
            w_dec: self.parameters.w_dec.clone(),
            b_dec: self.parameters.b_dec.clone(),
            threshold: self.parameters.threshold.clone(),
            parametrisation: self.parametrisation,
            pre_bias: self.pre_bias,
        }
    }

    fn sparsity(&self) -> Sparsity {
        match self.target {
            None => Sparsity::Fixed { lambda: self.lambda },
            Some(target) => Sparsity::Target { lambda: self.lambda, target },
        }
    }
}

fn cases() -> Vec<Case> {
    let golden: Golden = serde_json::from_str(include_str!("../golden/train/train.json")).unwrap();
    assert_eq!(golden.cases.len(), 8);
    golden.cases
}

/// The largest difference of two slices relative to the largest value wanted.
fn worst(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    assert!(!want.is_empty() && got.iter().chain(want).all(|v| v.is_finite()));
    let scale = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0f64, |m, (g, w)| m.max((g - w).abs())) / scale
}

#[test]
fn reference_losses_and_gradients_equal_autograd() {
    for (i, case) in cases().iter().enumerate() {
        let x = Rows::new(&case.x, case.d_in).unwrap();
        let (losses, g) = case.sae().backward(x, &case.sparsity(), case.bandwidth).unwrap();
        let Losses { mse, sparsity, l0 } = losses;
        assert!(
            worst(&[mse, sparsity, l0], &[case.losses.mse, case.losses.sparsity, case.losses.l0]) < 1e-13
        );
        let want = &case.gradients;
        for (name, got, want) in [
            ("w_enc", &g.w_enc, &want.w_enc),
            ("b_enc", &g.b_enc, &want.b_enc),
            ("w_dec", &g.w_dec, &want.w_dec),
            ("b_dec", &g.b_dec, &want.b_dec),
            ("threshold", &g.threshold, &want.threshold),
        ] {
            let worst = worst(got, want);
            assert!(worst < 1e-12, "case {i}, {name}: off by {worst:e}");
        }
    }
}

/// Where the loss has a true gradient, central differences agree (the loss is quadratic in each single
/// parameter, so they are exact as long as no latent crosses its threshold).
#[test]
fn reference_gradients_equal_finite_differences() {
    let h = 1e-6;
    for case in cases() {
        let x = Rows::new(&case.x, case.d_in).unwrap();
        let sparsity = case.sparsity();
        let (_, g) = case.sae().backward(x, &sparsity, case.bandwidth).unwrap();
        let fields: [(&str, fn(&mut TrainSae) -> &mut Vec<f64>, &[f64]); 4] = [
            ("w_enc", |s| &mut s.w_enc, &g.w_enc),
            ("b_enc", |s| &mut s.b_enc, &g.b_enc),
            ("w_dec", |s| &mut s.w_dec, &g.w_dec),
            ("b_dec", |s| &mut s.b_dec, &g.b_dec),
        ];
        for (name, field, gradient) in fields {
            for (k, &want) in gradient.iter().enumerate() {
                let at = |shift: f64| {
                    let mut sae = case.sae();
                    field(&mut sae)[k] += shift;
                    sae.forward(x, &sparsity).unwrap().losses.mse
                };
                let got = (at(h) - at(-h)) / (2.0 * h);
                assert!((got - want).abs() < 1e-7 * (1.0 + want.abs()), "{name}[{k}]: {got} against {want}");
            }
        }
    }
}
