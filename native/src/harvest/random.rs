//! Every random choice of a harvest, each from its own stream of the one seed.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The generator of the choice called `purpose`, number `index`.
fn stream(seed: u64, purpose: &str, index: u64) -> ChaCha8Rng {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    hasher.update(index.to_le_bytes());
    hasher.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(hasher.finalize().into())
}

/// A permutation of `0..n` (Fisher–Yates), equally likely up to 2⁻³² and the same on every machine.
pub(super) fn permutation(n: u32, seed: u64, purpose: &str, index: u64) -> Vec<u32> {
    let mut generator = stream(seed, purpose, index);
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..order.len()).rev() {
        // The high half of a 64-bit draw times i + 1 is uniform on 0..=i but for one part in 2^32.
        let j = (u128::from(generator.next_u64()) * (i as u128 + 1)) >> 64;
        order.swap(i, j as usize);
    }
    order
}

/// A number in `[0, 1)` that depends on the seed, a text's hash and a part's number only.
#[expect(clippy::cast_precision_loss, reason = "53 bits are kept, all a double has")]
pub(super) fn share_of(seed: u64, text: &[u8; 32], part: u64) -> f64 {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    hasher.update(part.to_le_bytes());
    hasher.update(text);
    let mut first = [0u8; 8];
    first.copy_from_slice(&hasher.finalize()[..8]);
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_hold_every_number_once_and_depend_on_everything() {
        let first = permutation(1000, 1, "a", 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        for other in
            [permutation(1000, 2, "a", 0), permutation(1000, 1, "b", 0), permutation(1000, 1, "a", 1)]
        {
            assert_ne!(first, other);
        }
        assert_eq!(permutation(0, 0, "", 0), Vec::<u32>::new());
    }

    #[test]
    fn every_place_is_equally_likely() {
        // 2000 permutations of 4: each number lands first about 500 times; the standard deviation is 19.
        let mut counts = [0u32; 4];
        (0..2000).for_each(|i| counts[permutation(4, 0, "t", i)[0] as usize] += 1);
        assert!(counts.iter().all(|&c| (400..600).contains(&c)), "{counts:?}");
    }

    #[test]
    fn shares_are_uniform() {
        let mean = (0..2000).map(|i| share_of(3, &[7; 32], i)).sum::<f64>() / 2000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
    }
}
