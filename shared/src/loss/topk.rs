//! Choosing the largest pre-activations: of a row (arXiv 2406.04093 §2.3), of a batch (BatchTopK, arXiv 2412.06410), or of
//! the dead latents of a row (AuxK, arXiv 2406.04093 §2.4). Ties go to the lower index; what is not positive is not chosen.

/// Marks the `k` largest positive values of `z` among those that `allowed` lets through.
#[must_use]
pub fn largest(z: &[f64], k: usize, allowed: impl Fn(usize) -> bool) -> Vec<bool> {
    let mut order: Vec<usize> = (0..z.len()).filter(|&i| z[i] > 0.0 && allowed(i)).collect();
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]).then(a.cmp(&b)));
    let mut chosen = vec![false; z.len()];
    for &i in order.iter().take(k) {
        chosen[i] = true;
    }
    chosen
}

/// [`largest`] in every row of `n` values.
#[must_use]
pub fn largest_of_rows(z: &[f64], n: usize, k: usize, allowed: impl Fn(usize) -> bool) -> Vec<bool> {
    z.chunks_exact(n).flat_map(|row| largest(row, k, &allowed)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_positive_ones_and_the_lower_of_equals() {
        let z = [0.5, -1.0, 2.0, 0.5, 0.0, 2.0];
        let marks = |k| largest(&z, k, |_| true).iter().map(|&m| u8::from(m)).collect::<Vec<_>>();
        assert_eq!(marks(0), [0; 6]);
        assert_eq!(marks(1), [0, 0, 1, 0, 0, 0]);
        assert_eq!(marks(3), [1, 0, 1, 0, 0, 1]);
        assert_eq!(marks(9), [1, 0, 1, 1, 0, 1]);
        assert_eq!(largest(&z, 1, |i| i != 2), [false, false, false, false, false, true]);
        assert_eq!(largest_of_rows(&z, 3, 1, |_| true), [false, false, true, false, false, true]);
    }
}
