//! Attention in pieces against its definition.

use super::*;
use crate::lm::Serial;

/// Causal attention by its definition, in f64.
fn attention(qkv: &[f32], heads: &Heads, inverse: &[f32], seq: usize) -> Vec<f32> {
    let (d, width, group) = (heads.head_dim, heads.qkv_width(), heads.n_heads / heads.n_kv_heads);
    let rotated = |row: usize, head: usize| -> Vec<f64> {
        let x = &qkv[row * width + head * d..row * width + (head + 1) * d];
        let pair = |i: usize| {
            let angle = f64::from((row % seq) as f32 * inverse[i % (d / 2)]);
            let (a, b) = (f64::from(x[i % (d / 2)]), f64::from(x[i % (d / 2) + d / 2]));
            if i < d / 2 { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() }
        };
        (0..d).map(pair).collect()
    };
    let mut out = Vec::new();
    for row in 0..qkv.len() / width {
        for head in 0..heads.n_heads {
            let query = rotated(row, head);
            let first = row - row % seq;
            let keys = (first..=row).filter(|key| heads.window.is_none_or(|w| key + w > row));
            let weights: Vec<(usize, f64)> = keys
                .map(|key| {
                    let k = rotated(key, heads.n_heads + head / group);
                    let s = query.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() * f64::from(heads.scale);
                    let capped = heads.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
                    (key, capped.exp())
                })
                .collect();
            let total: f64 = weights.iter().map(|w| w.1).sum();
            let value = (heads.n_heads + heads.n_kv_heads + head / group) * d;
            out.extend((0..d).map(|i| {
                let mixed = weights.iter().map(|(key, w)| w * f64::from(qkv[key * width + value + i]));
                (mixed.sum::<f64>() / total) as f32
            }));
        }
    }
    out
}

#[test]
fn tiled_attention_is_attention() {
    let ops = CandleOps::new(Arc::new(Serial));
    for (seq, window, softcap) in
        [(1, None, None), (150, None, Some(2.0)), (300, Some(45), None), (131, Some(1), None)]
    {
        let heads = Heads { n_heads: 6, n_kv_heads: 2, head_dim: 10, scale: 0.3, softcap, window };
        let n = 2 * seq * heads.qkv_width();
        let qkv: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * 1.5).collect();
        let inverse: Vec<f32> = (0..5).map(|i| 0.3f32.powi(i)).collect();
        let wanted = attention(&qkv, &heads, &inverse, seq);
        let rope = ops.rope(&inverse, seq).unwrap();
        let rows = ops.upload(qkv, heads.qkv_width()).unwrap();
        let found = ops.attention(&rows, &rope, None, &heads, seq).unwrap();
        let largest = ops.read(&found, |rows| {
            assert_eq!(rows.data().len(), wanted.len());
            Ok(rows.data().iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max))
        });
        assert!(largest.unwrap() < 2e-6, "seq {seq}, window {window:?}");
    }
}
