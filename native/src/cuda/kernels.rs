//! The kernels: their sources, what they are compiled for, and how they are launched (`kernels/README.md` has the table).

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    /// Width of the vectors read.
    pub d_in: usize,
    /// Width of the vectors reconstructed.
    pub d_out: usize,
    /// Threads of a block.
    pub threads: usize,
}

/// Threads of a block to choose from.
const THREADS: [usize; 6] = [256, 224, 192, 160, 128, 96];
/// Values of a row that a thread holds, where that can be.
const VALUES_OF_THREAD: usize = 12;

impl Shape {
    /// The shape for these widths: of some numbers of threads, the one whose last pass over a row wastes least, of those that
    /// leave a thread few enough values to keep in registers.
    #[must_use]
    pub fn new(d_in: usize, d_out: usize) -> Self {
        let waste = |threads: usize| {
            let each = d_in.max(d_out).div_ceil(threads);
            let idle: usize = [d_in, d_out].map(|d| d.div_ceil(threads) * threads - d).into_iter().sum();
            (each > VALUES_OF_THREAD, idle, usize::MAX - threads)
        };
        let threads = THREADS.into_iter().min_by_key(|&threads| waste(threads));
        Self { d_in, d_out, threads: threads.unwrap_or(256) }
    }

    /// Definitions for the compiler.
    #[must_use]
    pub fn defines(self) -> [(&'static str, usize); 3] {
        [("D_IN", self.d_in), ("D_OUT", self.d_out), ("THREADS", self.threads)]
    }

    /// Blocks that give every one of `n` things a thread.
    #[must_use]
    pub fn blocks(self, n: usize) -> usize {
        n.div_ceil(self.threads)
    }
}

/// What every source begins with.
pub const PRELUDE: &str = include_str!("../../../kernels/prelude.cu");

macro_rules! kernels {
    ($($file:literal: $($name:ident = $entry:literal),+;)+) => {
        /// A kernel.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "kernels/README.md describes each")]
        pub enum Kernel { $($($name),+),+ }

        impl Kernel {
            /// Every kernel.
            pub const ALL: &[Self] = &[$($(Self::$name),+),+];

            /// The name of its function.
            #[must_use]
            pub fn entry(self) -> &'static str {
                match self { $($(Self::$name => $entry),+),+ }
            }

            /// The name of its file in `kernels/`.
            #[must_use]
            pub fn file(self) -> &'static str {
                match self { $($(Self::$name => $file),+),+ }
            }

            /// Its source, without the prelude.
            #[must_use]
            pub fn source(self) -> &'static str {
                match self { $($(Self::$name => include_str!(concat!("../../../kernels/", $file))),+),+ }
            }
        }
    };
}

kernels! {
    "thresholds.cu": Thresholds = "thresholds";
    "center.cu": Center = "center";
    "keep_above.cu": KeepAbove = "keep_above";
    "keep_largest.cu": KeepLargest = "keep_largest", MarkMulti = "mark_multi";
    "keep_batch.cu": BatchCount = "batch_count", BatchHistogram = "batch_histogram", BatchEqual = "batch_equal", BatchRetain = "batch_retain";
    "dense.cu": DenseBase = "dense_base", DenseActivations = "dense_activations", DenseErrors = "dense_errors", DenseSignals = "dense_signals";
    "decode.cu": Decode = "decode", PushBack = "push_back";
    "tally.cu": Tally = "tally", Totals = "totals", Lengths = "lengths";
    "by_latent.cu": CountEntries = "count_entries", Scan = "scan", PlaceEntries = "place_entries", SortEntries = "sort_entries";
    "update.cu": Update = "update", UpdateFromProducts = "update_from_products";
    "bias.cu": SumResiduals = "sum_residuals", UpdateBias = "update_bias";
    "columns.cu": ResidualSums = "residual_sums", InputSums = "input_sums";
    "pull.cu": PullTerms = "pull_terms";
    "reconstruct.cu": Reconstruct = "reconstruct";
    "split.cu": Split = "split";
    "gather.cu": Gather = "gather", RowMoments = "row_moments";
    "skip.cu": WeighResiduals = "weigh_residuals", UpdateDense = "update_dense";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_fit_the_widths() {
        assert_eq!(Shape::new(2304, 2304).threads, 256);
        assert_eq!(Shape::new(576, 576).threads, 192);
        assert_eq!(Shape::new(640, 640).threads, 160);
        assert_eq!(Shape::new(3584, 3584).threads, 256);
        assert_eq!(Shape::new(640, 2304).threads, 256);
        for d in 1..5000 {
            let shape = Shape::new(d, d);
            assert!(shape.threads.is_multiple_of(32) && shape.blocks(d) * shape.threads >= d);
        }
    }

    #[test]
    fn every_kernel_is_in_its_file_once() {
        for &kernel in Kernel::ALL {
            let wanted = format!(" {}(", kernel.entry());
            let found = kernel.source().matches(&wanted).count();
            assert!(found >= 1, "{} has no {}", kernel.file(), kernel.entry());
        }
    }
}
