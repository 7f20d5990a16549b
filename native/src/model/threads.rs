//! The transformer's elementwise work on rayon's threads.

use rayon::prelude::*;
use shared::lm::Parallel;

/// Pieces in parallel on rayon's global pool, the one candle's matrix products use as well.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

impl Parallel for Rayon {
    fn for_each_piece(&self, data: &mut [f32], piece_len: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let piece_len = piece_len.max(1);
        if data.len() <= piece_len {
            f(0, data);
        } else {
            data.par_chunks_mut(piece_len).enumerate().for_each(|(i, piece)| f(i, piece));
        }
    }
}
