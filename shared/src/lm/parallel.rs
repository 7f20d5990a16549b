//! The seam through which elementwise blocks use several cores: `shared` has no threads of its own.

/// Runs a function over disjoint pieces of a slice, possibly on several threads.
pub trait Parallel: Send + Sync {
    /// Calls `f(i, piece)` for the `i`-th piece of `piece_len` values (the last may be shorter), in any order.
    /// `piece_len` is at least 1.
    fn for_each_piece(&self, data: &mut [f32], piece_len: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync));
}

/// One piece after the other, on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

impl Parallel for Serial {
    fn for_each_piece(&self, data: &mut [f32], piece_len: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        for (i, piece) in data.chunks_mut(piece_len.max(1)).enumerate() {
            f(i, piece);
        }
    }
}
