//! An encoded text: which latents are active on each token, from both sides.

use shared::Codes;

/// The latents of every token of a text, strongest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    tokens: Vec<Option<Vec<(u32, f32)>>>,
    strongest: f32,
}

impl Encoded {
    /// Spreads `codes`, one row for each token that is not skipped, over all tokens; `None` when the
    /// numbers of rows differ.
    #[must_use]
    pub fn new(codes: &Codes, skip: &[bool]) -> Option<Self> {
        if codes.n_rows() != skip.iter().filter(|&&s| !s).count() {
            return None;
        }
        let mut rows = codes.iter();
        let tokens: Vec<Option<Vec<(u32, f32)>>> = skip
            .iter()
            .map(|&skipped| {
                let (latents, values) = if skipped { return None } else { rows.next()? };
                let mut active: Vec<(u32, f32)> =
                    latents.iter().copied().zip(values.iter().copied()).collect();
                active.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                Some(active)
            })
            .collect();
        let strongest = tokens.iter().flatten().flatten().map(|a| a.1).fold(0.0, f32::max);
        Some(Self { tokens, strongest })
    }

    /// The number of tokens, skipped ones included.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whether a token was left out (special, or the first position).
    #[must_use]
    pub fn skipped(&self, token: usize) -> bool {
        matches!(self.tokens.get(token), Some(None))
    }

    /// The active latents of a token, strongest first.
    #[must_use]
    pub fn token(&self, token: usize) -> &[(u32, f32)] {
        self.tokens.get(token).and_then(Option::as_deref).unwrap_or_default()
    }

    /// The largest activation of all.
    #[must_use]
    pub fn strongest(&self) -> f32 {
        self.strongest
    }

    /// The activation of one latent on every token; zero where it is not active.
    #[must_use]
    pub fn latent(&self, latent: u32) -> Vec<f32> {
        let on = |t: usize| self.token(t).iter().find(|a| a.0 == latent).map_or(0.0, |a| a.1);
        (0..self.n_tokens()).map(on).collect()
    }

    /// The strongest activation on every token.
    #[must_use]
    pub fn peaks(&self) -> Vec<f32> {
        (0..self.n_tokens()).map(|t| self.token(t).first().map_or(0.0, |a| a.1)).collect()
    }

    /// Every latent active anywhere with its largest activation, strongest first.
    #[must_use]
    pub fn overall(&self) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = self.tokens.iter().flatten().flatten().copied().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        all.dedup_by_key(|a| a.0);
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }

    /// Mean number of active latents on the tokens that were encoded.
    #[must_use]
    pub fn mean_l0(&self) -> f64 {
        let encoded = self.tokens.iter().flatten();
        let (n, active) = encoded.fold((0usize, 0usize), |(n, active), t| (n + 1, active + t.len()));
        #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
        let mean = active as f64 / n.max(1) as f64;
        mean
    }
}

/// The token that an arrow key leads to; `None` when the key is another one.
#[must_use]
pub fn step(key: &str, token: usize, n_tokens: usize) -> Option<usize> {
    let last = n_tokens.checked_sub(1)?;
    match key {
        "ArrowRight" | "ArrowDown" => Some((token + 1).min(last)),
        "ArrowLeft" | "ArrowUp" => Some(token.saturating_sub(1)),
        "Home" => Some(0),
        "End" => Some(last),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::CodesBuilder;

    fn encoded() -> Encoded {
        let mut builder = CodesBuilder::new(10);
        for row in [&[(3, 1.0), (5, 2.0)][..], &[], &[(3, 4.0)]] {
            for &(latent, value) in row {
                builder.push(latent, value);
            }
            builder.end_row().unwrap();
        }
        Encoded::new(&builder.finish(), &[true, false, false, false]).unwrap()
    }

    #[test]
    fn both_sides_agree() {
        let encoded = encoded();
        assert_eq!((encoded.n_tokens(), encoded.strongest()), (4, 4.0));
        assert!(encoded.skipped(0) && !encoded.skipped(1) && !encoded.skipped(9));
        assert_eq!(encoded.token(1), [(5, 2.0), (3, 1.0)]);
        assert_eq!(encoded.latent(3), [0.0, 1.0, 0.0, 4.0]);
        assert_eq!(encoded.peaks(), [0.0, 2.0, 0.0, 4.0]);
        assert_eq!(encoded.overall(), [(3, 4.0), (5, 2.0)]);
        assert_eq!(encoded.mean_l0(), 1.0);
        assert_eq!(Encoded::new(&CodesBuilder::new(2).finish(), &[false]), None);
    }

    #[test]
    fn arrows_stay_inside() {
        assert_eq!((step("ArrowRight", 3, 4), step("ArrowLeft", 0, 4)), (Some(3), Some(0)));
        assert_eq!((step("Home", 2, 4), step("End", 2, 4), step("x", 2, 4)), (Some(0), Some(3), None));
        assert_eq!(step("End", 0, 0), None);
    }
}
