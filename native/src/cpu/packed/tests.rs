//! Packed products against f64 sums of the same rounded operands, at awkward shapes.

use super::*;

const FORMATS: [Format; 3] = [Format::F32, Format::Bf16, Format::Q8];

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// What a format makes of rows `[_, width]`.
fn rounded(format: Format, x: &[f32], width: usize) -> Vec<f32> {
    let (mut groups, mut out) = (Vec::new(), vec![0.0; x.len()]);
    format.stage(x, width, 0, width, &mut groups);
    let rows = out.chunks_exact_mut(width).zip(groups.chunks_exact(format.groups(width)));
    rows.for_each(|(out, groups)| format.unstage(groups, out));
    out
}

/// `x Wᵀ` in f64 and the sum of the terms' magnitudes.
fn reference(x: &[f32], w: &[f32], k: usize) -> Vec<(f64, f64)> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        terms.fold((0.0, 0.0), |(sum, size): (f64, f64), term| (sum + term, size + term.abs()))
    };
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn products_are_sums_of_rounded_operands_at_any_shape() {
    for format in FORMATS {
        let Some(kernel) = Kernel::find(format) else { continue };
        for (m, k, n) in [
            (1, 1, 1),
            (1, 33, 5),
            (3, 64, 1),
            (8, 32, 48),
            (7, 31, 47),
            (9, 97, 49),
            (70, 130, 100),
            (40, 2400, 17),
        ] {
            let (x, w) = (values(m * k, 1), values(n * k, 2));
            let packed = PackedMatrix::new(kernel, &w, n, k).unwrap();
            let wanted = reference(&rounded(format, &x, k), &rounded(format, &w, k), k);
            let mut out = vec![f32::NAN; m * n];
            packed.product(&x, &mut out, false).unwrap();
            for (found, (wanted, size)) in out.iter().zip(&wanted) {
                // f32 sums of 2400 terms in a few long chains: well under 1e-6 of the terms' size.
                assert!((f64::from(*found) - wanted).abs() <= 1e-6 * size, "{format:?} {m}×{k}×{n}");
            }
            let mut twice = out.clone();
            packed.product(&x, &mut twice, true).unwrap();
            for (twice, (wanted, size)) in twice.iter().zip(&wanted) {
                assert!(
                    (f64::from(*twice) - 2.0 * wanted).abs() <= 3e-6 * size,
                    "{format:?} {m}×{k}×{n} added"
                );
            }
        }
    }
}

#[test]
fn formats_differ_as_they_should() {
    let (m, k, n) = (16, 256, 64);
    let (x, w) = (values(m * k, 3), values(n * k, 4));
    let exact = reference(&x, &w, k);
    for (format, least, most) in
        [(Format::F32, 0.0, 1e-6), (Format::Bf16, 1e-4, 5e-3), (Format::Q8, 1e-3, 2e-2)]
    {
        let Some(kernel) = Kernel::find(format) else { continue };
        let mut out = vec![0.0; m * n];
        PackedMatrix::new(kernel, &w, n, k).unwrap().product(&x, &mut out, false).unwrap();
        let off: f64 = out.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b.0).powi(2)).sum();
        let error = (off / exact.iter().map(|b| b.0 * b.0).sum::<f64>()).sqrt();
        assert!((least..most).contains(&error), "{format:?}: {error}");
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads_and_in_any_company() {
    for format in FORMATS {
        let Some(kernel) = Kernel::find(format) else { continue };
        let (m, k, n) = (150, 1700, 130);
        let (x, w) = (values(m * k, 5), values(n * k, 6));
        let packed = PackedMatrix::new(kernel, &w, n, k).unwrap();
        for add in [false, true] {
            let product = |threads, rows: Range<usize>| {
                in_pool(threads, || {
                    let mut out = vec![0.25; rows.len() * n];
                    packed.product(&x[rows.start * k..rows.end * k], &mut out, add).unwrap();
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                })
            };
            let all = product(1, 0..m);
            assert_eq!(all, product(3, 0..m));
            assert_eq!(all, product(40, 0..m));
            assert_eq!(all[17 * n..22 * n], product(2, 17..22));
        }
    }
}

#[test]
fn rows_come_back_as_they_are_held() {
    for format in FORMATS {
        let Some(kernel) = Kernel::find(format) else { continue };
        for (n, k) in [(100, 1700), (1, 5), (48, 64)] {
            let w = values(n * k, 7);
            let packed = PackedMatrix::new(kernel, &w, n, k).unwrap();
            let wanted = rounded(format, &w, k);
            for (i, wanted) in wanted.chunks_exact(k).enumerate() {
                let mut row = vec![0.0; k];
                packed.row(i, &mut row);
                assert_eq!(row, wanted, "{format:?} row {i}");
            }
        }
    }
}

#[test]
fn wrong_lengths_are_refused_and_a_nan_is_not_hidden() {
    for format in FORMATS {
        let Some(kernel) = Kernel::find(format) else { continue };
        assert!(PackedMatrix::new(kernel, &[0.0; 5], 2, 3).is_err());
        let packed = PackedMatrix::new(kernel, &[1.0; 6], 2, 3).unwrap();
        assert!(packed.product(&[0.0; 4], &mut [0.0; 2], false).is_err());
        assert!(packed.product(&[0.0; 6], &mut [0.0; 3], false).is_err());
        let mut out = [0.0; 4];
        packed.product(&[1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0], &mut out, false).unwrap();
        assert!(out[0].is_nan() && out[1].is_nan() && out[2] > 2.9 && out[3] > 2.9, "{format:?}: {out:?}");
    }
}
