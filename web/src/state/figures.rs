//! Numbers as people read them.

/// A share of one in percent, with the digits that matter: `12 %`, `0.35 %`, `0.0021 %`, `0`.
#[must_use]
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "–".to_owned();
    }
    let value = share * 100.0;
    let size = value.abs();
    if size == 0.0 {
        return "0 %".to_owned();
    }
    let digits = match size {
        s if s >= 9.995 => 1,
        s if s >= 0.0995 => 2,
        s if s >= 0.000_995 => 4,
        _ => return format!("{value:.1e} %"),
    };
    format!("{value:.digits$} %")
}

/// A value to three or four significant digits.
#[must_use]
pub fn value(v: f64) -> String {
    let size = v.abs();
    if !v.is_finite() {
        "–".to_owned()
    } else if size == 0.0 {
        "0".to_owned()
    } else if !(0.001..100_000.0).contains(&size) {
        format!("{v:.2e}")
    } else if size >= 100.0 {
        format!("{v:.0}")
    } else if size >= 10.0 {
        format!("{v:.1}")
    } else if size >= 0.1 {
        format!("{v:.2}")
    } else {
        format!("{v:.4}")
    }
}

/// A whole number with thin spaces between thousands.
#[must_use]
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A number of bytes.
#[must_use]
pub fn bytes(n: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let n = n as f64;
    match n {
        n if n < 1e3 => format!("{n} B"),
        n if n < 1e6 => format!("{:.1} kB", n / 1e3),
        n if n < 1e9 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.2} GB", n / 1e9),
    }
}

/// A duration in milliseconds.
#[must_use]
pub fn milliseconds(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 2000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.1} s", ms / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_honest() {
        assert_eq!(percent(0.1234), "12.3 %");
        assert_eq!(percent(0.001), "0.10 %");
        assert_eq!(percent(0.000_02), "0.0020 %");
        assert_eq!(percent(0.0), "0 %");
        assert_eq!(percent(f64::NAN), "–");
        assert_eq!(
            (value(1.234), value(45.67), value(1234.5), value(0.0)),
            ("1.23".into(), "45.7".into(), "1234".into(), "0".into())
        );
        assert_eq!(value(1e-9), "1.00e-9");
        assert_eq!((count(999), count(1_234_567)), ("999".into(), "1\u{202f}234\u{202f}567".into()));
        assert_eq!((bytes(12), bytes(9_437_184)), ("12 B".into(), "9.4 MB".into()));
        assert_eq!((milliseconds(3.21), milliseconds(2500.0)), ("3.2 ms".into(), "2.5 s".into()));
    }
}
