//! The conformance suite on the CPU backends, and on impostors it must reject.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::convert::Infallible;

use conformance::impostor::{Fault, Impostor};
use conformance::suite;
use native::cpu::CpuBackend;
use shared::cpu::ScalarBackend;
use shared::reference::Reference;

#[test]
fn the_reference_conforms() {
    let report = pollster::block_on(suite::run(async |sae| Ok::<_, Infallible>(Reference::new(sae))));
    assert!(report.passed(), "{report}");
    assert!(report.checks.len() > 150, "only {} checks ran", report.checks.len());
}

#[test]
fn the_portable_backend_conforms() {
    let report = pollster::block_on(suite::run(async |sae| Ok::<_, Infallible>(ScalarBackend::new(sae))));
    assert!(report.passed(), "{report}");
}

#[test]
fn the_fast_backend_conforms() {
    let report = pollster::block_on(suite::run(async |sae| Ok::<_, Infallible>(CpuBackend::new(sae))));
    assert!(report.passed(), "{report}");
}

#[test]
fn every_impostor_is_rejected() {
    for fault in Fault::ALL {
        let report = pollster::block_on(suite::run(async |sae| Impostor::new(sae, fault)));
        assert!(!report.passed(), "{fault:?} passed {} checks", report.checks.len());
        // A fault of rows or of the skip connection is noticed where there is such a thing, and nowhere else.
        let special = (fault as usize) >= (Fault::SkipIgnored as usize);
        let words = ["skip", "standardised", "norm"];
        let elsewhere = report.failures().find(|check| !words.iter().any(|word| check.name.contains(word)));
        assert!(!special || elsewhere.is_none(), "{fault:?} was rejected for something else: {elsewhere:?}");
        let built = report.checks.iter().all(|check| !check.name.ends_with("build"));
        assert!(built, "{fault:?} was rejected for not building: {report}");
    }
}
