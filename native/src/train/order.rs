//! The order of the data: shards in a seeded order each epoch, rows reshuffled within each loaded shard.
//!
//! Both follow from the seed, the epoch and the shard alone, so a position is three numbers and resuming
//! needs nothing else.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::normalise::Normalisation;
use super::source::ActivationSource;

/// Where the next row comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Passes over all data completed.
    pub epoch: u64,
    /// Shards of this epoch completed.
    pub shard: usize,
    /// Rows of the current shard used.
    pub row: usize,
}

/// The vectors of a shard, raw, and the order of those that are trained on.
type Loaded = (Arc<Vec<f32>>, Vec<u32>);

/// Batches of normalised rows from a source, in a seeded order, from any position. While one shard is used, the next is
/// read on another thread.
pub struct Batches<'a> {
    source: Arc<dyn ActivationSource>,
    normalisation: &'a Normalisation,
    seed: u64,
    position: Position,
    loaded: Option<Loaded>,
    /// The shard being read ahead of time.
    ahead: Option<(usize, JoinHandle<Result<Arc<Vec<f32>>>>)>,
    /// Rows that will still be asked for: what lies beyond is not read ahead.
    rows_left: u64,
    waited: Duration,
}

impl<'a> Batches<'a> {
    /// Starts at `position`; about `n_rows` rows will be asked for.
    #[must_use]
    pub fn new(
        source: &Arc<dyn ActivationSource>,
        normalisation: &'a Normalisation,
        seed: u64,
        position: Position,
        n_rows: u64,
    ) -> Self {
        Self {
            source: Arc::clone(source),
            normalisation,
            seed,
            position,
            loaded: None,
            ahead: None,
            rows_left: n_rows,
            waited: Duration::ZERO,
        }
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// How long batches have waited for data so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
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
                self.position = self.after(self.position);
            }
        }
        self.rows_left = self.rows_left.saturating_sub(n_rows as u64);
        Ok(())
    }

    /// The beginning of the shard after the one of `position`.
    fn after(&self, position: Position) -> Position {
        if position.shard + 1 < self.source.n_shards() {
            Position { shard: position.shard + 1, row: 0, ..position }
        } else {
            Position { epoch: position.epoch + 1, ..Position::default() }
        }
    }

    /// The number of the shard at `position`. The first of all is shard 0, whose statistics have been taken: a source that
    /// makes its shards need not make it twice.
    fn shard(&self, position: Position) -> Result<usize> {
        let mut shards: Vec<usize> = (0..self.source.n_shards()).collect();
        shards.shuffle(&mut self.rng(position.epoch, u64::MAX));
        if position.epoch == 0
            && let Some(place) = shards.iter().position(|&shard| shard == 0)
        {
            shards[..=place].rotate_right(1);
        }
        let shard = shards.get(position.shard).copied();
        shard.with_context(|| format!("there is no shard {} to train on", position.shard))
    }

    /// The vectors of the current shard: read ahead, or else now. Starts reading the next.
    fn load(&mut self) -> Result<Loaded> {
        let shard = self.shard(self.position)?;
        let started = Instant::now();
        let vectors = match self.ahead.take() {
            Some((ahead, reading)) if ahead == shard => {
                reading.join().map_err(|_| anyhow!("reading shard {shard} failed"))??
            }
            _ => self.source.read(shard)?,
        };
        self.waited += started.elapsed();
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
        rows.shuffle(&mut self.rng(self.position.epoch, shard as u64));
        if ((rows.len() - self.position.row.min(rows.len())) as u64) < self.rows_left {
            let next = self.shard(self.after(self.position))?;
            let source = Arc::clone(&self.source);
            self.ahead = Some((next, thread::spawn(move || source.read(next))));
        }
        Ok((vectors, rows))
    }

    /// A generator for `epoch` and `stream`.
    fn rng(&self, epoch: u64, stream: u64) -> ChaCha8Rng {
        let mut seed = [0u8; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&epoch.to_le_bytes());
        seed[16..24].copy_from_slice(&stream.to_le_bytes());
        ChaCha8Rng::from_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::Statistics;
    use super::*;
    use serde_json::Value;
    use shared::format::SaeMetadata;

    /// Three shards of 4, 3 and 5 rows; row `r` of shard `s` holds `10 s + r` twice.
    struct Three(Value);

    impl ActivationSource for Three {
        fn width(&self) -> usize {
            2
        }
        fn n_vectors(&self) -> u64 {
            12
        }
        fn n_shards(&self) -> usize {
            3
        }
        fn read(&self, shard: usize) -> Result<Arc<Vec<f32>>> {
            Ok(Arc::new((0..[4, 3, 5][shard]).flat_map(|row| [(10 * shard + row) as f32; 2]).collect()))
        }
        fn statistics(&self) -> Result<Statistics> {
            Ok(Statistics { scale: 0.5, mean: vec![0.0; 2] })
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

    fn three() -> Arc<dyn ActivationSource> {
        Arc::new(Three(Value::Null))
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
        let (source, plain) = (three(), plain());
        let mut batches = Batches::new(&source, &plain, 1, Position::default(), 100);
        let (first, second) = (rows(&mut batches, 12), rows(&mut batches, 12));
        assert_ne!(first, second);
        assert!(first[..4].iter().all(|row| *row < 4.0), "the first shard comes first: {first:?}");
        for mut epoch in [first, second] {
            epoch.sort_by(f32::total_cmp);
            assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0, 23.0, 24.0]);
        }
        assert_eq!(batches.position(), Position { epoch: 2, shard: 0, row: 0 });
        assert_ne!(rows(&mut Batches::new(&source, &plain, 2, Position::default(), 100), 12), {
            rows(&mut Batches::new(&source, &plain, 1, Position::default(), 100), 12)
        });
    }

    #[test]
    fn outliers_are_passed_over() {
        let source = three();
        let some = Normalisation { limit: 15.0, ..plain() };
        let mut epoch = rows(&mut Batches::new(&source, &some, 1, Position::default(), 100), 5);
        epoch.sort_by(f32::total_cmp);
        assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0]);
        let none = Normalisation { limit: -1.0, ..plain() };
        assert!(Batches::new(&source, &none, 1, Position::default(), 100).fill(1, &mut Vec::new()).is_err());

        // The first shard has norms 0, 1, 2, 3 times √2; the upper median is 2.
        let measured = Normalisation::measure(&*source, 1.25).unwrap();
        assert!((measured.limit - 2.5 * 2f64.sqrt()).abs() < 1e-9);
        assert_eq!(measured.mean, [1.0, 1.0]);
        assert!((measured.scale - (10.0f64 / 3.0).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn any_position_can_be_resumed() {
        let (source, plain) = (three(), plain());
        let mut whole = Batches::new(&source, &plain, 7, Position::default(), 100);
        let all = rows(&mut whole, 40);
        let mut done = 0;
        let mut position = Position::default();
        for n in [1, 5, 2, 9, 11, 12] {
            let mut part = Batches::new(&source, &plain, 7, position, 100);
            assert_eq!(rows(&mut part, n), all[done..done + n]);
            (done, position) = (done + n, part.position());
        }
    }
}
