//! A text across the layers of a multi-layer autoencoder: who is active where, and the rows of the maps drawn from it.

use shared::Codes;
use shared::pack::flow::{Effect, FlowText};

/// The codes of a text at every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Flow {
    n_layers: usize,
    n_tokens: usize,
    codes: Codes,
    skip: Vec<bool>,
    errors: Vec<f32>,
    effects: Vec<Effect>,
}

/// A row of a map: a latent and its activation in each column.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The latent.
    pub latent: u32,
    /// Its activations; zero where it is not active.
    pub values: Vec<f32>,
}

impl Row {
    /// The column that its activation is centred on.
    #[must_use]
    pub fn mean_column(&self) -> f64 {
        let (mut sum, mut moment, mut column) = (0.0, 0.0, 0.0);
        for &value in &self.values {
            (sum, moment) = (sum + f64::from(value), moment + column * f64::from(value));
            column += 1.0;
        }
        if sum > 0.0 { moment / sum } else { 0.0 }
    }
}

impl Flow {
    /// What the pack says about a text.
    #[must_use]
    pub fn of(text: &FlowText) -> Self {
        let n_tokens = text.tokens.len();
        Self {
            n_layers: text.codes.n_rows() / n_tokens.max(1),
            n_tokens,
            codes: text.codes.clone(),
            skip: text.skip.clone(),
            errors: text.errors.clone(),
            effects: text.effects.clone(),
        }
    }

    /// The same text with codes that were computed anew, a row for each token and layer, skipped ones included; `None` when
    /// they are of other sizes.
    #[must_use]
    pub fn with_codes(self, codes: Codes) -> Option<Self> {
        let fits = codes.n_rows() == self.codes.n_rows() && codes.n_latents() == self.codes.n_latents();
        fits.then_some(Self { codes, ..self })
    }

    /// How many (layer, token) cells have another active set than in `other`.
    #[must_use]
    pub fn n_different(&self, other: &Self) -> usize {
        self.codes.iter().zip(other.codes.iter()).filter(|(a, b)| a.0 != b.0).count()
    }

    /// Number of layers.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Whether a token is not encoded at a layer.
    #[must_use]
    pub fn skipped(&self, layer: usize, token: usize) -> bool {
        self.cell(layer, token).and_then(|cell| self.skip.get(cell)).copied().unwrap_or(true)
    }

    /// The active latents of a token at a layer (ascending) and their activations.
    #[must_use]
    pub fn at(&self, layer: usize, token: usize) -> (&[u32], &[f32]) {
        self.cell(layer, token).map_or((&[], &[]), |cell| self.codes.row(cell))
    }

    /// The active latents of a token at a layer, strongest first.
    #[must_use]
    pub fn strongest(&self, layer: usize, token: usize) -> Vec<(u32, f32)> {
        let (latents, values) = self.at(layer, token);
        let mut all: Vec<(u32, f32)> = latents.iter().copied().zip(values.iter().copied()).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }

    /// The activation of a latent on a token at a layer.
    #[must_use]
    pub fn value(&self, latent: u32, layer: usize, token: usize) -> f32 {
        let (latents, values) = self.at(layer, token);
        latents.binary_search(&latent).map_or(0.0, |at| values[at])
    }

    /// What the reconstruction of a token misses at each layer, `[L]`.
    #[must_use]
    pub fn errors(&self, token: usize) -> Vec<f32> {
        (0..self.n_layers).map(|l| self.cell(l, token).map_or(0.0, |cell| self.errors[cell])).collect()
    }

    /// What the reconstruction misses at each layer, as the mean over the tokens that are encoded there, `[L]`.
    #[must_use]
    pub fn mean_errors(&self) -> Vec<f32> {
        let mean = |layer: usize| {
            let kept = (0..self.n_tokens).filter(|&token| !self.skipped(layer, token));
            let (n, sum) =
                kept.fold((0.0, 0.0), |(n, sum), t| (n + 1.0, sum + self.errors[layer * self.n_tokens + t]));
            if n > 0.0 { sum / n } else { 0.0 }
        };
        (0..self.n_layers).map(mean).collect()
    }

    /// Mean number of active latents of the vectors that were encoded.
    #[must_use]
    pub fn mean_l0(&self) -> f64 {
        let n = self.skip.iter().filter(|skip| !**skip).count().max(1);
        #[expect(clippy::cast_precision_loss, reason = "a few hundred thousand")]
        let mean = self.codes.n_active() as f64 / n as f64;
        mean
    }

    /// The activation of a latent everywhere, layer by layer, `[L · t]`.
    #[must_use]
    pub fn latent(&self, latent: u32) -> Vec<f32> {
        let on = |row: (&[u32], &[f32])| row.0.binary_search(&latent).map_or(0.0, |at| row.1[at]);
        self.codes.iter().map(on).collect()
    }

    /// The `most` latents with the largest activation of a token at any layer, each with its activation at every layer, by the
    /// layer they are centred on.
    #[must_use]
    pub fn of_token(&self, token: usize, most: usize) -> Vec<Row> {
        let mut rows = self.rows((0..self.n_layers).map(|layer| self.at(layer, token)), most);
        rows.sort_by(|a, b| a.mean_column().total_cmp(&b.mean_column()).then(a.latent.cmp(&b.latent)));
        rows
    }

    /// The `most` latents with the largest activation of a layer at any token, each with its activation on every token, largest
    /// first.
    #[must_use]
    pub fn of_layer(&self, layer: usize, most: usize) -> Vec<Row> {
        self.rows((0..self.n_tokens).map(|token| self.at(layer, token)), most)
    }

    fn rows<'c>(
        &self,
        columns: impl ExactSizeIterator<Item = (&'c [u32], &'c [f32])>,
        most: usize,
    ) -> Vec<Row> {
        let n_columns = columns.len();
        let mut all: Vec<(u32, usize, f32)> = Vec::new();
        for (column, (latents, values)) in columns.enumerate() {
            all.extend(latents.iter().zip(values).map(|(&latent, &value)| (latent, column, value)));
        }
        all.sort_by_key(|entry| (entry.0, entry.1));
        let mut rows: Vec<(f32, Row)> = Vec::new();
        for group in all.chunk_by(|a, b| a.0 == b.0) {
            let mut values = vec![0.0; n_columns];
            group.iter().for_each(|&(_, column, value)| values[column] = value);
            rows.push((values.iter().copied().fold(0.0, f32::max), Row { latent: group[0].0, values }));
        }
        rows.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.latent.cmp(&b.1.latent)));
        rows.truncate(most);
        rows.into_iter().map(|row| row.1).collect()
    }

    /// What was tried by removing `latent` from this text.
    #[must_use]
    pub fn effect(&self, latent: u32) -> Option<&Effect> {
        self.effects.iter().find(|effect| effect.latent == latent)
    }

    /// The token with the largest activation at `layer`, and its latent; the first token where nothing is active.
    #[must_use]
    pub fn peak(&self, layer: usize) -> (usize, Option<u32>) {
        let each = (0..self.n_tokens)
            .filter_map(|token| Some((token, self.strongest(layer, token).first().copied()?)));
        let best = each.max_by(|a, b| a.1.1.total_cmp(&b.1.1).then(b.0.cmp(&a.0)));
        best.map_or((0, None), |(token, (latent, _))| (token, Some(latent)))
    }

    fn cell(&self, layer: usize, token: usize) -> Option<usize> {
        (layer < self.n_layers && token < self.n_tokens).then(|| layer * self.n_tokens + token)
    }
}

/// The place in a range of `n` that an arrow key leads to from `at`; `None` when the key is another one.
#[must_use]
pub fn step(key: &str, (on, back): (&str, &str), at: usize, n: usize) -> Option<usize> {
    match key {
        _ if n == 0 => None,
        key if key == on => Some((at + 1).min(n - 1)),
        key if key == back => Some(at.saturating_sub(1)),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use shared::CodesBuilder;
    use shared::pack::flow::Change;

    /// Three layers of two tokens, the first token skipped at the first layer.
    pub(in crate::state) fn flow() -> Flow {
        let mut builder = CodesBuilder::new(9);
        for row in
            [&[][..], &[(1, 2.0), (4, 1.0)], &[(1, 1.0)], &[(1, 4.0), (7, 8.0)], &[(4, 3.0)], &[(7, 0.5)]]
        {
            row.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row().unwrap();
        }
        Flow::of(&FlowText {
            tokens: vec![1, 2],
            skip: vec![true, false, false, false, false, false],
            codes: builder.finish(),
            errors: vec![0.0, 0.5, 0.25, 0.75, 1.0, 0.0],
            effects: vec![Effect {
                latent: 7,
                layer: 1,
                removed: 8.0,
                changes: vec![Change { layer: 2, latent: 4, before: 3.0, after: 0.0 }],
            }],
        })
    }

    #[test]
    fn cells_agree_from_all_sides() {
        let flow = flow();
        assert_eq!((flow.n_layers(), flow.n_tokens()), (3, 2));
        assert!(flow.skipped(0, 0) && !flow.skipped(0, 1) && flow.skipped(3, 0));
        assert_eq!(flow.strongest(1, 1), [(7, 8.0), (1, 4.0)]);
        assert_eq!((flow.value(1, 1, 1), flow.value(1, 2, 1), flow.value(1, 9, 9)), (4.0, 0.0, 0.0));
        assert_eq!(flow.latent(1), [0.0, 2.0, 1.0, 4.0, 0.0, 0.0]);
        assert_eq!((flow.errors(1), flow.mean_errors()), (vec![0.5, 0.75, 0.0], vec![0.5, 0.5, 0.5]));
        assert_eq!(flow.mean_l0(), 7.0 / 5.0);
        assert_eq!((flow.peak(1), flow.peak(0), flow.peak(5)), ((1, Some(7)), (1, Some(1)), (0, None)));
        assert_eq!((flow.effect(7).map(|e| e.layer), flow.effect(1)), (Some(1), None));
    }

    #[test]
    fn rows_are_the_strongest_in_their_order() {
        let flow = flow();
        let rows = |rows: Vec<Row>| rows.into_iter().map(|r| (r.latent, r.values)).collect::<Vec<_>>();
        // Of token 1: latent 1 is centred on layer 2/3, latent 7 near layer 1, latent 4 at 0.
        let wanted = [(4, vec![1.0, 0.0, 0.0]), (1, vec![2.0, 4.0, 0.0]), (7, vec![0.0, 8.0, 0.5])];
        assert_eq!(rows(flow.of_token(1, 9)), wanted);
        assert_eq!(rows(flow.of_token(1, 2)), wanted[1..]);
        assert_eq!(rows(flow.of_layer(1, 9)), [(7, vec![0.0, 8.0]), (1, vec![1.0, 4.0])]);
        assert!(flow.of_layer(7, 9).iter().all(|row| row.values == [0.0, 0.0]));
    }

    #[test]
    fn codes_computed_anew_are_compared() {
        let flow = flow();
        assert_eq!(flow.clone().with_codes(CodesBuilder::new(9).finish()), None);
        let mut builder = CodesBuilder::new(9);
        for (latents, _) in flow.codes.iter() {
            latents.iter().for_each(|&latent| builder.push(latent, 0.5));
            builder.end_row().unwrap();
        }
        let again = flow.clone().with_codes(builder.finish()).unwrap();
        assert_eq!(again.n_different(&flow), 0, "values are not compared, only who is active");
        let mut none = CodesBuilder::new(9);
        (0..6).for_each(|_| none.end_row().unwrap());
        assert_eq!(flow.clone().with_codes(none.finish()).unwrap().n_different(&flow), 5);
    }

    #[test]
    fn arrows_stay_inside() {
        let keys = ("ArrowUp", "ArrowDown");
        assert_eq!((step("ArrowUp", keys, 2, 3), step("ArrowDown", keys, 0, 3)), (Some(2), Some(0)));
        assert_eq!(
            (step("ArrowUp", keys, 0, 3), step("x", keys, 0, 3), step("ArrowUp", keys, 0, 0)),
            (Some(1), None, None)
        );
    }
}
