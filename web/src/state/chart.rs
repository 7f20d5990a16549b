//! Histograms as bars in a box of one by one.

/// A bar: left edge, width and height, all as shares of the box.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bar {
    /// Left edge.
    pub x: f64,
    /// Width.
    pub width: f64,
    /// Height; zero only when nothing was counted.
    pub height: f64,
    /// What it stands for.
    pub count: u64,
}

/// Bars of uniform bins with a logarithmic height, so that one token can be seen beside a million.
///
/// A single count has a tenth of the height of a decade, never zero; an empty bin has none.
#[must_use]
pub fn log_bars(counts: &[u64]) -> Vec<Bar> {
    let top = log_top(counts);
    let n = counts.len().max(1);
    counts
        .iter()
        .enumerate()
        .map(|(i, &count)| Bar { x: share(i, n), width: share(1, n), height: log_height(count, top), count })
        .collect()
}

/// Where `count` lies on the axis of [`log_bars`], as a share of its height.
#[must_use]
pub fn log_height(count: u64, top: f64) -> f64 {
    if count == 0 { 0.0 } else { (log10(count) + 0.1) / top }
}

/// The logarithm at the top of the axis of these counts.
#[must_use]
pub fn log_top(counts: &[u64]) -> f64 {
    log10(counts.iter().copied().max().unwrap_or(0).max(1)) + 0.1
}

/// Powers of ten up to the largest count, for the axis of [`log_bars`].
#[must_use]
pub fn log_ticks(counts: &[u64]) -> Vec<u64> {
    let most = counts.iter().copied().max().unwrap_or(0);
    std::iter::successors(Some(1u64), |t| t.checked_mul(10)).take_while(|&t| t <= most).collect()
}

/// Where a density lies on an axis of `log10` edges, as a share of its width; `None` when it never fired.
#[must_use]
pub fn log_position(density: f64, edges: &[f64]) -> Option<f64> {
    let (first, last) = (edges.first()?, edges.last()?);
    if density <= 0.0 || last <= first {
        return None;
    }
    Some(((density.log10() - first) / (last - first)).clamp(0.0, 1.0))
}

fn log10(n: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "drawn a few hundred pixels high")]
    let n = n as f64;
    n.log10()
}

fn share(i: usize, n: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a few dozen bins")]
    let share = i as f64 / n as f64;
    share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heights_are_logarithmic_and_ones_are_visible() {
        let bars = log_bars(&[0, 1, 10, 1000]);
        assert_eq!(bars[0].height, 0.0);
        assert!(bars[1].height > 0.02 && bars[1].height < 0.05);
        assert_eq!(bars[3].height, 1.0);
        assert!((bars[2].height - 1.1 / 3.1).abs() < 1e-12);
        assert_eq!((bars[2].x, bars[2].width), (0.5, 0.25));
        assert_eq!(log_ticks(&[0, 1, 10, 1000]), [1, 10, 100, 1000]);
        assert!(log_bars(&[]).is_empty() && log_ticks(&[0]).is_empty());
    }

    #[test]
    fn densities_have_a_place_and_dead_latents_none() {
        let edges = [-4.0, -3.0, -2.0, -1.0, 0.0];
        assert_eq!(log_position(0.01, &edges), Some(0.5));
        assert_eq!(log_position(1e-9, &edges), Some(0.0));
        assert_eq!(log_position(0.0, &edges), None);
        assert_eq!(log_position(0.5, &[]), None);
    }
}
