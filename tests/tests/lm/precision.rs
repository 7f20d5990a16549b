//! The same goldens in bf16 and in 8-bit integers: near enough, and not secretly f32.

use shared::Precision;

use super::*;

/// ‖Δ‖/‖reference‖ of the worst value: random weights this small lose more than trained ones.
const LIMITS: [(Precision, f64, f64); 2] = [(Precision::Bf16, 2e-4, 0.05), (Precision::Q8_0, 4e-4, 0.15)];

#[test]
fn lower_precision_is_near_and_really_lower() {
    for case in CASES {
        let expected = Expected::read(case);
        for (precision, least, most) in LIMITS {
            let (model, provenance) = model::load_weights_as(&golden(case), precision).unwrap();
            assert_eq!(provenance.precision, precision);
            let (error, name) = worst(&run(&model, expected.tokens()), &expected);
            assert!((least..most).contains(&error), "{case} in {precision}: {name} is off by {error:e}");
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let expected = Expected::read("llama");
    for precision in Precision::ALL {
        let (model, _) = model::load_weights_as(&golden("llama"), precision).unwrap();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&model, expected.tokens()))
        };
        let one = on(1);
        assert!(one == on(2) && one == on(5), "{precision}");
    }
}
