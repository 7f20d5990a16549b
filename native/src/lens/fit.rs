//! Fits a lens to a store: each layer's vectors to those of the last layer, in the form of the tuned lens (whose authors minimise the
//! divergence of predictions instead, arXiv 2303.08112 §3).
//!
//! ```text
//! rotation         I + W = the orthogonal factor of C_Ll + λ s² I     (orthogonal Procrustes, Schönemann 1966)
//! least squares    W = (C_Ll − C_ll) (C_ll + λ s² I)⁻¹                (arXiv 2303.09435 §3)
//! both             b = μ_L − (I + W) μ_l                              s² = tr C_ll / d
//! ```
//! C are covariances of the same tokens. The ridge λ draws maps to the identity where little goes with the last layer. A rotation can be
//! undone without loss; least squares shrinks what the last layer does not tell, and undoing it makes errors there large.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use shared::Rows;
use shared::format::tuned_lens::Lens;
use shared::lens::{Translator, inverse};
use shared::tap::{Site, TapPoint};

use crate::cpu::gemm::{Matrix, product};
use crate::progress;
use crate::stop::{StopFlag, Stopped};
use crate::store::{Shard, Split, Store};

/// Vectors longer than this times the median of their layer say nothing about the others (massive activations).
const MAX_NORM: f64 = 4.0;
/// Newton's iteration takes about ten.
const MOST_ITERATIONS: usize = 40;

/// What maps may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// Rotations and reflections, about the mean.
    Rotation,
    /// Any, nearest to the last layer.
    LeastSquares,
}

/// How to fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// What maps may be.
    pub form: Form,
    /// Training tokens, at most.
    pub tokens: u64,
    /// λ.
    pub ridge: f64,
}

/// How well the maps do.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The layer.
    pub layer: usize,
    /// Share of the last layer's variance that the layer's own vectors leave unexplained, and that translated ones do.
    pub unexplained: [f64; 2],
    /// How many times the share of variance that an error of translated vectors is, without a direction of its own, grows where the map
    /// is undone: `‖(I + W)⁻¹‖² / d`, times the variance of translated vectors over that of raw ones.
    pub growth: f64,
}

/// Fits a map of every layer of the residual stream in `store`, from the first to the last; that of the last is the identity.
///
/// # Errors
/// If layers are missing, there are fewer tokens than values in a vector, or the store cannot be read.
pub fn fit(store: &Store, options: &Options, stop: &StopFlag) -> Result<(Lens, Vec<Fit>)> {
    ensure!(
        options.ridge >= 0.0 && options.ridge.is_finite(),
        "a ridge is 0 or more, and {} is not",
        options.ridge
    );
    let layers: Vec<TapPoint> = store.manifest().taps.iter().map(|tap| tap.point).collect();
    let layers: Vec<TapPoint> = layers.into_iter().filter(|point| point.site == Site::Resid).collect();
    let complete = layers.iter().enumerate().all(|(number, point)| point.layer == number);
    ensure!(
        layers.len() > 1 && complete,
        "a lens needs every layer of the residual stream; the store holds {}",
        layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    );
    let last = *layers.last().context("there are no layers")?;
    let bar = progress::bar(layers.len() as u64, "fit", "layers");
    let mut maps = Lens::new();
    let mut fits = Vec::new();
    for layer in &layers {
        let sums = Sums::read(store, [*layer, last], options.tokens, stop)?;
        let (map, fit) = sums.solve(layer.layer, (*layer != last).then_some(options))?;
        maps.push(Arc::new(map));
        fits.push(fit);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((maps, fits))
}

/// Sums over tokens of a layer's vectors x and the last layer's y, less the store's means.
struct Sums {
    d: usize,
    n: f64,
    means: [Vec<f32>; 2],
    /// Σ x, Σ y.
    firsts: [Vec<f64>; 2],
    /// Σ x xᵀ, Σ y xᵀ, `[d, d]`.
    seconds: [Vec<f64>; 2],
    /// Σ ‖y‖².
    squares: f64,
}

impl Sums {
    fn read(store: &Store, points: [TapPoint; 2], tokens: u64, stop: &StopFlag) -> Result<Self> {
        let means = [store.mean(points[0])?, store.mean(points[1])?];
        let d = means[0].len();
        let mut sums = Self {
            d,
            n: 0.0,
            firsts: [vec![0.0; d], vec![0.0; d]],
            seconds: [vec![0.0; d * d], vec![0.0; d * d]],
            squares: 0.0,
            means,
        };
        for index in 0..store.n_shards(Split::Train) {
            if stop.is_raised() {
                return Err(Stopped.into());
            }
            #[expect(clippy::cast_precision_loss, reason = "a number of tokens")]
            if sums.n >= tokens as f64 {
                break;
            }
            let shards = [
                store.read_shard(points[0], Split::Train, index)?,
                store.read_shard(points[1], Split::Train, index)?,
            ];
            sums.add(&shards)?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        let least = d as f64;
        ensure!(sums.n > least, "{} tokens cannot tell a map of {d} by {d} values", sums.n);
        Ok(sums)
    }

    /// Adds those tokens of a shard whose vectors are of ordinary length at both layers.
    fn add(&mut self, shards: &[Shard; 2]) -> Result<()> {
        let d = self.d;
        let rows = [Rows::new(&shards[0].vectors, d)?, Rows::new(&shards[1].vectors, d)?];
        let ordinary = rows.map(ordinary);
        let kept = |i: &usize| ordinary.iter().all(|ordinary| ordinary[*i]);
        let kept: Vec<usize> = (0..rows[0].n_rows().min(rows[1].n_rows())).filter(kept).collect();
        for kept in kept.chunks(4096) {
            let centred = |side: usize| -> Vec<f32> {
                let row = |&i: &usize| rows[side].row(i).iter().zip(&self.means[side]).map(|(x, m)| x - m);
                kept.iter().flat_map(row).collect()
            };
            let [x, y] = [centred(0), centred(1)];
            let n = kept.len();
            let matrix = |data| Matrix::new(data, n, d);
            for (second, left) in self.seconds.iter_mut().zip([&x, &y]) {
                let mut part = vec![0.0; d * d];
                let threads = rayon::current_num_threads();
                product(&mut part, matrix(left)?.transposed(), matrix(&x)?, 1.0, false, threads)?;
                second.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
            }
            for (first, rows) in self.firsts.iter_mut().zip([&x, &y]) {
                for row in rows.chunks_exact(d) {
                    first.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
                }
            }
            self.squares += y.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            #[expect(clippy::cast_precision_loss, reason = "a number of rows")]
            let n = n as f64;
            self.n += n;
        }
        Ok(())
    }

    /// The map of `layer`; the identity without options.
    fn solve(&self, layer: usize, options: Option<&Options>) -> Result<(Translator, Fit)> {
        let (d, n) = (self.d, self.n);
        let mean = |side: usize| self.firsts[side].iter().map(|sum| sum / n).collect::<Vec<f64>>();
        let means = [mean(0), mean(1)];
        let covariance = |second: &[f64], left: &[f64]| -> Vec<f64> {
            (0..d * d).map(|at| second[at] / n - left[at / d] * means[0][at % d]).collect()
        };
        let of_layer = covariance(&self.seconds[0], &means[0]);
        let across = covariance(&self.seconds[1], &means[1]);
        let variance = self.squares / n - means[1].iter().map(|m| m * m).sum::<f64>();
        let trace: f64 = (0..d).map(|i| of_layer[i * (d + 1)]).sum();
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        let ridge = |options: &Options| options.ridge * trace / d as f64;
        let weight = match options {
            None => Ok(vec![0.0; d * d]),
            Some(options) if options.form == Form::Rotation => rotation(&across, ridge(options), d),
            Some(options) => least_squares(&across, &of_layer, ridge(options), d),
        };
        let weight = weight.map_err(|value| {
            anyhow!("value {value} of layer {layer} follows from the others: give a larger ridge")
        })?;
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
        let of = |side: usize, i: usize| f64::from(self.means[side][i]) + means[side][i];
        let moved =
            |i: usize| -> f64 { of(0, i) + (0..d).map(|c| weight[i * d + c] * of(0, c)).sum::<f64>() };
        let bias: Vec<f64> = (0..d).map(|i| of(1, i) - moved(i)).collect();
        // E‖y − A x‖² of centred vectors, from the covariances: tr C_yy − 2 tr A C_xy + tr A C_xx Aᵀ.
        let left = |weight: &[f64]| -> [f64; 2] {
            let mut map = weight.to_vec();
            map.iter_mut().step_by(d + 1).for_each(|diagonal| *diagonal += 1.0);
            let fitted: f64 = map.iter().zip(&across).map(|(a, c)| a * c).sum();
            let own: f64 = multiply(&map, &of_layer, d).iter().zip(&map).map(|(ac, a)| ac * a).sum();
            [(variance - 2.0 * fitted + own) / variance, own]
        };
        let [[before, _], [after, translated]] = [left(&vec![0.0; d * d]), left(&weight)];
        let map = Translator::new(narrow(weight), narrow(bias)).with_context(|| format!("layer {layer}"))?;
        let undoing: f64 = map.inverse().iter().map(|&v| f64::from(v).powi(2)).sum();
        #[expect(clippy::cast_precision_loss, reason = "a width")]
        let growth = undoing / d as f64 * translated / trace;
        Ok((map, Fit { layer, unexplained: [before, after], growth }))
    }
}

/// W of the rotation nearest to `across` with `ridge` on its diagonal: its polar factor, by Newton's iteration with scaling (Higham,
/// Functions of Matrices §8.6), less the identity. The column without a pivot where there is none.
fn rotation(across: &[f64], ridge: f64, d: usize) -> Result<Vec<f64>, usize> {
    let mut x = across.to_vec();
    x.iter_mut().step_by(d + 1).for_each(|diagonal| *diagonal += ridge);
    let norm = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
    for _ in 0..MOST_ITERATIONS {
        let inverse = inverse(x.clone(), d)?;
        let gamma = (norm(&inverse) / norm(&x)).sqrt();
        let next: Vec<f64> =
            (0..d * d).map(|at| 0.5 * (gamma * x[at] + inverse[at % d * d + at / d] / gamma)).collect();
        let change: f64 = next.iter().zip(&x).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        x = next;
        if change <= 1e-10 * norm(&x) {
            break;
        }
    }
    x.iter_mut().step_by(d + 1).for_each(|diagonal| *diagonal -= 1.0);
    Ok(x)
}

/// W of the least-squares map with a ridge. The column without a pivot where there is none.
fn least_squares(across: &[f64], of_layer: &[f64], ridge: f64, d: usize) -> Result<Vec<f64>, usize> {
    let mut damped = of_layer.to_vec();
    damped.iter_mut().step_by(d + 1).for_each(|diagonal| *diagonal += ridge);
    let difference: Vec<f64> = across.iter().zip(of_layer).map(|(a, b)| a - b).collect();
    Ok(multiply(&difference, &inverse(damped, d)?, d))
}

/// Which rows are no longer than [`MAX_NORM`] times the median.
fn ordinary(rows: Rows<'_>) -> Vec<bool> {
    let norms: Vec<f64> = rows.iter().map(|row| shared::reference::dot(row, row).sqrt()).collect();
    let mut sorted = norms.clone();
    sorted.sort_by(f64::total_cmp);
    let limit = sorted.get(sorted.len() / 2).map_or(0.0, |median| MAX_NORM * median);
    norms.into_iter().map(|norm| norm.is_finite() && norm <= limit).collect()
}

/// `a b` of matrices `[d, d]`.
fn multiply(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    let mut out = vec![0.0; d * d];
    for (out, a) in out.chunks_exact_mut(d).zip(a.chunks_exact(d)) {
        for (&factor, row) in a.iter().zip(b.chunks_exact(d)) {
            out.iter_mut().zip(row).for_each(|(out, b)| *out += factor * b);
        }
    }
    out
}
