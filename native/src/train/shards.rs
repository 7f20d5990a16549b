//! The shards of a source in a seeded order, each read once for all that go through them side by side. While one is used, the next is
//! read on another thread: as f32 on the host, or to where a device gathers batches from them ([`crate::cuda::feed`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use shared::RowScaling;
use shared::config::harvest::StoreDtype;
use shared::row_scaling::Undo;

use super::normalise::{Normalisation, norm};
use super::order::Position;
use super::source::{ActivationSource, Intake, Vectors, Wiring};
use crate::cuda::feed::{Feed, Filling, Readable};
use crate::store::decode;

/// A place in the order of shards: the epoch, and how many shards of it came before.
pub(super) type Place = (u64, usize);

/// The raw vectors of a tap of a shard.
#[derive(Debug)]
pub(super) struct TapRows {
    pub(super) n_rows: usize,
    pub(super) values: Values,
    /// Of every row, once somebody has asked.
    norms: OnceLock<Vec<f64>>,
}

/// Where they are.
#[derive(Debug)]
pub(super) enum Values {
    Host(Vectors),
    Device(OnDevice),
}

/// Values that a device reads, and what the host knows of them.
#[derive(Debug)]
pub(super) struct OnDevice {
    pub(super) element: StoreDtype,
    pub(super) values: Readable,
    /// What undoes the scaling of each row, here and there; nothing where no run scales rows.
    pub(super) undo: Vec<Undo>,
    pub(super) undo_there: Option<Readable>,
}

impl TapRows {
    fn on_host(vectors: Vectors, width: usize) -> Result<Self> {
        let n_rows = vectors.len() / width;
        ensure!(n_rows > 0 && vectors.len() == n_rows * width, "no whole rows");
        Ok(Self { n_rows, values: Values::Host(vectors), norms: OnceLock::new() })
    }

    /// Those of its rows that `normalisation` keeps.
    pub(super) fn kept(&self, normalisation: &Normalisation) -> Vec<bool> {
        if normalisation.limit == f64::INFINITY {
            return vec![true; self.n_rows];
        }
        let norms = self.norms.get_or_init(|| match &self.values {
            Values::Host(vectors) => {
                vectors.par_chunks_exact(vectors.len() / self.n_rows).map(norm).collect()
            }
            // They were taken on the way to the device.
            Values::Device(_) => Vec::new(),
        });
        norms.iter().map(|&norm| normalisation.keeps_norm(norm)).collect()
    }
}

/// How shards come to a device.
#[derive(Clone)]
struct Feeding {
    feed: Arc<Feed>,
    /// How rows are scaled on their own, by any run that does.
    rows: RowScaling,
}

/// The shards of a source, in order.
pub struct Shards {
    source: Arc<dyn ActivationSource>,
    /// Those that anyone asks for, ascending.
    taps: Vec<usize>,
    seed: u64,
    feeding: Option<Feeding>,
    held: BTreeMap<Place, Vec<Arc<TapRows>>>,
    /// The shard being read ahead of time.
    ahead: Option<(Place, JoinHandle<Result<Vec<Arc<TapRows>>>>)>,
    waited: Duration,
}

impl Shards {
    /// The shards of `source` at the taps of `wirings`, on the host.
    #[must_use]
    pub fn new(source: &Arc<dyn ActivationSource>, wirings: &[Wiring], seed: u64) -> Self {
        let taps: BTreeSet<usize> = wirings.iter().flat_map(Wiring::taps).collect();
        Self {
            source: Arc::clone(source),
            taps: taps.into_iter().collect(),
            seed,
            feeding: None,
            held: BTreeMap::new(),
            ahead: None,
            waited: Duration::ZERO,
        }
    }

    /// The same, for `feed`; `rows` is how those runs scale rows that do.
    #[must_use]
    pub fn fed_to(mut self, feed: Arc<Feed>, rows: RowScaling) -> Self {
        self.feeding = Some(Feeding { feed, rows });
        self
    }

    /// Who gathers batches, if not the host.
    pub(super) fn feed(&self) -> Option<&Arc<Feed>> {
        self.feeding.as_ref().map(|feeding| &feeding.feed)
    }

    /// Shards of an epoch.
    pub(super) fn n_shards(&self) -> usize {
        self.source.n_shards()
    }

    /// What the order of examples in shard `number` follows from.
    pub(super) fn order_of(&self, epoch: u64, number: usize) -> ChaCha8Rng {
        generator(self.seed, epoch, number as u64)
    }

    /// How long their users have waited for data so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Shards in memory, but for one that is being read.
    #[must_use]
    pub fn n_held(&self) -> usize {
        self.held.len()
    }

    /// Lets go of what lies before `position`, where nobody stands any more.
    pub fn forget_before(&mut self, position: Position) {
        self.held = self.held.split_off(&position.place());
    }

    /// The beginning of the shard after the one of `position`.
    pub(super) fn after(&self, position: Position) -> Position {
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
    pub(super) fn get(&mut self, position: Position, wanted: &[usize]) -> Result<(usize, Vec<Arc<TapRows>>)> {
        let (place, number) = (position.place(), self.number(position.place())?);
        if !self.held.contains_key(&place) {
            let started = Instant::now();
            let taps = match self.ahead.take() {
                Some((ahead, reading)) if ahead == place => {
                    reading.join().map_err(|_| anyhow!("reading shard {number} failed"))??
                }
                other => {
                    self.ahead = other;
                    read(&*self.source, number, &self.taps, self.feeding.as_ref())?
                }
            };
            self.waited += started.elapsed();
            self.held.insert(place, taps);
        }
        let all = &self.held[&place];
        let find = |tap: &usize| {
            let found = self.taps.binary_search(tap).ok().and_then(|at| all.get(at));
            found.cloned().with_context(|| format!("tap {tap} of shard {number} was not read"))
        };
        Ok((number, wanted.iter().map(find).collect::<Result<_>>()?))
    }

    /// Waits until nothing is being read, and forgets what was.
    pub(super) fn join_ahead(&mut self) {
        if let Some((_, reading)) = self.ahead.take() {
            drop(reading.join());
        }
    }

    /// Starts reading the shard after the one of `position`.
    pub(super) fn read_ahead(&mut self, position: Position) -> Result<()> {
        let next = self.after(position).place();
        if self.ahead.is_none() && !self.held.contains_key(&next) {
            let (number, source, taps) = (self.number(next)?, Arc::clone(&self.source), self.taps.clone());
            let feeding = self.feeding.clone();
            let reading = thread::spawn(move || read(&*source, number, &taps, feeding.as_ref()));
            self.ahead = Some((next, reading));
        }
        Ok(())
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        // Nobody may talk to a device while the program ends.
        if self.feeding.is_some() {
            self.join_ahead();
        }
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

/// Shard `number` at `taps`, of whole rows, of the same number at each.
fn read(
    source: &dyn ActivationSource,
    number: usize,
    taps: &[usize],
    feeding: Option<&Feeding>,
) -> Result<Vec<Arc<TapRows>>> {
    let width = |tap: usize| source.taps()[tap].width;
    let all = match feeding {
        None => {
            let all = source.read(number, taps)?.into_iter().zip(taps);
            all.map(|(vectors, &tap)| TapRows::on_host(vectors, width(tap))).collect::<Result<Vec<_>>>()
        }
        Some(feeding) => {
            let widths = taps.iter().map(|&tap| width(tap)).collect();
            fill(source, number, taps, widths, feeding)
        }
    };
    let all = all.with_context(|| format!("shard {number} cannot be used"))?;
    ensure!(all.len() == taps.len(), "shard {number} lacks a tap");
    ensure!(
        all.iter().all(|tap| tap.n_rows == all[0].n_rows),
        "shard {number} has other numbers of rows at other taps"
    );
    Ok(all.into_iter().map(Arc::new).collect())
}

fn fill(
    source: &dyn ActivationSource,
    number: usize,
    taps: &[usize],
    widths: Vec<usize>,
    Feeding { feed, rows }: &Feeding,
) -> Result<Vec<TapRows>> {
    // Dropped after what fills it, which waits for copies.
    let mut done = Vec::new();
    let mut filling = feed.filling();
    let mut into =
        ToDevice { filling: &mut filling, done: &mut done, element: source.element(), widths, rows: *rows };
    source.read_raw(number, taps, &mut into)?;
    filling.arrive()?;
    drop(filling);
    Ok(done)
}

/// Brings taps to a device, and takes down what the host needs of them.
struct ToDevice<'a, 'f> {
    filling: &'a mut Filling<'f>,
    done: &'a mut Vec<TapRows>,
    element: StoreDtype,
    widths: Vec<usize>,
    rows: RowScaling,
}

impl Intake for ToDevice<'_, '_> {
    fn tap(&mut self, bytes: usize, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        let width = *self.widths.get(self.done.len()).context("more taps than were asked for")?;
        let (element, rows) = (self.element, self.rows);
        let row_bytes = width * element.size();
        let n_rows = bytes / row_bytes;
        ensure!(n_rows > 0 && bytes == n_rows * row_bytes, "no whole rows");
        let mut memory = self.filling.room(bytes)?;
        fill(&mut memory.bytes_mut()[..bytes])?;
        let (values, facts) = self.filling.put(memory, bytes, |bytes| facts(bytes, element, width, rows))?;
        let (norms, undo): (Vec<f64>, Vec<Undo>) = facts.into_iter().unzip();
        let (mut undo_there, mut kept) = (None, Vec::new());
        if !rows.is_none() {
            let bytes = n_rows * size_of::<[f64; 2]>();
            let mut memory = self.filling.room(bytes)?;
            for (into, undo) in memory.bytes_mut().chunks_exact_mut(size_of::<[f64; 2]>()).zip(&undo) {
                into.copy_from_slice(bytemuck::bytes_of(&[undo.scale, undo.shift]));
            }
            undo_there = Some(self.filling.put(memory, bytes, |_| ())?.0);
            kept = undo;
        }
        let values = Values::Device(OnDevice { element, values, undo: kept, undo_there });
        self.done.push(TapRows { n_rows, values, norms: norms.into() });
        Ok(())
    }
}

/// The norm of every row, and what undoes its scaling.
fn facts(bytes: &[u8], element: StoreDtype, width: usize, rows: RowScaling) -> Vec<(f64, Undo)> {
    let row = |scratch: &mut Vec<f32>, bytes: &[u8]| {
        decode(element, bytes, scratch);
        (norm(scratch), rows.undo(scratch))
    };
    bytes.par_chunks_exact(width * element.size()).map_init(|| vec![0.0; width], row).collect()
}
