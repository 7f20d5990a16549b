//! The order of the data: shards in a seeded order each epoch, rows reshuffled within each loaded shard.
//!
//! Both follow from the seed, the epoch and the shard alone, so a position is three numbers and resuming
//! needs nothing else.

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::normalise::Normalisation;
use super::source::ActivationSource;

/// Where the next row comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Passes over all data completed.
    pub epoch: u64,
    /// Shards of this epoch completed.
    pub shard: usize,
    /// Rows of the current shard used.
    pub row: usize,
}

/// Endless batches of normalised rows from a source, in a seeded order, from any position.
pub struct Batches<'a> {
    source: &'a dyn ActivationSource,
    normalisation: &'a Normalisation,
    seed: u64,
    position: Position,
    /// Vectors of the current shard and the order of its rows, once loaded.
    loaded: Option<(Vec<f32>, Vec<u32>)>,
}

impl<'a> Batches<'a> {
    /// Starts at `position`.
    #[must_use]
    pub fn new(
        source: &'a dyn ActivationSource,
        normalisation: &'a Normalisation,
        seed: u64,
        position: Position,
    ) -> Self {
        Self { source, normalisation, seed, position, loaded: None }
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Fills `out` with `n_rows` rows divided by the scalar C; outliers are passed over.
    ///
    /// # Errors
    /// If a shard cannot be read or holds no rows.
    pub fn fill(&mut self, n_rows: usize, out: &mut Vec<f32>) -> Result<()> {
        let width = self.source.width();
        #[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
        let inverse = (1.0 / self.normalisation.scale) as f32;
        out.clear();
        let mut empty_shards = 0;
        while out.len() < n_rows * width {
            let (vectors, rows) = match self.loaded.take() {
                Some(loaded) => loaded,
                None => self.load()?,
            };
            let wanted = n_rows - out.len() / width;
            let end = rows.len().min(self.position.row + wanted);
            for &row in &rows[self.position.row.min(end)..end] {
                let start = row as usize * width;
                out.extend(vectors[start..start + width].iter().map(|v| v * inverse));
            }
            self.position.row = end;
            empty_shards = if rows.is_empty() { empty_shards + 1 } else { 0 };
            ensure!(empty_shards <= self.source.n_shards(), "no shard holds a vector that can be trained on");
            if end < rows.len() {
                self.loaded = Some((vectors, rows));
            } else {
                self.advance();
            }
        }
        Ok(())
    }

    fn advance(&mut self) {
        self.position.row = 0;
        self.position.shard += 1;
        if self.position.shard >= self.source.n_shards() {
            self.position = Position { epoch: self.position.epoch + 1, ..Position::default() };
        }
    }

    fn load(&self) -> Result<(Vec<f32>, Vec<u32>)> {
        let mut shards: Vec<usize> = (0..self.source.n_shards()).collect();
        ensure!(self.position.shard < shards.len(), "there is no shard {} to train on", self.position.shard);
        shards.shuffle(&mut self.rng(u64::MAX));
        let shard = shards[self.position.shard];
        let vectors = self.source.read(shard)?;
        let width = self.source.width();
        ensure!(
            !vectors.is_empty() && vectors.len().is_multiple_of(width),
            "shard {shard} holds no whole rows"
        );
        let n_rows = u32::try_from(vectors.len() / width)?;
        let mut rows: Vec<u32> = (0..n_rows)
            .zip(vectors.chunks_exact(width))
            .filter(|(_, vector)| self.normalisation.keeps(vector))
            .map(|(row, _)| row)
            .collect();
        rows.shuffle(&mut self.rng(shard as u64));
        Ok((vectors, rows))
    }

    /// A generator for this epoch and `stream`.
    fn rng(&self, stream: u64) -> ChaCha8Rng {
        let mut seed = [0u8; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&self.position.epoch.to_le_bytes());
        seed[16..24].copy_from_slice(&stream.to_le_bytes());
        ChaCha8Rng::from_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use shared::format::SaeMetadata;

    /// Three shards of 4, 3 and 5 rows; row `r` of shard `s` holds `10 s + r` twice.
    struct Three(Value);

    impl ActivationSource for Three {
        fn width(&self) -> usize {
            2
        }
        fn scale(&self) -> f64 {
            0.5
        }
        fn mean(&self) -> &[f32] {
            &[0.0; 2]
        }
        fn n_vectors(&self) -> u64 {
            12
        }
        fn n_shards(&self) -> usize {
            3
        }
        fn read(&self, shard: usize) -> Result<Vec<f32>> {
            Ok((0..[4, 3, 5][shard]).flat_map(|row| [(10 * shard + row) as f32; 2]).collect())
        }
        fn held_out(&self, _: usize) -> Result<Vec<f32>> {
            Ok(Vec::new())
        }
        fn provenance(&self) -> &Value {
            &self.0
        }
        fn metadata(&self) -> SaeMetadata {
            SaeMetadata::default()
        }
    }

    fn plain() -> Normalisation {
        Normalisation { scale: 0.5, mean: vec![0.0; 2], limit: f64::INFINITY }
    }

    fn rows(batches: &mut Batches<'_>, n: usize) -> Vec<f32> {
        let mut out = Vec::new();
        batches.fill(n, &mut out).unwrap();
        out.chunks_exact(2).map(|row| row[0] / 2.0).collect()
    }

    #[test]
    fn every_epoch_holds_every_row_once_in_another_order() {
        let (source, plain) = (Three(Value::Null), plain());
        let mut batches = Batches::new(&source, &plain, 1, Position::default());
        let (first, second) = (rows(&mut batches, 12), rows(&mut batches, 12));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_by(f32::total_cmp);
            assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0, 23.0, 24.0]);
        }
        assert_eq!(batches.position(), Position { epoch: 2, shard: 0, row: 0 });
        assert_ne!(rows(&mut Batches::new(&source, &plain, 2, Position::default()), 12), {
            rows(&mut Batches::new(&source, &plain, 1, Position::default()), 12)
        });
    }

    #[test]
    fn outliers_are_passed_over() {
        let source = Three(Value::Null);
        let some = Normalisation { limit: 15.0, ..plain() };
        let mut epoch = rows(&mut Batches::new(&source, &some, 1, Position::default()), 5);
        epoch.sort_by(f32::total_cmp);
        assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0]);
        let none = Normalisation { limit: -1.0, ..plain() };
        assert!(Batches::new(&source, &none, 1, Position::default()).fill(1, &mut Vec::new()).is_err());

        // The first shard has norms 0, 1, 2, 3 times √2; the upper median is 2.
        let measured = Normalisation::measure(&source, 1.25).unwrap();
        assert!((measured.limit - 2.5 * 2f64.sqrt()).abs() < 1e-9);
        assert_eq!(measured.mean, [1.0, 1.0]);
        assert!((measured.scale - (10.0f64 / 3.0).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn any_position_can_be_resumed() {
        let (source, plain) = (Three(Value::Null), plain());
        let mut whole = Batches::new(&source, &plain, 7, Position::default());
        let all = rows(&mut whole, 40);
        let mut done = 0;
        let mut position = Position::default();
        for n in [1, 5, 2, 9, 11, 12] {
            let mut part = Batches::new(&source, &plain, 7, position);
            assert_eq!(rows(&mut part, n), all[done..done + n]);
            (done, position) = (done + n, part.position());
        }
    }
}
