//! The order of the data: shards in a seeded order each epoch, rows reshuffled within each loaded shard.
//!
//! Both follow from the seed, the epoch and the shard alone, so a position is three numbers and resuming
//! needs nothing else.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use shared::RowScaling;
use shared::config::harvest::StoreDtype;
use shared::row_scaling::Undo;

use super::normalise::{Normalisation, Scaling};
use super::shards::{OnDevice, Place, Shards, TapRows, Values};
use super::source::Wiring;
use crate::cuda::Resident;
use crate::cuda::feed::{Feed, Gathering, Readable, TapAt};

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

impl Position {
    pub(super) fn place(self) -> Place {
        (self.epoch, self.shard)
    }
}

/// The vectors of a shard, raw, and the order of the examples that are trained on.
struct Loaded {
    /// Of each input.
    x: Vec<Arc<TapRows>>,
    y: Option<Arc<TapRows>>,
    n_rows: usize,
    /// Example `i · n_rows + r` is row `r` of input `i`.
    examples: Vec<u32>,
    /// Who makes batches of them, where that is a device.
    gathering: Option<Gathering>,
}

/// Normalised rows of inputs, and of targets where those are not the inputs. Where a device has them, what is known of them besides.
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
    /// A shard after which another will be asked for; it is read once those before this one have been let go of.
    before_next: Option<Position>,
    /// Rows that will still be asked for: what lies beyond is not read ahead.
    rows_left: u64,
}

impl Batches {
    /// Starts at `position`; about `n_rows` rows will be asked for.
    #[must_use]
    pub fn new(wiring: Wiring, scaling: Scaling, position: Position, n_rows: u64) -> Self {
        Self { wiring, scaling, position, loaded: None, before_next: None, rows_left: n_rows }
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Fills `out` with `n_rows` examples, normalised; outliers are passed over. Where shards lie on a device, the rows are made there,
    /// and `out` has none.
    ///
    /// # Errors
    /// If a shard cannot be read or holds no rows, or the device fails.
    pub fn fill(
        &mut self,
        shards: &mut Shards,
        n_rows: usize,
        out: &mut Pairs,
    ) -> Result<Option<Arc<Resident>>> {
        out.x.clear();
        out.y.clear();
        out.inputs.clear();
        out.undo.clear();
        if let Some(before) = self.before_next.take() {
            shards.read_ahead(before)?;
        }
        let batch =
            |feed: &Arc<Feed>| feed.batch(n_rows, self.scaling.widths(), self.scaling.target.is_some());
        let batch = shards.feed().map(batch).transpose()?;
        let mut empty_shards = 0;
        while out.inputs.len() < n_rows {
            let loaded = match self.loaded.take() {
                Some(loaded) => loaded,
                None => self.load(shards)?,
            };
            let (first, row) = (self.position.row, out.inputs.len());
            let end = loaded.examples.len().min(first + n_rows - row);
            let first = first.min(end);
            for &example in &loaded.examples[first..end] {
                self.push(&loaded, example as usize, out)?;
            }
            if let (Some(batch), Some(gathering)) = (&batch, &loaded.gathering) {
                gathering.gather(batch, row, first, end - first)?;
            }
            self.position.row = end;
            empty_shards = if loaded.examples.is_empty() { empty_shards + 1 } else { 0 };
            ensure!(empty_shards <= shards.n_shards(), "no shard holds a vector that can be trained on");
            if end < loaded.examples.len() {
                self.loaded = Some(loaded);
            } else {
                self.position = shards.after(self.position);
            }
        }
        self.rows_left = self.rows_left.saturating_sub(n_rows as u64);
        Ok(batch)
    }

    /// Appends an example to `out`: its rows, normalised, where the host has them, and what is known of it besides.
    fn push(&self, loaded: &Loaded, example: usize, out: &mut Pairs) -> Result<()> {
        let (input, row) = (example / loaded.n_rows, example % loaded.n_rows);
        let normalisation = &self.scaling.inputs[input];
        let rows = self.scaling.rows;
        let own = match &loaded.x[input].values {
            Values::Host(x) => {
                let [d_in, d_out] = self.scaling.widths();
                let x = &x[row * d_in..][..d_in];
                append(&mut out.x, x, rows, normalisation);
                if let (Some(y), Some(target)) = (&loaded.y, &self.scaling.target)
                    && let Values::Host(y) = &y.values
                {
                    append(&mut out.y, &y[row * d_out..][..d_out], RowScaling::None, target);
                }
                if rows.is_none() { None } else { Some(rows.undo(x)) }
            }
            Values::Device(there) => there.undo.get(row).copied(),
        };
        let (undo, scale) = match &self.scaling.target {
            Some(target) => (None, target.scale),
            None => (own.filter(|_| !rows.is_none()), normalisation.scale),
        };
        let undo = undo.unwrap_or(Undo { scale: 1.0, shift: 0.0 });
        out.undo.push((undo.scale * scale, undo.shift));
        out.inputs.push(u16::try_from(input).context("more than 2^16 taps")?);
        Ok(())
    }

    /// The vectors of the current shard; the next is read ahead from the next batch on.
    fn load(&mut self, shards: &mut Shards) -> Result<Loaded> {
        let (number, mut x) = shards.get(self.position, &self.wiring.taps())?;
        let y = self.wiring.target.and_then(|_| x.pop());
        let Scaling { inputs, target, .. } = &self.scaling;
        let n_rows = x.first().context("a shard without inputs")?.n_rows;
        u32::try_from(n_rows * x.len()).context("a shard of more than 2^32 examples")?;
        let mut examples: Vec<u32> = Vec::new();
        for (first, (x, input)) in (0u32..).step_by(n_rows.max(1)).zip(x.iter().zip(inputs)) {
            let numbered = (first..).zip(x.kept(input));
            examples.extend(numbered.filter(|(_, kept)| *kept).map(|(example, _)| example));
        }
        if let (Some(y), Some(target)) = (&y, target) {
            let kept = y.kept(target);
            examples.retain(|&row| kept[row as usize]);
        }
        examples.shuffle(&mut shards.order_of(self.position.epoch, number));
        if ((examples.len() - self.position.row.min(examples.len())) as u64) < self.rows_left {
            self.before_next = Some(self.position);
        }
        let gathering = match shards.feed() {
            Some(feed) => Some(self.gathering(feed, (&x, y.as_deref()), &examples)?),
            None => None,
        };
        Ok(Loaded { x, y, n_rows, examples, gathering })
    }

    /// Who makes batches of `examples` on a device.
    fn gathering(
        &self,
        feed: &Feed,
        (x, y): (&[Arc<TapRows>], Option<&TapRows>),
        examples: &[u32],
    ) -> Result<Gathering> {
        let (rows, widths) = (self.scaling.rows, self.scaling.widths());
        let there = |tap: &'_ TapRows, normalisation: &Normalisation, own: bool| {
            let Values::Device(OnDevice { values, undo_there, .. }) = &tap.values else {
                anyhow::bail!("vectors that are not on the device");
            };
            let undo = undo_there.as_ref().filter(|_| own);
            ensure!(!own || undo.is_some(), "rows are scaled that nobody measured");
            Ok(TapAt::new(values.at(), undo.map_or(0, Readable::at), inverse(normalisation)))
        };
        let inputs = x.iter().zip(&self.scaling.inputs).map(|(x, input)| there(x, input, !rows.is_none()));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let target = y.zip(self.scaling.target.as_ref()).map(|(y, target)| there(y, target, false));
        let element = match x.first().map(|x| &x.values) {
            Some(Values::Device(first)) => first.element,
            _ => StoreDtype::F32,
        };
        let eps = match rows {
            RowScaling::Standardise { eps } => eps,
            RowScaling::None | RowScaling::Norm => 0.0,
        };
        let n_rows = x.first().map_or(0, |x| x.n_rows);
        Gathering::new(feed, (&inputs, target.transpose()?), (n_rows, widths), (element, eps), examples)
    }
}

/// What normalised values are multiplied by in the end.
#[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
fn inverse(normalisation: &Normalisation) -> f32 {
    (1.0 / normalisation.scale) as f32
}

/// Appends a raw vector to `out`, normalised.
fn append(out: &mut Vec<f32>, vector: &[f32], rows: RowScaling, normalisation: &Normalisation) {
    let start = out.len();
    out.extend(vector);
    let added = &mut out[start..];
    if !rows.is_none() {
        rows.apply(vector, added);
    }
    let inverse = inverse(normalisation);
    added.iter_mut().for_each(|v| *v *= inverse);
}

#[cfg(test)]
mod tests {
    use super::super::source::{ActivationSource, SourceTap, Statistics, Vectors};
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
        assert!(shards.n_held() <= 1);
        shards.join_ahead();
        let mut read = source.1.lock().unwrap().clone();
        // One of the second epoch may have been read ahead.
        read.truncate(3);
        read.sort_unstable();
        assert_eq!(read, [0, 1, 2]);
    }
}
