//! What the sieve keeps against the f32 product alone, bit for bit; and that a bound that is too small would be noticed.

use super::super::encode::{Cuts, Encoded, Keep, Selection, encode_through};
use super::super::params::{Latents, Tensors};
use super::*;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..6).map(|_| uniform() - 0.5).sum::<f32>() * 2f32.sqrt()
    }
}

/// An encoder of `n` latents over `d` values and a batch, each value of them scaled by `scale(its number)`.
fn inputs(n: usize, d: usize, n_rows: usize, scale: impl Fn(usize) -> [f32; 2]) -> (Params, Vec<f32>) {
    let mut noise = Noise(7);
    let mut tensors = Tensors::zeros(n, d, d, false);
    tensors.w_enc = (0..n * d).map(|i| noise.next() * scale(i)[0]).collect();
    tensors.b_enc = (0..n).map(|_| noise.next() * 0.05).collect();
    let input = (0..n_rows * d).map(|i| noise.next() * scale(i)[1]).collect();
    (
        Params { d_in: d, d_out: d, tensors, latents: Latents::Relu, pre_bias: false, encoder_bias: true },
        input,
    )
}

/// The bits of everything that was kept.
fn bits(found: &Encoded) -> Vec<(usize, u32, u32)> {
    let of = |kept: &super::super::encode::Kept, part: usize| {
        let rows = 0..kept.n_rows();
        rows.flat_map(|row| {
            kept.row(row).iter().map(move |c| (2 * row + part, c.latent, c.z.to_bits())).collect::<Vec<_>>()
        })
        .collect::<Vec<_>>()
    };
    [of(&found.kept, 0), of(&found.dead, 1)].concat()
}

/// Both ways for several selections; the share of pre-activations that was computed again in each.
fn compare(name: &str, params: &Params, input: &[f32], quantile: f32) -> Vec<f64> {
    let n = params.n_latents();
    let n_rows = input.len() / params.d_in;
    let sieve = Sieve::new(params, input).unwrap().unwrap();
    let all = encode_through(
        params,
        input,
        Selection { keep: Keep::Above(Cuts::of_latents(&vec![f32::NEG_INFINITY; n])), dead: None },
        None,
    );
    // A cut that is exactly one of the latent's own values, so that "above" has to be decided to the last bit.
    let mut values = vec![Vec::new(); n];
    all.unwrap().kept.all().iter().for_each(|c| values[c.latent as usize].push(c.z));
    let exact: Vec<f32> = values
        .iter_mut()
        .map(|values| {
            values.sort_by(f32::total_cmp);
            let at = (quantile * values.len() as f32) as usize;
            values.get(at.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
        })
        .collect();
    let just_below: Vec<f32> = exact.iter().map(|cut| cut.next_down()).collect();
    let dead: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
    // Rows in turn of three layers with cuts of their own.
    let layers: Vec<u16> = [0, 1, 2].into_iter().cycle().take(n_rows).collect();
    let by_layer: Vec<f32> = exact.iter().flat_map(|&cut| [cut, cut.next_down(), 0.7 * cut]).collect();
    let zeros = vec![0.0; n];
    let selections = [
        Selection { keep: Keep::Above(Cuts::of_latents(&exact)), dead: None },
        Selection { keep: Keep::Above(Cuts::of_latents(&just_below)), dead: Some((&dead, 4)) },
        Selection { keep: Keep::Above(Cuts::of_latents(&zeros)), dead: None },
        Selection { keep: Keep::Largest(5), dead: Some((&dead, 3)) },
        Selection { keep: Keep::Above(Cuts::of_layers(&by_layer, 3, &layers)), dead: None },
        Selection { keep: Keep::Largest(1), dead: None },
        Selection { keep: Keep::Largest(0), dead: Some((&dead, 0)) },
    ];
    let shares = selections.iter().enumerate().map(|(i, selection)| {
        let plain = encode_through(params, input, *selection, None).unwrap();
        let sieved = encode_through(params, input, *selection, Some(&sieve)).unwrap();
        assert!(bits(&plain) == bits(&sieved), "{name}, selection {i}");
        assert_eq!(plain.effort.again, 0);
        sieved.effort.again as f64 / (n_rows * n) as f64
    });
    shares.collect()
}

#[test]
fn what_is_kept_has_the_bits_of_f32() {
    if !has_bf16() {
        return;
    }
    for (n, d, n_rows) in [(300, 96, 200), (70, 33, 49), (1100, 7, 5), (64, 1600, 60), (130, 2, 193)] {
        let (params, input) = inputs(n, d, n_rows, |_| [0.2, 1.0]);
        compare(&format!("{n} × {d} × {n_rows}"), &params, &input, 0.97);
    }
    let (n, d, n_rows) = (300, 96, 200);
    // Two large values in every row, as residual streams have them.
    let heavy = |i: usize| [0.2, if i % 96 < 2 { 300.0 } else { 1.0 }];
    let huge = |i: usize| [if i % 96 == 5 { 1e20 } else { 0.2 }, if i / 96 == 3 { 1e25 } else { 1.0 }];
    let tiny = |i: usize| [1e-39, if i.is_multiple_of(5) { 1e-20 } else { 1.0 }];
    let tinier = |i: usize| [1e-22, if i / 96 < 50 { 1e-20 } else { 1e-38 }];
    let scales: [(&str, &dyn Fn(usize) -> [f32; 2]); 4] =
        [("heavy", &heavy), ("huge", &huge), ("tiny", &tiny), ("tinier", &tinier)];
    for (name, scale) in scales {
        let (mut params, input) = inputs(n, d, n_rows, scale);
        if name.starts_with("tin") {
            params.tensors.b_enc.fill(0.0);
        }
        compare(name, &params, &input, 0.97);
    }
    // Equal latents tie everywhere.
    let (mut params, input) = inputs(n, d, n_rows, |_| [0.2, 1.0]);
    params.tensors.w_enc.copy_within(0..96 * 150, 96 * 150);
    params.tensors.b_enc.copy_within(0..150, 150);
    compare("ties", &params, &input, 0.97);
    // What is not a number is kept or not as before.
    let (mut params, mut input) = inputs(n, d, n_rows, |_| [0.2, 1.0]);
    params.tensors.w_enc[96 * 9 + 4] = f32::NAN;
    params.tensors.w_enc[96 * 11 + 4] = f32::INFINITY;
    params.tensors.w_enc[96 * 12] = f32::MAX;
    (input[96 * 20], input[96 * 30]) = (f32::NEG_INFINITY, f32::NAN);
    compare("broken", &params, &input, 0.97);
}

#[test]
fn little_is_computed_again() {
    if !has_bf16() {
        return;
    }
    let (params, input) = inputs(1024, 576, 192, |_| [1.0 / 24.0, 1.0]);
    let shares = compare("usual", &params, &input, 0.99);
    // One in a hundred is kept; a bound twice as wide as need be would show.
    assert!(shares[0] > 0.01 && shares[0] < 0.018, "{shares:?}");
    assert!(shares[3] < 0.03, "{shares:?}");
}

#[test]
fn a_sieve_that_trusts_bf16_is_found_out() {
    if !has_bf16() {
        return;
    }
    let (params, input) = inputs(1024, 96, 192, |_| [0.2, 1.0]);
    let cuts = vec![4.0; 1024];
    let dead = vec![true; 1024];
    for selection in [
        Selection { keep: Keep::Above(Cuts::of_latents(&cuts)), dead: None },
        Selection { keep: Keep::Largest(8), dead: None },
        Selection { keep: Keep::Above(Cuts::of_latents(&[f32::INFINITY; 1024])), dead: Some((&dead, 8)) },
    ] {
        let plain = bits(&encode_through(&params, &input, selection, None).unwrap());
        assert!(!plain.is_empty());
        let mut trusting = Sieve::new(&params, &input).unwrap().unwrap();
        assert!(plain == bits(&encode_through(&params, &input, selection, Some(&trusting)).unwrap()));
        trusting.slack.fill(0.0);
        trusting.kept.fill(0.0);
        assert!(plain != bits(&encode_through(&params, &input, selection, Some(&trusting)).unwrap()));
    }
}

#[test]
fn no_bf16_value_is_further_off_than_its_bound() {
    if !has_bf16() {
        return;
    }
    for d in [2, 33, 96, 1600] {
        let (params, input) = inputs(64, d, 48, |i| [0.2, if i % 7 == 0 { 20.0 } else { 1.0 }]);
        let sieve = Sieve::new(&params, &input).unwrap().unwrap();
        let mut scratch = Scratch::default();
        sieve.product(&params.tensors.w_enc, d, &(0..48), &mut scratch);
        let mut tightest = f64::INFINITY;
        for latent in 0..64 {
            for at in 0..48 {
                let (w, x) = (row(&params.tensors.w_enc, latent, d), row(&input, at, d));
                let exact: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                let bound = f64::from(sieve.slack[at] * sieve.latents.whole[latent])
                    + f64::from(sieve.kept[at] * sieve.latents.lost[latent]);
                let off = (f64::from(scratch.z[latent * 48 + at]) - exact).abs();
                assert!(off <= bound, "d {d}: off by {off:e}, bound {bound:e}");
                tightest = tightest.min(bound / off);
            }
        }
        // With two values the bound is nearly reached.
        assert!(d > 2 || tightest < 1.5, "d {d}: {tightest}");
    }
}

#[test]
fn every_layer_has_cuts_of_its_own() {
    let (n, n_rows) = (150, 130);
    let (params, input) = inputs(n, 40, n_rows, |_| [0.2, 1.0]);
    let layers: Vec<u16> = (0..n_rows).map(|row| [2, 0, 1, 2][row % 4]).collect();
    let mut noise = Noise(3);
    let cuts: Vec<f32> = (0..n * 3).map(|_| 1.0 + noise.next()).collect();
    let run = |cuts: Cuts<'_>| {
        let selection = Selection { keep: Keep::Above(cuts), dead: None };
        encode_through(&params, &input, selection, None).unwrap().kept
    };
    let (all, own) =
        (run(Cuts::of_latents(&vec![f32::NEG_INFINITY; n])), run(Cuts::of_layers(&cuts, 3, &layers)));
    let mut n_kept = 0;
    for row in 0..n_rows {
        let above = |c: &&Candidate| c.z > cuts[c.latent as usize * 3 + usize::from(layers[row])];
        let wanted: Vec<Candidate> = all.row(row).iter().filter(above).copied().collect();
        assert_eq!(own.row(row), wanted, "row {row}");
        n_kept += wanted.len();
    }
    assert!((1000..n * n_rows - 1000).contains(&n_kept), "{n_kept}");
}
