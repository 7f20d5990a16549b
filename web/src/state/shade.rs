//! Activations as the strength of one colour, weak enough that text stays readable on it.

/// Weakest tint of an activation above zero.
pub const FLOOR: f64 = 0.08;
/// Strongest tint; with the colours of `style.css` text on it keeps a contrast of at least 4.5.
pub const CAP: f64 = 0.85;

/// The strength of the tint for an activation, relative to the largest: `log10(1 + 9 r)`, so that weak
/// activations stay visible. Zero for what is not active.
#[must_use]
pub fn strength(value: f32, largest: f32) -> f64 {
    if value.is_nan() || value <= 0.0 || largest <= 0.0 {
        return 0.0;
    }
    let r = (f64::from(value) / f64::from(largest)).min(1.0);
    FLOOR + (CAP - FLOOR) * (1.0 + 9.0 * r).log10()
}

/// The length of the bar under a token: linear, in percent, so that it says what the tint cannot.
#[must_use]
pub fn bar(value: f32, largest: f32) -> f64 {
    if value.is_nan() || value <= 0.0 || largest <= 0.0 {
        return 0.0;
    }
    100.0 * (f64::from(value) / f64::from(largest)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strength_rises_within_its_bounds() {
        assert_eq!((strength(0.0, 2.0), strength(-1.0, 2.0), strength(1.0, 0.0)), (0.0, 0.0, 0.0));
        assert!(strength(1e-6, 2.0) >= FLOOR);
        assert!((strength(2.0, 2.0) - CAP).abs() < 1e-12 && (strength(9.0, 2.0) - CAP).abs() < 1e-12);
        assert!(strength(0.5, 2.0) < strength(1.0, 2.0));
        assert_eq!((bar(1.0, 2.0), bar(f32::NAN, 2.0)), (50.0, 0.0));
    }

    /// The colour `name` of a theme: `name: light-dark(#light, #dark);` in the style sheet.
    fn colour(theme: usize, name: &str) -> [f64; 3] {
        let css = include_str!("../../style.css");
        let pair = css.split_once(&format!("{name}: light-dark(")).unwrap_or_else(|| panic!("{name}")).1;
        let value =
            pair.split(['(', ')', ',']).nth(theme).expect("two colours").trim().trim_start_matches('#');
        [0, 2, 4].map(|i| f64::from(u8::from_str_radix(&value[i..i + 2], 16).expect("a colour")) / 255.0)
    }

    fn luminance(rgb: [f64; 3]) -> f64 {
        let [r, g, b] = rgb.map(|c| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) });
        0.2126 * r + 0.7152 * g + 0.0722 * b
    }

    fn contrast(a: [f64; 3], b: [f64; 3]) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    fn mix(under: [f64; 3], over: [f64; 3], alpha: f64) -> [f64; 3] {
        std::array::from_fn(|i| under[i] * (1.0 - alpha) + over[i] * alpha)
    }

    #[test]
    fn text_on_the_strongest_tint_is_readable_in_both_themes() {
        for theme in [0, 1] {
            let colour = |name| colour(theme, name);
            for ground in ["--bg", "--panel"] {
                let ground = colour(ground);
                for tint in ["--act", "--neg"] {
                    for step in 0..=10u8 {
                        let on = mix(ground, colour(tint), CAP * f64::from(step) / 10.0);
                        let ratio = contrast(colour("--fg"), on);
                        assert!(ratio >= 4.5, "theme {theme} {tint} step {step}: {ratio:.2}");
                    }
                }
                for text in ["--fg", "--quiet", "--accent", "--warn"] {
                    let ratio = contrast(colour(text), ground);
                    assert!(ratio >= 4.5, "theme {theme} {text}: {ratio:.2}");
                }
            }
        }
    }
}
