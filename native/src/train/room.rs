//! What training takes of a device: the runs, and the vectors they are fed.

use std::collections::BTreeSet;

use shared::config::train::Route;

use super::source::{ActivationSource, Wiring};
use super::suite::Job;
use crate::cuda::{Placement, geometry};

/// Bytes of a device's memory, estimated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Parameters, moments and what a step needs besides, of all runs.
    pub trainers: u64,
    /// Batches, and the order in which examples come.
    pub batches: u64,
    /// Raw vectors of the shards that are held at the same time.
    pub shards: u64,
}

impl Room {
    /// What `jobs` take. Those that ask for vectors that `source` does not have take nothing.
    #[must_use]
    pub fn of(jobs: &[Job], source: &dyn ActivationSource) -> Self {
        let (mut room, mut streams) = (Self::default(), BTreeSet::new());
        let (mut taps, mut scaled) = (BTreeSet::new(), false);
        let largest = source.largest_shard();
        for config in jobs.iter().map(|job| &job.config) {
            let Ok(wiring) = Wiring::of(config, source) else { continue };
            let widths = wiring.widths(source);
            let channels = config.prefix_lengths().len().max(1)
                + [config.aux_k > 0, config.multi_topk].into_iter().filter(|&used| used).count()
                + 1;
            #[expect(clippy::cast_precision_loss, reason = "a number of latents")]
            let l0 = config.target_l0.unwrap_or(config.k as f64).max(64.0);
            let momentum = config.beta1 > 0.0;
            room.trainers += geometry::bytes(config.width, widths, config.batch, channels, l0, momentum);
            if config.route != Route::Sparse {
                room.trainers += geometry::dense_bytes(config.width, widths, config.batch);
            }
            taps.extend(wiring.taps());
            let rows = super::normalise::row_scaling(config.normalise);
            scaled |= !rows.is_none();
            let examples = largest * wiring.inputs.len() as u64;
            let targets = wiring.target.is_some();
            let stream = (wiring, config.batch, config.max_norm.to_bits(), config.normalise);
            if streams.insert(stream) {
                room.batches += geometry::stream_bytes(config.batch, widths, targets, examples);
            }
        }
        let values: usize = taps.iter().map(|&tap| source.taps()[tap].width).sum();
        let row =
            values * source.element().size() + if scaled { taps.len() * geometry::OWN_SCALE } else { 0 };
        // One that is used and one that comes; of several streams, one may be a shard ahead of another.
        let held = if streams.len() > 1 { 3 } else { 2 };
        room.shards = held * largest * row as u64;
        room
    }

    /// What must be in the device's memory.
    #[must_use]
    pub fn least(&self) -> u64 {
        self.trainers + self.batches
    }

    /// Where shards lie, with `free` bytes of the device's memory: there, if they leave the runs room to grow.
    #[must_use]
    pub fn placement(&self, free: u64) -> Placement {
        let wanted = self.least() + self.trainers / 10 + self.shards;
        if wanted <= free { Placement::Device } else { Placement::Host }
    }
}
