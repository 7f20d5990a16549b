//! Numbers as people write them: `300k`, `1.5M`, `5%`.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// A whole number that may be written with a suffix: `300k` (10³), `1.5M` (10⁶), `2G` or `2B` (10⁹), `1_000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Count(pub u64);

/// Text that is no [`Count`] or no [`Portion`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not {expected}")]
pub struct QuantityError {
    found: String,
    expected: &'static str,
}

const COUNT: &str = "a whole number such as 2048, 300k, 1.5M or 2G";
const PORTION: &str = "a share such as 0.05 or 5%, or a number of tokens such as 15k";

impl FromStr for Count {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError { found: text.to_owned(), expected: COUNT };
        let plain: String = text.chars().filter(|c| *c != '_').collect();
        let (digits, zeros) = match plain.char_indices().last() {
            Some((at, 'k' | 'K')) => (&plain[..at], 3),
            Some((at, 'M' | 'm')) => (&plain[..at], 6),
            Some((at, 'G' | 'B' | 'g' | 'b')) => (&plain[..at], 9),
            _ => (plain.as_str(), 0),
        };
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !all_digits(whole) || !all_digits(part) || part.len() > zeros {
            return Err(error());
        }
        // Decimal places are shifted, not multiplied in floating point: 1.1M is exactly 1100000.
        format!("{whole}{part:0<zeros$}").parse().map(Self).map_err(|_| error())
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(COUNT)
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Count, E> {
                Ok(Count(value))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Count, E> {
                u64::try_from(value).map(Count).map_err(|_| E::custom(format_args!("{value} is not {COUNT}")))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Count, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

/// A part of a whole: a share in `[0, 1)`, or a number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Portion {
    /// A share of the whole, at least 0 and below 1.
    Share(f64),
    /// A number of units.
    Tokens(Count),
}

impl Portion {
    /// How many of `total` this is, rounded to nearest for a share.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "totals are far below 2^53 and the share is below 1"
    )]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Share(share) => (share * total as f64).round() as u64,
            Self::Tokens(count) => count.0,
        }
    }
}

impl FromStr for Portion {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError { found: text.to_owned(), expected: PORTION };
        if let Ok(count) = text.parse() {
            return Ok(Self::Tokens(count));
        }
        let share = match text.strip_suffix('%') {
            Some(percent) => percent.parse::<f64>().map(|p| p / 100.0),
            None => text.parse(),
        };
        match share {
            Ok(share) if (0.0..1.0).contains(&share) => Ok(Self::Share(share)),
            _ => Err(error()),
        }
    }
}

impl<'de> Deserialize<'de> for Portion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = Portion;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(PORTION)
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Portion, E> {
                Ok(Portion::Tokens(Count(value)))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Portion, E> {
                let count =
                    u64::try_from(value).map_err(|_| E::custom(format_args!("{value} is not {PORTION}")))?;
                Ok(Portion::Tokens(Count(count)))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Portion, E> {
                let share = (0.0..1.0).contains(&value).then_some(Portion::Share(value));
                share.ok_or_else(|| E::custom(format_args!("{value} is not {PORTION}")))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Portion, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        for (text, value) in [
            ("0", 0),
            ("2048", 2048),
            ("300k", 300_000),
            ("1.5M", 1_500_000),
            ("1.1M", 1_100_000),
            ("2G", 2_000_000_000),
            ("1_000", 1000),
        ] {
            assert_eq!(text.parse(), Ok(Count(value)), "{text}");
        }
        for text in ["", "k", "-1", "1.5", "1.0001k", "1e3", "300 k", "99999999999999999999", "é", "0x10"] {
            assert!(text.parse::<Count>().is_err(), "{text}");
        }
    }

    #[test]
    fn portions() {
        assert_eq!("0.05".parse(), Ok(Portion::Share(0.05)));
        assert_eq!("5%".parse(), Ok(Portion::Share(0.05)));
        assert_eq!("15k".parse(), Ok(Portion::Tokens(Count(15_000))));
        assert_eq!((Portion::Share(0.05).of(300_000), Portion::Tokens(Count(9)).of(300_000)), (15_000, 9));
        for text in ["1.5", "-0.1", "nan", "100%", "inf", ""] {
            assert!(text.parse::<Portion>().is_err(), "{text}");
        }
    }
}
