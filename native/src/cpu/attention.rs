//! Causal attention on the tiles of [`super::simd`]: scores of eight queries at a time, never a whole score matrix.

use std::ops::Range;

use rayon::prelude::*;
use shared::ShapeError;
use shared::lm::{Heads, QueryKeyValue, masked_softmax};

use super::gemm::Matrix;
use super::packed::Left;
use super::simd::{Kernel, LANES, ROWS, WIDTH};
use crate::train::simd::vectorised;

/// Positions of one piece of work.
const POSITIONS: usize = 32;

/// Attention of whole sequences into rows `out [batch · seq, n_heads · head_dim]`. `kernel` is the one for f32.
///
/// # Errors
/// If the lengths do not fit each other.
pub(crate) fn attend(
    kernel: Kernel,
    heads: &Heads,
    seq: usize,
    inputs: QueryKeyValue<'_>,
    out: &mut [f32],
) -> Result<(), ShapeError> {
    let (d, kv) = (heads.head_dim, heads.n_kv_heads);
    let width = heads.n_heads * d;
    let batch = out.len() / (seq * width).max(1);
    Matrix::new(out, batch * seq, width)?;
    Matrix::new(inputs.queries, batch * seq, width)?;
    Matrix::new(inputs.keys, batch * kv * seq, d)?;
    Matrix::new(inputs.values, batch * kv * seq, d)?;
    if out.is_empty() {
        return Ok(());
    }
    let operands = Operands::new(inputs, seq, d);
    let run = Run { kernel, heads, seq, queries: inputs.queries, operands: &operands };
    out.par_chunks_mut(seq * width)
        .enumerate()
        .flat_map(|(sequence, rows)| {
            let pieces = rows.par_chunks_mut(POSITIONS * width).enumerate();
            pieces.map(move |(i, rows)| (sequence, i * POSITIONS, rows))
        })
        .for_each_init(Vec::new, |scores, (sequence, first, rows)| {
            for head in 0..kv {
                run.piece(sequence * kv + head, head, first, rows, scores);
            }
        });
    Ok(())
}

/// Keys and values of all heads as panels: `[keys / 48][head_dim][48]` and `[head_dim / 48][seq][48]`, the last panel
/// as wide as whole vectors need.
struct Operands {
    keys: Vec<f32>,
    values: Vec<f32>,
    seq: usize,
    d: usize,
}

impl Operands {
    fn new(inputs: QueryKeyValue<'_>, seq: usize, d: usize) -> Self {
        let n = inputs.keys.len() / (seq * d);
        let (wide_seq, wide_d) = (seq.next_multiple_of(LANES), d.next_multiple_of(LANES));
        let mut keys = vec![0f32; n * wide_seq * d];
        let mut values = vec![0f32; n * seq * wide_d];
        keys.par_chunks_mut(wide_seq * d).zip(inputs.keys.par_chunks(seq * d)).for_each(|(to, from)| {
            for (p, panel) in to.chunks_mut(WIDTH * d).enumerate() {
                let width = panel.len() / d;
                for (column, key) in from.chunks_exact(d).skip(p * WIDTH).take(width).enumerate() {
                    for (to, x) in panel[column..].iter_mut().step_by(width).zip(key) {
                        *to = *x;
                    }
                }
            }
        });
        values.par_chunks_mut(seq * wide_d).zip(inputs.values.par_chunks(seq * d)).for_each(|(to, from)| {
            for (p, panel) in to.chunks_mut(WIDTH * seq).enumerate() {
                let width = panel.len() / seq;
                let columns = p * WIDTH..(p * WIDTH + width).min(d);
                for (to, value) in panel.chunks_exact_mut(width).zip(from.chunks_exact(d)) {
                    to[..columns.len()].copy_from_slice(&value[columns.clone()]);
                }
            }
        });
        Self { keys, values, seq, d }
    }

    /// Panel `p` of the keys of head `i`, and its width.
    fn key_panel(&self, i: usize, p: usize) -> (&[u32], usize) {
        let wide = self.seq.next_multiple_of(LANES);
        let width = WIDTH.min(wide - p * WIDTH);
        let start = (i * wide + p * WIDTH) * self.d;
        (bytemuck::cast_slice(&self.keys[start..start + width * self.d]), width)
    }

    /// The part of panel `p` of the values of head `i` that belongs to `keys`, and its width.
    fn value_panel(&self, i: usize, p: usize, keys: &Range<usize>) -> (&[u32], usize) {
        let wide = self.d.next_multiple_of(LANES);
        let width = WIDTH.min(wide - p * WIDTH);
        let start = (i * wide + p * WIDTH) * self.seq;
        (bytemuck::cast_slice(&self.values[start + keys.start * width..start + keys.end * width]), width)
    }
}

struct Run<'a> {
    kernel: Kernel,
    heads: &'a Heads,
    seq: usize,
    queries: &'a [f32],
    operands: &'a Operands,
}

impl Run<'_> {
    /// The query heads of one key head `i` (the `head`-th of its sequence) at the positions of `rows`, from `first` on.
    fn piece(&self, i: usize, head: usize, first: usize, rows: &mut [f32], scores: &mut Vec<f32>) {
        let (d, width) = (self.heads.head_dim, self.heads.n_heads * self.heads.head_dim);
        let group = self.heads.n_heads / self.heads.n_kv_heads;
        let n_queries = rows.len() / width * group;
        let queries = &self.queries[(i * self.seq + first) * group * d..][..n_queries * d];
        for strip in (0..n_queries).step_by(ROWS) {
            let live = ROWS.min(n_queries - strip);
            let position = |query: usize| first + query / group;
            let keys = self.heads.visible(position(strip)).start..position(strip + live - 1) + 1;
            let from = keys.start / WIDTH * WIDTH;
            let wide = keys.end.next_multiple_of(WIDTH) - from;
            scores.resize(ROWS * wide, 0.0);
            let left = Left {
                groups: bytemuck::cast_slice(&queries[strip * d..(strip + live) * d]),
                first: 0,
                len: d,
                stride: d,
                n_rows: live,
            };
            for p in from / WIDTH..keys.end.div_ceil(WIDTH) {
                let (panel, panel_width) = self.operands.key_panel(i, p);
                let to = &mut scores[p * WIDTH - from..];
                left.times(self.kernel, panel, panel_width, to, wide, panel_width, false);
            }
            vectorised(
                #[inline(always)]
                || {
                    for (r, row) in scores.chunks_exact_mut(wide).take(live).enumerate() {
                        let visible = self.heads.visible(position(strip + r));
                        let visible = visible.start - from..visible.end - from;
                        masked_softmax(
                            &mut row[..keys.end - from],
                            visible,
                            self.heads.scale,
                            self.heads.softcap,
                        );
                    }
                },
            );
            let left = Left {
                groups: bytemuck::cast_slice(scores),
                first: keys.start - from,
                len: keys.len(),
                stride: wide,
                n_rows: live,
            };
            for p in 0..d.div_ceil(WIDTH) {
                let (panel, panel_width) = self.operands.value_panel(i, p, &keys);
                let mut mixed = [0f32; ROWS * WIDTH];
                left.times(self.kernel, panel, panel_width, &mut mixed, panel_width, panel_width, false);
                let valid = panel_width.min(d - p * WIDTH);
                for (r, mixed) in mixed.chunks_exact(panel_width).take(live).enumerate() {
                    let query = strip + r;
                    let to = query / group * width + (head * group + query % group) * d + p * WIDTH;
                    rows[to..to + valid].copy_from_slice(&mixed[..valid]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Format;

    /// Causal attention by its definition, in f64.
    fn reference(heads: &Heads, seq: usize, inputs: QueryKeyValue<'_>) -> Vec<f32> {
        let (d, kv, group) = (heads.head_dim, heads.n_kv_heads, heads.n_heads / heads.n_kv_heads);
        let row =
            |x: &[f32], i: usize| x[i * d..(i + 1) * d].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let mut out = Vec::new();
        for (sequence, t) in
            (0..inputs.keys.len() / (d * kv * seq)).flat_map(|s| (0..seq).map(move |t| (s, t)))
        {
            for head in 0..heads.n_heads {
                let i = sequence * kv + head / group;
                let query = row(inputs.queries, (i * seq + t) * group + head % group);
                let first = heads.window.map_or(0, |w| (t + 1).saturating_sub(w));
                let scores = (first..=t).map(|key| {
                    let key = row(inputs.keys, i * seq + key);
                    let s = query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() * f64::from(heads.scale);
                    heads.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh()).exp()
                });
                let scores: Vec<f64> = scores.collect();
                let total: f64 = scores.iter().sum();
                out.extend((0..d).map(|c| {
                    let values = (first..=t).map(|key| f64::from(inputs.values[(i * seq + key) * d + c]));
                    (values.zip(&scores).map(|(v, s)| v * s).sum::<f64>() / total) as f32
                }));
            }
        }
        out
    }

    #[test]
    fn is_attention() {
        let Some(kernel) = Kernel::find(Format::F32) else { return };
        for (seq, d, n_heads, n_kv_heads, window, softcap) in [
            (1, 10, 2, 2, None, None),
            (150, 64, 6, 2, None, Some(2.0)),
            (131, 50, 3, 3, Some(45), None),
            (97, 100, 7, 1, Some(1), None),
            (260, 16, 9, 3, Some(64), None),
        ] {
            let heads = Heads { n_heads, n_kv_heads, head_dim: d, scale: 0.3, softcap, window };
            let batch = 2;
            let values = |n: usize, a: f32| (0..n).map(|i| (i as f32 * a).sin()).collect::<Vec<_>>();
            let q = values(batch * seq * n_heads * d, 0.37);
            let (k, v) =
                (values(batch * seq * n_kv_heads * d, 0.73), values(batch * seq * n_kv_heads * d, 1.3));
            let inputs = QueryKeyValue { queries: &q, keys: &k, values: &v };
            let wanted = reference(&heads, seq, inputs);
            let mut out = vec![f32::NAN; q.len()];
            attend(kernel, &heads, seq, inputs, &mut out).unwrap();
            let largest = out
                .iter()
                .zip(&wanted)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, |m, x| if x > m { x } else { m });
            assert!(out.iter().all(|x| x.is_finite()) && largest < 3e-6, "seq {seq}, d {d}: {largest}");
            assert!(attend(kernel, &heads, seq, inputs, &mut out[1..]).is_err());
        }
    }
}
