//! The order of the data: shards in a seeded order each epoch, rows reshuffled within each loaded shard.
//!
//! Both follow from the seed, the epoch and the shard alone, so a position is three numbers and resuming
//! needs nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use shared::RowScaling;
use shared::row_scaling::Undo;

use super::normalise::{Normalisation, Scaling};
use super::source::{ActivationSource, Vectors, Wiring};

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

/// The data type of a place in the order of shards: the epoch, and how many shards of it came before.
type Place = (u64, usize);

impl Position {
    fn place(self) -> Place {
        (self.epoch, self.shard)
    }
}

/// The shards of a source in a seeded order, each read once for all that go through them side by side. While one is used,
/// the next is read on another thread.
pub struct Shards {
    source: Arc<dyn ActivationSource>,
    /// Those that anyone asks for, ascending.
    taps: Vec<usize>,
    seed: u64,
    held: BTreeMap<Place, Vec<Vectors>>,
    /// The shard being read ahead of time.
    ahead: Option<(Place, JoinHandle<Result<Vec<Vectors>>>)>,
    waited: Duration,
}

impl Shards {
    /// The shards of `source` at the taps of `wirings`.
    #[must_use]
    pub fn new(source: &Arc<dyn ActivationSource>, wirings: &[Wiring], seed: u64) -> Self {
        let taps: BTreeSet<usize> = wirings.iter().flat_map(Wiring::taps).collect();
        Self {
            source: Arc::clone(source),
            taps: taps.into_iter().collect(),
            seed,
            held: BTreeMap::new(),
            ahead: None,
            waited: Duration::ZERO,
        }
    }

    /// How long their users have waited for data so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Lets go of what lies before `position`, where nobody stands any more.
    pub fn forget_before(&mut self, position: Position) {
        self.held = self.held.split_off(&position.place());
    }

    /// The beginning of the shard after the one of `position`.
    fn after(&self, position: Position) -> Position {
        if position.shard + 1 < self.source.n_shards() {
            Position { shard: position.shard + 1, row: 0, ..position }
        } else {
            Position { epoch: position.epoch + 1, ..Position::default() }
        }
    }

    /// The number of the shard at `place`. The first of all is shard 0, whose statistics have been taken: a source that
    /// makes its shards need not make it twice.
    fn number(&self, (epoch, shard): Place) -> Result<usize> {
        let mut shards: Vec<usize> = (0..self.source.n_shards()).collect();
        shards.shuffle(&mut generator(self.seed, epoch, u64::MAX));
        if epoch == 0
            && let Some(place) = shards.iter().position(|&shard| shard == 0)
        {
            shards[..=place].rotate_right(1);
        }
        shards.get(shard).copied().with_context(|| format!("there is no shard {shard} to train on"))
    }

    /// The number and the vectors of the shard at `position`, at `wanted`: held, read ahead, or else read now.
    fn get(&mut self, position: Position, wanted: &[usize]) -> Result<(usize, Vec<Vectors>)> {
        let (place, number) = (position.place(), self.number(position.place())?);
        if !self.held.contains_key(&place) {
            let started = Instant::now();
            let vectors = match self.ahead.take() {
                Some((ahead, reading)) if ahead == place => {
                    reading.join().map_err(|_| anyhow!("reading shard {number} failed"))??
                }
                other => {
                    self.ahead = other;
                    self.source.read(number, &self.taps)?
                }
            };
            self.waited += started.elapsed();
            self.check(number, &vectors)?;
            self.held.insert(place, vectors);
        }
        let all = &self.held[&place];
        let find = |tap: &usize| {
            let found = self.taps.binary_search(tap).ok().and_then(|at| all.get(at));
            found.cloned().with_context(|| format!("tap {tap} of shard {number} was not read"))
        };
        Ok((number, wanted.iter().map(find).collect::<Result<_>>()?))
    }

    /// Whether there are whole rows, of the same number at each tap.
    fn check(&self, number: usize, vectors: &[Vectors]) -> Result<()> {
        ensure!(vectors.len() == self.taps.len(), "shard {number} lacks a tap");
        let width = |tap: usize| self.source.taps()[tap].width;
        let n_rows = vectors[0].len() / width(self.taps[0]);
        let whole = self.taps.iter().zip(vectors).all(|(&tap, v)| v.len() == n_rows * width(tap));
        ensure!(n_rows > 0 && whole, "shard {number} holds no whole rows");
        Ok(())
    }

    /// Starts reading the shard after the one of `position`.
    fn read_ahead(&mut self, position: Position) -> Result<()> {
        let next = self.after(position).place();
        if self.ahead.is_none() && !self.held.contains_key(&next) {
            let (number, source, taps) = (self.number(next)?, Arc::clone(&self.source), self.taps.clone());
            self.ahead = Some((next, thread::spawn(move || source.read(number, &taps))));
        }
        Ok(())
    }
}

/// A generator for `epoch` and `stream`.
fn generator(seed: u64, epoch: u64, stream: u64) -> ChaCha8Rng {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes[16..24].copy_from_slice(&stream.to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}

/// The vectors of a shard, raw, and the order of the examples that are trained on.
struct Loaded {
    /// Of each input.
    x: Vec<Vectors>,
    y: Option<Vectors>,
    n_rows: usize,
    /// Example `i · n_rows + r` is row `r` of input `i`.
    examples: Vec<u32>,
}

/// Normalised rows of inputs, and of targets where those are not the inputs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pairs {
    /// Inputs `[N, d_in]`.
    pub x: Vec<f32>,
    /// Targets `[N, d_out]`; empty when they are the inputs.
    pub y: Vec<f32>,
    /// Which of the inputs each row is of, `[N]`.
    pub inputs: Vec<u16>,
    /// What brings each row of the targets back to raw units, scale and shift, `[N]`; but for the ε of a standardisation.
    pub undo: Vec<(f64, f64)>,
}

impl Pairs {
    /// What is reconstructed.
    #[must_use]
    pub fn targets(&self) -> &[f32] {
        if self.y.is_empty() { &self.x } else { &self.y }
    }
}

/// Batches of normalised rows for one wiring, in a seeded order, from any position.
pub struct Batches {
    wiring: Wiring,
    scaling: Scaling,
    position: Position,
    loaded: Option<Loaded>,
    /// Rows that will still be asked for: what lies beyond is not read ahead.
    rows_left: u64,
}

impl Batches {
    /// Starts at `position`; about `n_rows` rows will be asked for.
    #[must_use]
    pub fn new(wiring: Wiring, scaling: Scaling, position: Position, n_rows: u64) -> Self {
        Self { wiring, scaling, position, loaded: None, rows_left: n_rows }
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Fills `out` with `n_rows` examples, normalised; outliers are passed over.
    ///
    /// # Errors
    /// If a shard cannot be read or holds no rows.
    pub fn fill(&mut self, shards: &mut Shards, n_rows: usize, out: &mut Pairs) -> Result<()> {
        let n_shards = shards.source.n_shards();
        out.x.clear();
        out.y.clear();
        out.inputs.clear();
        out.undo.clear();
        let mut empty_shards = 0;
        while out.inputs.len() < n_rows {
            let loaded = match self.loaded.take() {
                Some(loaded) => loaded,
                None => self.load(shards)?,
            };
            let wanted = n_rows - out.inputs.len();
            let end = loaded.examples.len().min(self.position.row + wanted);
            for &example in &loaded.examples[self.position.row.min(end)..end] {
                self.push(&loaded, example as usize, out)?;
            }
            self.position.row = end;
            empty_shards = if loaded.examples.is_empty() { empty_shards + 1 } else { 0 };
            ensure!(empty_shards <= n_shards, "no shard holds a vector that can be trained on");
            if end < loaded.examples.len() {
                self.loaded = Some(loaded);
            } else {
                self.position = shards.after(self.position);
            }
        }
        self.rows_left = self.rows_left.saturating_sub(n_rows as u64);
        Ok(())
    }

    /// Appends an example to `out`, normalised.
    fn push(&self, loaded: &Loaded, example: usize, out: &mut Pairs) -> Result<()> {
        let (input, row) = (example / loaded.n_rows, example % loaded.n_rows);
        let normalisation = &self.scaling.inputs[input];
        let [d_in, d_out] = self.scaling.widths();
        let x = &loaded.x[input][row * d_in..][..d_in];
        append(&mut out.x, x, self.scaling.rows, normalisation);
        let mut undo = Undo { scale: 1.0, shift: 0.0 };
        let mut scale = normalisation.scale;
        if let (Some(y), Some(target)) = (&loaded.y, &self.scaling.target) {
            append(&mut out.y, &y[row * d_out..][..d_out], RowScaling::None, target);
            scale = target.scale;
        } else if !self.scaling.rows.is_none() {
            undo = self.scaling.rows.undo(x);
        }
        out.undo.push((undo.scale * scale, undo.shift));
        out.inputs.push(u16::try_from(input).context("more than 2^16 taps")?);
        Ok(())
    }

    /// The vectors of the current shard; the next is read ahead.
    fn load(&mut self, shards: &mut Shards) -> Result<Loaded> {
        let (number, mut x) = shards.get(self.position, &self.wiring.taps())?;
        let y = self.wiring.target.and_then(|_| x.pop());
        let Scaling { inputs, target, .. } = &self.scaling;
        let [d_in, d_out] = self.scaling.widths();
        let n_rows = x.first().context("a shard without inputs")?.len() / d_in.max(1);
        u32::try_from(n_rows * x.len()).context("a shard of more than 2^32 examples")?;
        let mut examples: Vec<u32> = Vec::new();
        for (first, (x, input)) in (0u32..).step_by(n_rows.max(1)).zip(x.iter().zip(inputs)) {
            let numbered = (first..).zip(x.chunks_exact(d_in));
            examples.extend(numbered.filter(|(_, x)| input.keeps(x)).map(|(example, _)| example));
        }
        if let (Some(y), Some(target)) = (&y, target) {
            examples.retain(|&row| target.keeps(&y[row as usize * d_out..][..d_out]));
        }
        examples.shuffle(&mut generator(shards.seed, self.position.epoch, number as u64));
        if ((examples.len() - self.position.row.min(examples.len())) as u64) < self.rows_left {
            shards.read_ahead(self.position)?;
        }
        Ok(Loaded { x, y, n_rows, examples })
    }
}

/// Appends a raw vector to `out`, normalised.
fn append(out: &mut Vec<f32>, vector: &[f32], rows: RowScaling, normalisation: &Normalisation) {
    let start = out.len();
    out.extend(vector);
    let added = &mut out[start..];
    if !rows.is_none() {
        rows.apply(vector, added);
    }
    #[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
    let inverse = (1.0 / normalisation.scale) as f32;
    added.iter_mut().for_each(|v| *v *= inverse);
}

#[cfg(test)]
mod tests {
    use super::super::source::{SourceTap, Statistics};
    use super::*;
    use std::sync::Mutex;

    use serde_json::Value;
    use shared::config::train::Normalise;
    use shared::format::SaeMetadata;

    /// Three shards of 4, 3 and 5 rows at three taps; row `r` of shard `s` holds `10 s + r` twice, its negative once, and
    /// the first again.
    struct Three(Value, Mutex<Vec<usize>>);

    const TAPS: [SourceTap; 3] = [
        SourceTap { point: None, width: 2 },
        SourceTap { point: None, width: 1 },
        SourceTap { point: None, width: 2 },
    ];
    fn plain_wiring() -> Wiring {
        Wiring { inputs: vec![0], target: None }
    }

    fn pair_wiring() -> Wiring {
        Wiring { inputs: vec![0], target: Some(1) }
    }

    impl ActivationSource for Three {
        fn taps(&self) -> &[SourceTap] {
            &TAPS
        }
        fn n_vectors(&self) -> u64 {
            12
        }
        fn n_shards(&self) -> usize {
            3
        }
        fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
            self.1.lock().unwrap().push(shard);
            let rows = || (0..[4, 3, 5][shard]).map(|row| (10 * shard + row) as f32);
            let twice: Vec<f32> = rows().flat_map(|v| [v; 2]).collect();
            let both = [twice.clone(), rows().map(|v| -v).collect(), twice];
            Ok(taps.iter().map(|&tap| Arc::new(both[tap].clone())).collect())
        }
        fn statistics(&self, _: usize) -> Result<Statistics> {
            Ok(Statistics { scale: 0.5, mean: vec![0.0; 2] })
        }
        fn held_out(&self, _: &[usize], _: usize) -> Result<Vec<Vec<f32>>> {
            Ok(Vec::new())
        }
        fn provenance(&self) -> &Value {
            &self.0
        }
        fn metadata(&self) -> SaeMetadata {
            SaeMetadata::default()
        }
    }

    fn three() -> Arc<Three> {
        Arc::new(Three(Value::Null, Mutex::default()))
    }

    fn shards(seed: u64, wirings: &[Wiring]) -> Shards {
        let source: Arc<dyn ActivationSource> = three();
        Shards::new(&source, wirings, seed)
    }

    fn normalisation(width: usize, limit: f64) -> Normalisation {
        Normalisation { scale: 0.5, mean: vec![0.0; width], limit }
    }

    fn plain() -> Scaling {
        Scaling { rows: RowScaling::None, inputs: vec![normalisation(2, f64::INFINITY)], target: None }
    }

    fn batches(scaling: &Scaling, position: Position) -> Batches {
        Batches::new(plain_wiring(), scaling.clone(), position, 100)
    }

    fn rows(batches: &mut Batches, shards: &mut Shards, n: usize) -> Vec<f32> {
        let mut out = Pairs::default();
        batches.fill(shards, n, &mut out).unwrap();
        assert_eq!(out.targets(), out.x);
        out.x.chunks_exact(2).map(|row| row[0] / 2.0).collect()
    }

    #[test]
    fn every_epoch_holds_every_row_once_in_another_order() {
        let mut shards_1 = shards(1, &[plain_wiring()]);
        let mut stream = batches(&plain(), Position::default());
        let (first, second) = (rows(&mut stream, &mut shards_1, 12), rows(&mut stream, &mut shards_1, 12));
        assert_ne!(first, second);
        assert!(first[..4].iter().all(|row| *row < 4.0), "the first shard comes first: {first:?}");
        for mut epoch in [first.clone(), second] {
            epoch.sort_by(f32::total_cmp);
            assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0, 23.0, 24.0]);
        }
        assert_eq!(stream.position(), Position { epoch: 2, shard: 0, row: 0 });
        let other = rows(&mut batches(&plain(), Position::default()), &mut shards(2, &[plain_wiring()]), 12);
        assert_ne!(other, first);
    }

    #[test]
    fn outliers_are_passed_over_at_either_tap() {
        let limited = |limit| Scaling { inputs: vec![normalisation(2, limit)], ..plain() };
        let mut epoch =
            rows(&mut batches(&limited(15.0), Position::default()), &mut shards(1, &[plain_wiring()]), 5);
        epoch.sort_by(f32::total_cmp);
        assert_eq!(epoch, [0.0, 1.0, 2.0, 3.0, 10.0]);
        let mut none = batches(&limited(-1.0), Position::default());
        assert!(none.fill(&mut shards(1, &[plain_wiring()]), 1, &mut Pairs::default()).is_err());
        let target = Some(normalisation(1, 3.0));
        let scaling = Scaling { target, ..plain() };
        let mut out = Pairs::default();
        let mut pairs = Batches::new(pair_wiring(), scaling, Position::default(), 4);
        pairs.fill(&mut shards(1, &[pair_wiring()]), 4, &mut out).unwrap();
        assert!(out.targets().iter().all(|y| (-6.0..=0.0).contains(y)), "{out:?}");
        assert!(out.x.chunks_exact(2).zip(&out.y).all(|(x, y)| x[0] == -y), "{out:?}");

        // Too few to tell from the first shard alone; of norms 0, 1, 2, 3, 10, 11, 12, 20 … 24 times √2 the upper median is 12.
        let measured = Scaling::measure(&*three(), &pair_wiring(), 1.25, Normalise::Scalar).unwrap();
        let Normalisation { scale, mean, limit } = measured.inputs[0].clone();
        assert!((limit - 15.0 * 2f64.sqrt()).abs() < 1e-9);
        assert_eq!(mean, [39.0 / 7.0; 2]);
        assert!((scale - (2.0f64 * 379.0 / 7.0).sqrt()).abs() < 1e-9);
        assert_eq!(measured.target.unwrap().mean, [-39.0 / 7.0]);
    }

    #[test]
    fn every_vector_of_every_layer_is_an_example_in_its_own_units() {
        let source: Arc<dyn ActivationSource> = Arc::new(Three(Value::Null, Mutex::default()));
        let wiring = Wiring { inputs: vec![0, 2], target: None };
        let mut shards = Shards::new(&source, std::slice::from_ref(&wiring), 5);
        let quarter = Normalisation { scale: 0.25, ..normalisation(2, 12.5 * 2f64.sqrt()) };
        let scaling = Scaling { inputs: vec![normalisation(2, f64::INFINITY), quarter], ..plain() };
        let mut out = Pairs::default();
        Batches::new(wiring, scaling, Position::default(), 19).fill(&mut shards, 19, &mut out).unwrap();
        let mut seen: Vec<(u16, u32)> = out
            .inputs
            .iter()
            .zip(out.x.chunks_exact(2))
            .map(|(&input, x)| (input, (x[0] * [0.5, 0.25][usize::from(input)]).round() as u32))
            .collect();
        assert!(!seen.is_sorted(), "layers are mixed");
        seen.sort_unstable();
        let all = [0, 1, 2, 3, 10, 11, 12, 20, 21, 22, 23, 24];
        // The second layer holds the same vectors, of which those longer than 12.5 √2 are left out.
        let wanted = all.map(|v| (0, v)).into_iter().chain(all[..7].iter().map(|v| (1, *v)));
        assert_eq!(seen, wanted.collect::<Vec<_>>());
    }

    #[test]
    fn any_position_can_be_resumed() {
        let mut whole = batches(&plain(), Position::default());
        let all = rows(&mut whole, &mut shards(7, &[plain_wiring()]), 40);
        let mut done = 0;
        let mut position = Position::default();
        for n in [1, 5, 2, 9, 11, 12] {
            let mut part = batches(&plain(), position);
            assert_eq!(rows(&mut part, &mut shards(7, &[plain_wiring()]), n), all[done..done + n]);
            (done, position) = (done + n, part.position());
        }
    }

    #[test]
    fn a_shard_is_read_once_for_all() {
        let source = three();
        let seen: Arc<dyn ActivationSource> = source.clone();
        let mut shards = Shards::new(&seen, &[plain_wiring(), pair_wiring()], 3);
        let pair = Scaling { target: Some(normalisation(1, f64::INFINITY)), ..plain() };
        let mut streams = [
            batches(&plain(), Position::default()),
            Batches::new(pair_wiring(), pair, Position::default(), 12),
        ];
        let mut alone = Vec::new();
        for _ in 0..4 {
            for stream in &mut streams {
                let mut out = Pairs::default();
                stream.fill(&mut shards, 3, &mut out).unwrap();
                alone.push(out.x);
            }
            assert_eq!(alone[alone.len() - 2], alone[alone.len() - 1]);
            shards.forget_before(streams.iter().map(Batches::position).min().unwrap());
        }
        assert!(shards.held.len() <= 1);
        drop(shards.ahead.take().map(|(_, reading)| reading.join()));
        let mut read = source.1.lock().unwrap().clone();
        // One of the second epoch may have been read ahead.
        read.truncate(3);
        read.sort_unstable();
        assert_eq!(read, [0, 1, 2]);
    }
}
