//! Comparators that cannot pass by accident: empty, unequal and non-finite inputs are failures, not agreement.

use std::fmt;

use shared::Codes;

/// Two arrays that agree, and how closely.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// How many values were compared.
    pub n: usize,
    /// Where they differ most.
    pub worst: usize,
    /// The part of the tolerance used up there, in `[0, 1]`.
    pub share: f64,
}

/// Why two things do not agree.
#[derive(Debug, Clone, PartialEq)]
pub enum Disagreement {
    /// Nothing to compare.
    Empty,
    /// Different sizes.
    Length {
        /// What the oracle has.
        expected: usize,
        /// What the backend gave.
        found: usize,
    },
    /// A value that is not a finite number, on either side.
    NotFinite {
        /// Where.
        index: usize,
        /// The oracle's value.
        expected: f32,
        /// The backend's value.
        found: f32,
    },
    /// A difference beyond the tolerance; the worst one.
    Beyond {
        /// Where.
        index: usize,
        /// The oracle's value.
        expected: f32,
        /// The backend's value.
        found: f32,
        /// The difference in units of the tolerance.
        share: f64,
    },
    /// A row with other active latents.
    ActiveSet {
        /// Which row.
        row: usize,
        /// The first latent active on one side only.
        latent: u32,
        /// Whether the oracle has it active.
        expected_active: bool,
    },
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("nothing to compare"),
            Self::Length { expected, found } => write!(f, "{found} values where {expected} were expected"),
            Self::NotFinite { index, expected, found } => {
                write!(f, "not finite at {index}: expected {expected}, found {found}")
            }
            Self::Beyond { index, expected, found, share } => {
                write!(f, "at {index} expected {expected}, found {found}: {share:.1} times the tolerance")
            }
            Self::ActiveSet { row, latent, expected_active } => {
                let (is, should) = if *expected_active { ("silent", "active") } else { ("active", "silent") };
                write!(f, "row {row}: latent {latent} is {is} and should be {should}")
            }
        }
    }
}

impl std::error::Error for Disagreement {}

/// Compares value by value: `|found − expected| ≤ tolerance · max(1, max|expected|)`.
///
/// # Errors
/// On empty input, different lengths, a value that is not finite on either side, or a difference beyond the tolerance.
pub fn close(expected: &[f32], found: &[f32], tolerance: f64) -> Result<Agreement, Disagreement> {
    if expected.len() != found.len() {
        return Err(Disagreement::Length { expected: expected.len(), found: found.len() });
    }
    if expected.is_empty() {
        return Err(Disagreement::Empty);
    }
    let mut scale = 1.0f64;
    for (index, (&expected, &found)) in expected.iter().zip(found).enumerate() {
        if !expected.is_finite() || !found.is_finite() {
            return Err(Disagreement::NotFinite { index, expected, found });
        }
        scale = scale.max(f64::from(expected.abs()));
    }
    let mut agreement = Agreement { n: expected.len(), worst: 0, share: 0.0 };
    for (index, (&expected, &found)) in expected.iter().zip(found).enumerate() {
        let difference = (f64::from(found) - f64::from(expected)).abs();
        // A tolerance of zero asks for equality.
        let share = if difference == 0.0 { 0.0 } else { difference / (tolerance * scale) };
        if share > agreement.share {
            (agreement.worst, agreement.share) = (index, share);
        }
    }
    let Agreement { worst: index, share, .. } = agreement;
    if share <= 1.0 {
        Ok(agreement)
    } else {
        Err(Disagreement::Beyond { index, expected: expected[index], found: found[index], share })
    }
}

/// Compares sparse codes: the same rows, the same active latents in each, and [`close`] values.
///
/// Codes with rows but without a single active latent on both sides agree; codes without rows do not.
///
/// # Errors
/// On different sizes, no rows, another active set, or values that are not close.
pub fn same_codes(expected: &Codes, found: &Codes, tolerance: f64) -> Result<Agreement, Disagreement> {
    for (expected, found) in [(expected.n_latents(), found.n_latents()), (expected.n_rows(), found.n_rows())]
    {
        if expected != found {
            return Err(Disagreement::Length { expected, found });
        }
    }
    if expected.n_rows() == 0 {
        return Err(Disagreement::Empty);
    }
    for (row, ((expected, _), (found, _))) in expected.iter().zip(found.iter()).enumerate() {
        let only = |a: &[u32], b: &[u32]| a.iter().copied().find(|latent| !b.contains(latent));
        if let Some(latent) = only(expected, found) {
            return Err(Disagreement::ActiveSet { row, latent, expected_active: true });
        }
        if let Some(latent) = only(found, expected) {
            return Err(Disagreement::ActiveSet { row, latent, expected_active: false });
        }
    }
    if expected.n_active() == 0 {
        return Ok(Agreement { n: 0, worst: 0, share: 0.0 });
    }
    let values = |codes: &Codes| codes.iter().flat_map(|(_, values)| values.to_vec()).collect::<Vec<f32>>();
    close(&values(expected), &values(found), tolerance)
}

#[cfg(test)]
mod tests {
    use shared::CodesBuilder;

    use super::*;

    fn codes(n: usize, rows: &[&[(u32, f32)]]) -> Codes {
        let mut builder = CodesBuilder::new(n);
        for row in rows {
            for &(latent, value) in *row {
                builder.push(latent, value);
            }
            builder.end_row().unwrap();
        }
        builder.finish()
    }

    #[test]
    fn equal_values_agree_and_the_worst_index_is_reported() {
        let agreement = close(&[1.0, 2.0, 4.0], &[1.0, 2.000_01, 4.0], 1e-5).unwrap();
        assert_eq!((agreement.n, agreement.worst), (3, 1));
        assert!((agreement.share - 0.25).abs() < 0.01, "{agreement:?}");
    }

    #[test]
    fn empty_unequal_and_non_finite_inputs_are_failures() {
        assert_eq!(close(&[], &[], 1.0), Err(Disagreement::Empty));
        assert!(matches!(close(&[1.0], &[1.0, 2.0], 1.0), Err(Disagreement::Length { .. })));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(matches!(close(&[bad], &[bad], 1.0), Err(Disagreement::NotFinite { .. })));
            assert!(matches!(close(&[0.0], &[bad], 1.0), Err(Disagreement::NotFinite { .. })));
        }
    }

    #[test]
    fn differences_beyond_the_tolerance_fail_on_small_and_large_values() {
        assert!(matches!(close(&[0.0], &[2e-5], 1e-5), Err(Disagreement::Beyond { .. })));
        assert!(close(&[100.0], &[100.000_9], 1e-5).is_ok());
        assert!(matches!(close(&[100.0], &[100.002], 1e-5), Err(Disagreement::Beyond { index: 0, .. })));
        assert!(close(&[1.0], &[1.0], 0.0).is_ok());
        assert!(close(&[1.0], &[1.000_000_1], 0.0).is_err());
    }

    #[test]
    fn codes_must_have_the_same_rows_latents_and_values() {
        let a = codes(4, &[&[(0, 1.0), (3, 2.0)], &[]]);
        assert_eq!(same_codes(&a, &a, 0.0).unwrap().n, 2);
        let missing = same_codes(&a, &codes(4, &[&[(0, 1.0)], &[]]), 1.0);
        assert_eq!(missing, Err(Disagreement::ActiveSet { row: 0, latent: 3, expected_active: true }));
        let extra = same_codes(&a, &codes(4, &[&[(0, 1.0), (3, 2.0)], &[(1, 1e-9)]]), 1.0);
        assert_eq!(extra, Err(Disagreement::ActiveSet { row: 1, latent: 1, expected_active: false }));
        assert!(same_codes(&a, &codes(4, &[&[(0, 1.0), (3, 2.1)], &[]]), 1e-5).is_err());
        assert!(same_codes(&a, &codes(5, &[&[(0, 1.0), (3, 2.0)], &[]]), 1e-5).is_err());
        assert!(same_codes(&a, &codes(4, &[&[(0, 1.0), (3, 2.0)]]), 1e-5).is_err());
        assert_eq!(same_codes(&codes(4, &[]), &codes(4, &[]), 1.0), Err(Disagreement::Empty));
        let silent = codes(4, &[&[], &[]]);
        assert_eq!(same_codes(&silent, &silent, 0.0).unwrap().n, 0);
    }
}
