//! Sizes of launches and buffers, decided on the host and tested without a card.

/// Bytes of pre-activations computed at a time: they are read back from the second-level cache (50 MB on an H100).
pub const PRODUCTS: usize = 32 << 20;
/// Latents of a product: a multiple of the tiles of a matrix product.
const LATENTS: usize = 256;
/// Parts of the sum over latents that the decoder bias feels, at most.
const PARTS: usize = 2048;
/// Room for kept pre-activations of a row at the start.
const FIRST_CAPACITY: usize = 256;

/// How many latents' pre-activations of `n_rows` rows are computed at a time, of `n_latents`, in about `bytes`.
#[must_use]
pub fn latents_at_once(n_rows: usize, n_latents: usize, bytes: usize) -> usize {
    let fit = bytes / 4 / n_rows.max(1) / LATENTS * LATENTS;
    fit.clamp(LATENTS, 32 * LATENTS).min(n_latents.next_multiple_of(4))
}

/// How many consecutive latents one block updates.
#[must_use]
pub fn latents_of_block(n_latents: usize) -> usize {
    n_latents.div_ceil(PARTS).max(1)
}

/// Room for the pre-activations kept of a row where they are those above a cut, before any is known.
#[must_use]
pub fn first_capacity(n_latents: usize) -> usize {
    FIRST_CAPACITY.min(n_latents)
}

/// Room for a row after one of `capacity` was too little.
#[must_use]
pub fn more_capacity(capacity: usize, n_latents: usize) -> usize {
    (2 * capacity).min(n_latents)
}

/// Room for the `k` largest of a row while they are looked for by `threads` at a time.
#[must_use]
pub fn capacity_of_largest(k: usize, threads: usize) -> usize {
    (2 * k + 2 * threads).max(1024)
}

/// Bins of the count of pre-activations by their upper bits (`batch_count` of `kernels/keep_batch.cu`).
pub const BINS: usize = 1 << 12;

/// What pre-activations must exceed so that at least `wanted` of those counted do, or all; `counts` has a number for each of the
/// [`BINS`] values of the upper bits of a positive f32.
#[must_use]
pub fn cut_of(counts: &[u64], wanted: usize) -> f32 {
    let mut above = 0u64;
    for (bin, count) in counts.iter().enumerate().skip(1).rev() {
        above = above.saturating_add(*count);
        if above >= wanted as u64 {
            // The largest number below the bin.
            return f32::from_bits(((bin as u32) << (31 - BINS.trailing_zeros())) - 1);
        }
    }
    0.0
}

/// Bytes that training a dictionary takes of a device: parameters, moments and batch.
#[must_use]
pub fn bytes(
    n_latents: usize,
    [d_in, d_out]: [usize; 2],
    n_rows: usize,
    n_channels: usize,
    l0: f64,
    momentum: bool,
) -> u64 {
    let arrays = if momentum { 3 } else { 2 };
    let dictionary = n_latents * (4 * arrays * (d_in + d_out) + 64) + 4 * PARTS.min(n_latents) * d_in;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a width")]
    let kept = (4.0 * l0).ceil() as usize + FIRST_CAPACITY;
    let row =
        4 * (2 * d_in + d_out * (1 + n_channels) + latents_at_once(n_rows, n_latents, PRODUCTS)) + 24 * kept;
    (dictionary + n_rows * row) as u64
}

/// Bytes of the scale and shift of a row that is scaled on its own.
pub const OWN_SCALE: usize = size_of::<[f64; 2]>();

/// Bytes that a stream of batches takes of a device: two batches of `n_rows` rows, with `targets` where those are not the rows
/// themselves, and the order of `n_examples` examples of a shard, which is there twice when the shard changes.
#[must_use]
pub fn stream_bytes(n_rows: usize, [d_in, d_out]: [usize; 2], targets: bool, n_examples: u64) -> u64 {
    let row = d_in + if targets { d_out } else { 0 };
    (2 * 4 * n_rows * row) as u64 + 2 * 4 * n_examples
}

/// Bytes that the dense route takes besides: gradients of some latents at a time.
#[must_use]
pub fn dense_bytes(n_latents: usize, [d_in, d_out]: [usize; 2], n_rows: usize) -> u64 {
    (4 * latents_at_once(n_rows, n_latents, PRODUCTS) * (n_rows + d_in + d_out)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_fit_the_cache_and_cover_all_latents() {
        assert_eq!(latents_at_once(4096, 131_072, PRODUCTS), 2048);
        assert_eq!(latents_at_once(2048, 131_072, PRODUCTS), 4096);
        assert_eq!(latents_at_once(1 << 20, 131_072, PRODUCTS), LATENTS);
        assert_eq!(latents_at_once(1, 10, PRODUCTS), 12);
        for n_rows in [1, 100, 4096, 100_000] {
            for n_latents in [1, 255, 4096, 1 << 20] {
                let width = latents_at_once(n_rows, n_latents, PRODUCTS);
                assert!(width > 0 && width.is_multiple_of(4));
                assert!(width <= LATENTS || width * n_rows * 4 <= PRODUCTS);
            }
        }
    }

    #[test]
    fn parts_are_few_and_room_grows_to_everything() {
        for n_latents in [1usize, 2047, 2048, 2049, 1 << 20] {
            assert!(n_latents.div_ceil(latents_of_block(n_latents)) <= PARTS);
        }
        let mut capacity = first_capacity(5000);
        while capacity < 5000 {
            let more = more_capacity(capacity, 5000);
            assert!(more > capacity);
            capacity = more;
        }
        assert_eq!(capacity, 5000);
        assert!(capacity_of_largest(512, 256) >= 512 + 256);
    }

    #[test]
    fn streams_hold_two_batches_and_two_orders() {
        assert_eq!(stream_bytes(4096, [2304, 2304], false, 65_536), 2 * 4096 * 2304 * 4 + 2 * 65_536 * 4);
        assert_eq!(stream_bytes(10, [3, 5], true, 7), 2 * 10 * 8 * 4 + 56);
    }

    #[test]
    fn cuts_leave_what_is_wanted_and_little_more() {
        let values: Vec<f32> = (1..=1000u16).map(|i| f32::from(i) / 100.0).collect();
        let mut counts = vec![0u64; BINS];
        values.iter().for_each(|v| counts[(v.to_bits() >> 19) as usize] += 1);
        for wanted in [1, 7, 100, 999, 1000] {
            let cut = cut_of(&counts, wanted);
            let above = values.iter().filter(|v| **v > cut).count();
            assert!(above >= wanted && above <= wanted + wanted / 4 + 70, "{above} for {wanted}");
        }
        assert_eq!(cut_of(&counts, 1001), 0.0);
        assert_eq!(cut_of(&vec![0; BINS], 1), 0.0);
        // A bin begins at a number that belongs to it.
        let mut one = vec![0; BINS];
        one[(1.0f32.to_bits() >> 19) as usize] = 1;
        assert!(cut_of(&one, 1) < 1.0 && cut_of(&one, 1) > 0.99);
        // The smallest numbers are in the first bin.
        let mut tiny = vec![0; BINS];
        tiny[0] = 5;
        assert_eq!(cut_of(&tiny, 2), 0.0);
    }

    #[test]
    fn a_million_latents_fit_eighty_gigabytes() {
        let needed = bytes(1 << 20, [2304, 2304], 4096, 1, 64.0, false);
        assert!((38_000_000_000..45_000_000_000).contains(&needed), "{needed}");
        assert!(bytes(1 << 20, [2304, 2304], 4096, 1, 64.0, true) > needed + 19_000_000_000);
    }
}
