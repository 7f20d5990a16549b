//! What goes with what from a layer to the next: activity-weighted co-activation on the same tokens.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use shared::Codes;
use shared::pack::flow::{TRANSITIONS, Transition};

use crate::features::geometry::largest;
use crate::progress;
use crate::stop::StopFlag;

/// Tokens on which both latents must be active: two that met once are alike by chance.
pub const LEAST_COUNT: u32 = 3;

/// For each of `described` and each layer but the last, the latents of the next layer that are most alike in activation
/// (cosine over tokens), `[m · (L − 1)]`; ties to the lower latent.
///
/// A layer's pairs are counted latent by latent, so that memory beyond the codes is one dense row a thread.
///
/// # Errors
/// If the codes of layers do not belong together, or a stop is asked for.
pub fn count(layers: &[Codes], described: &[u32], stop: &StopFlag) -> Result<Vec<Vec<Transition>>> {
    let gaps = layers.len().saturating_sub(1);
    let mut out = vec![Vec::new(); described.len() * gaps];
    let bar = progress::bar(gaps as u64, "transitions", "layers");
    for (gap, pair) in layers.windows(2).enumerate() {
        let (here, next) = (&pair[0], &pair[1]);
        ensure!(
            here.n_rows() == next.n_rows() && here.n_latents() == next.n_latents(),
            "layers {gap} and {} have codes of other tokens",
            gap + 1
        );
        let squares = squares(next);
        let active = firings(here, described);
        let made: Result<Vec<_>> = active
            .par_iter()
            .map_init(
                || Scratch::new(next.n_latents()),
                |scratch, firings| {
                    stop.check()?;
                    Ok(scratch.transitions(firings, next, &squares))
                },
            )
            .collect();
        for (place, transitions) in made?.into_iter().enumerate() {
            out[place * gaps + gap] = transitions;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(out)
}

/// Σ g² of every latent.
fn squares(codes: &Codes) -> Vec<f64> {
    let mut squares = vec![0.0; codes.n_latents()];
    for (latents, values) in codes.iter() {
        latents.iter().zip(values).for_each(|(&l, &v)| squares[l as usize] += f64::from(v).powi(2));
    }
    squares
}

/// The rows where each of `described` (ascending) is active, and its activations.
fn firings(codes: &Codes, described: &[u32]) -> Vec<Vec<(usize, f32)>> {
    let mut places = vec![usize::MAX; codes.n_latents()];
    described.iter().enumerate().for_each(|(place, &latent)| places[latent as usize] = place);
    let mut out = vec![Vec::new(); described.len()];
    for (row, (latents, values)) in codes.iter().enumerate() {
        for (&latent, &value) in latents.iter().zip(values) {
            if let Some(list) = out.get_mut(places[latent as usize]) {
                list.push((row, value));
            }
        }
    }
    out
}

/// A dense row of sums, cleared after each latent.
struct Scratch {
    products: Vec<f64>,
    counts: Vec<u32>,
    touched: Vec<u32>,
}

impl Scratch {
    fn new(n_latents: usize) -> Self {
        Self { products: vec![0.0; n_latents], counts: vec![0; n_latents], touched: Vec::new() }
    }

    fn transitions(&mut self, firings: &[(usize, f32)], next: &Codes, squares: &[f64]) -> Vec<Transition> {
        let mut own = 0.0;
        for &(row, f) in firings {
            let f = f64::from(f);
            own += f * f;
            let (latents, values) = next.row(row);
            for (&k, &g) in latents.iter().zip(values) {
                if self.counts[k as usize] == 0 {
                    self.touched.push(k);
                }
                self.counts[k as usize] += 1;
                self.products[k as usize] += f * f64::from(g);
            }
        }
        self.touched.sort_unstable();
        let total: f64 = self.touched.iter().map(|&k| self.products[k as usize]).sum();
        let cosine = |k: u32| self.products[k as usize] / (own * squares[k as usize]).sqrt();
        let often = self.touched.iter().filter(|&&k| self.counts[k as usize] >= LEAST_COUNT);
        #[expect(clippy::cast_possible_truncation, reason = "stored in half precision")]
        let best = largest(often.map(|&k| (k, cosine(k).clamp(0.0, 1.0) as f32)), TRANSITIONS);
        #[expect(clippy::cast_possible_truncation, reason = "stored in half precision")]
        let made = best
            .into_iter()
            .map(|(to, cosine)| Transition {
                to,
                count: self.counts[to as usize],
                cosine,
                share: (self.products[to as usize] / total).clamp(0.0, 1.0) as f32,
            })
            .collect();
        for k in self.touched.drain(..) {
            (self.products[k as usize], self.counts[k as usize]) = (0.0, 0);
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::CodesBuilder;

    /// Layers of `n_rows` rows over 12 latents with some pattern between layers.
    fn layers(n_layers: usize, n_rows: usize) -> Vec<Codes> {
        let mut state = 7u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let mut builders = vec![CodesBuilder::new(12); n_layers];
        for _ in 0..n_rows {
            let topic = draw(4);
            for builder in &mut builders {
                for latent in 0..12u32 {
                    if draw(6) == 0 || (u64::from(latent) % 4 == topic && draw(3) > 0) {
                        #[expect(clippy::cast_precision_loss, reason = "small")]
                        builder.push(latent, 0.5 + draw(100) as f32 / 64.0);
                    }
                }
                builder.end_row().unwrap();
            }
        }
        builders.into_iter().map(CodesBuilder::finish).collect()
    }

    /// Every pair by its definition, from dense matrices.
    fn slow(layers: &[Codes], described: &[u32]) -> Vec<Vec<Transition>> {
        let gaps = layers.len() - 1;
        let mut out = Vec::new();
        for &j in described {
            for gap in 0..gaps {
                let n = layers[0].n_latents();
                let column = |layer: usize, latent: usize| -> Vec<f64> {
                    let dense = layers[layer].to_dense();
                    dense.iter().skip(latent).step_by(n).map(|&v| f64::from(v)).collect()
                };
                let f = column(gap, j as usize);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let all: Vec<Vec<f64>> = (0..n).map(|k| column(gap + 1, k)).collect();
                let total: f64 = all.iter().map(|g| dot(&f, g)).sum();
                let mut found: Vec<Transition> = (0u32..)
                    .zip(&all)
                    .map(|(to, g)| Transition {
                        to,
                        count: f.iter().zip(g).filter(|(f, g)| **f > 0.0 && **g > 0.0).count() as u32,
                        cosine: (dot(&f, g) / (dot(&f, &f) * dot(g, g)).sqrt()) as f32,
                        share: (dot(&f, g) / total) as f32,
                    })
                    .filter(|t| t.count >= LEAST_COUNT)
                    .collect();
                found.sort_by(|a, b| b.cosine.total_cmp(&a.cosine).then(a.to.cmp(&b.to)));
                found.truncate(TRANSITIONS);
                out.push(found);
            }
        }
        out
    }

    #[test]
    fn pairs_are_those_of_the_definition() {
        let layers = layers(4, 60);
        let described = [0, 3, 4, 9, 11];
        let (fast, slow) =
            (count(&layers, &described, &StopFlag::default()).unwrap(), slow(&layers, &described));
        assert_eq!(fast.len(), slow.len());
        assert!(slow.iter().all(|row| row.len() == TRANSITIONS), "the data are too thin to test anything");
        for (fast, slow) in fast.iter().zip(&slow) {
            assert_eq!(fast.len(), slow.len());
            for (fast, slow) in fast.iter().zip(slow) {
                assert_eq!((fast.to, fast.count), (slow.to, slow.count));
                assert!((fast.cosine - slow.cosine).abs() < 1e-6 && (fast.share - slow.share).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn chance_meetings_silence_and_stops() {
        let row = |builder: &mut CodesBuilder, entries: &[(u32, f32)]| {
            entries.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row().unwrap();
        };
        let (mut here, mut next) = (CodesBuilder::new(3), CodesBuilder::new(3));
        for i in 0..4 {
            row(&mut here, &[(0, 1.0)]);
            row(&mut next, if i < 2 { &[(1, 1.0), (2, 1.0)] } else { &[(2, 1.0)] });
        }
        let layers = [here.finish(), next.finish()];
        let found = count(&layers, &[0, 1], &StopFlag::default()).unwrap();
        assert_eq!(found[0], [Transition { to: 2, count: 4, cosine: 1.0, share: 4.0 / 6.0 }]);
        assert!(found[1].is_empty());
        let stop = StopFlag::default();
        stop.raise();
        assert!(count(&layers, &[0], &stop).is_err());
        assert!(
            count(&[layers[0].clone(), CodesBuilder::new(3).finish()], &[0], &StopFlag::default()).is_err()
        );
    }
}
