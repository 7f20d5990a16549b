//! The store's training vectors at every layer, encoded: whole sequences, as many as fit into memory.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use shared::metrics::{Density, LayerUse};
use shared::row_scaling::Undo;
use shared::{Codes, CodesBuilder, Rows};

use super::Dictionary;
use crate::evaluate::ENCODE_ROWS;
use crate::features::table::{ActivationTable, TableBuilder};
use crate::input_limit::InputLimit;
use crate::progress;
use crate::stop::StopFlag;
use crate::store::{Shard, Split, Store};

/// Most active (token, layer, latent) triples held; eight bytes each, and 24 while they are regrouped by token.
const MOST_ACTIVE: u64 = 1 << 25;

/// What was encoded.
#[derive(Debug)]
pub struct Corpus {
    /// Codes of the same tokens at each layer, `[L]`; where a token is not encoded at a layer, its row is empty.
    pub layers: Vec<Codes>,
    /// Activations and counts of every latent at every layer.
    pub layer_use: LayerUse,
    /// Of every token, each latent's largest activation at any layer.
    pub table: ActivationTable,
    /// Of every layer, the vectors that were encoded.
    pub vectors: Vec<VectorMoments>,
}

/// Means over the encoded vectors of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct VectorMoments {
    n: u64,
    /// Sum of the vectors in the dictionary's units, `[d_in]`.
    sum: Vec<f64>,
    /// Sum of what a reconstruction is multiplied by where vectors are scaled one by one.
    scales: f64,
}

impl VectorMoments {
    /// Nothing seen of vectors of this width.
    #[must_use]
    pub fn new(width: usize) -> Self {
        Self { n: 0, sum: vec![0.0; width], scales: 0.0 }
    }

    fn add(&mut self, x: &[f32], undo: Undo) {
        self.n += 1;
        self.sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(*x));
        self.scales += undo.scale;
    }

    /// The mean vector, in the dictionary's units; zeros where there was none.
    #[must_use]
    pub fn mean(&self) -> Vec<f64> {
        self.sum.iter().map(|sum| sum / self.count()).collect()
    }

    /// What a latent's contribution is multiplied by on average, before the scalar of the layer.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scales / self.count()
    }

    fn count(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = self.n.max(1) as f64;
        n
    }
}

impl Corpus {
    /// Adds the tokens of the table to `density`.
    ///
    /// # Errors
    /// If it is for another number of latents.
    pub fn add_density(&self, density: &mut Density) -> Result<()> {
        merged(&self.layers)?.iter().try_for_each(|codes| Ok(density.update(codes)?))
    }
}

/// Encodes the training vectors of the first sequences, `wanted` tokens or as many as fit, at every layer.
///
/// # Errors
/// If the store cannot be read, keeps the tokens of layers in different orders, or is stopped.
pub fn encode(dictionary: &Dictionary<'_>, store: &Store, wanted: u64, stop: &StopFlag) -> Result<Corpus> {
    let layers = dictionary.layers;
    let dims = dictionary.backend.sae().dims();
    let mut tokens = store.tokens(Split::Train)?;
    let length = tokens.sequence_length;
    let affordable = affordable(dictionary, store)?;
    if affordable < wanted.min(tokens.ids.len() as u64) {
        tracing::warn!("latents are so often active that only {affordable} tokens fit into memory");
    }
    let sequences = usize::try_from(wanted.min(affordable) / length as u64)?.min(tokens.n_sequences());
    ensure!(sequences > 0, "{wanted} tokens are less than one sequence of {length}");
    tokens.ids.truncate(sequences * length);
    let stored = |(i, id): &(usize, &u32)| store.manifest().keeps(i % length, **id);
    let expected = tokens.ids.iter().enumerate().filter(stored).count();
    let mut builder = TableBuilder::new(tokens.ids, length, dims.n_latents)?;
    let mut codes: Vec<CodesBuilder> = layers.iter().map(|_| CodesBuilder::new(dims.n_latents)).collect();
    let mut layer_use = LayerUse::new(dims.n_latents, layers.len());
    let mut vectors = vec![VectorMoments::new(dims.d_in); layers.len()];
    let bar = progress::bar((expected * layers.len()) as u64, "encode", "vectors");
    let (mut found, mut shard) = (0, Shard::default());
    for index in 0..store.n_shards(Split::Train) {
        if found == expected {
            break;
        }
        let mut places: Option<(Vec<u32>, Vec<u32>)> = None;
        let mut inside: Vec<(usize, u32)> = Vec::new();
        let mut here: Vec<Codes> = Vec::with_capacity(layers.len());
        for (number, layer) in layers.iter().enumerate() {
            store.read_shard_into(layer.tap, Split::Train, index, &mut shard)?;
            match &places {
                None => {
                    let rows = shard.sequences.iter().zip(&shard.positions).enumerate();
                    inside = rows.filter_map(|(row, (&s, &p))| Some((row, builder.token(s, p)?))).collect();
                    places = Some((shard.sequences.clone(), shard.positions.clone()));
                }
                Some((sequences, positions)) => ensure!(
                    *sequences == shard.sequences && *positions == shard.positions,
                    "shard {index} has the tokens of {} in another order than those of {}",
                    layer.tap,
                    layers[0].tap
                ),
            }
            here.push(dictionary.shard_codes(number, &shard, &inside, &mut vectors[number], stop)?);
            bar.inc(inside.len() as u64);
        }
        found += inside.len();
        layer_use.update(&here)?;
        let mut first = 0;
        for rows in merged(&here)? {
            let last = first + rows.n_rows();
            builder.push(inside[first..last].iter().map(|place| place.1).collect(), rows)?;
            first = last;
        }
        codes.iter_mut().zip(&here).try_for_each(|(all, some)| append(all, some))?;
    }
    bar.finish_and_clear();
    let table = builder.finish()?;
    ensure!(table.n_encoded() > 0, "the store has no training vectors");
    Ok(Corpus { layers: codes.into_iter().map(CodesBuilder::finish).collect(), layer_use, table, vectors })
}

impl Dictionary<'_> {
    /// Codes of raw vectors at layer number `layer`, `[n, d_in]`, with an empty row for each beyond the layer's limit, which
    /// are not passed on to `see`.
    ///
    /// # Errors
    /// If a vector is not finite or of another width.
    pub fn encode(&self, layer: usize, raw: Rows<'_>, mut see: impl FnMut(&[f32], Undo)) -> Result<Codes> {
        let Some(info) = self.layers.get(layer) else {
            anyhow::bail!("the dictionary has {} layers, no number {layer}", self.layers.len());
        };
        let limit = InputLimit::new(info.max_input_norm);
        let kept: Vec<bool> = raw.iter().map(|x| limit.keeps(x)).collect();
        let x = info.in_units(&limit.within(raw));
        let x = Rows::new(&x, raw.width())?;
        let sae = self.backend.sae();
        x.iter().for_each(|row| see(row, sae.rows().undo(row)));
        let codes = self.codes(layer, x)?;
        spread(&codes, &kept)
    }

    fn shard_codes(
        &self,
        layer: usize,
        shard: &Shard,
        inside: &[(usize, u32)],
        moments: &mut VectorMoments,
        stop: &StopFlag,
    ) -> Result<Codes> {
        let mut all = CodesBuilder::new(self.backend.sae().dims().n_latents);
        for chunk in inside.chunks(ENCODE_ROWS) {
            stop.check()?;
            let width = shard.width;
            let rows = chunk.iter().flat_map(|&(row, _)| &shard.vectors[row * width..(row + 1) * width]);
            let rows: Vec<f32> = rows.copied().collect();
            append(&mut all, &self.encode(layer, Rows::new(&rows, width)?, |x, undo| moments.add(x, undo))?)?;
        }
        Ok(all.finish())
    }
}

/// How many tokens fit [`MOST_ACTIVE`], judged by the first vectors of the store.
fn affordable(dictionary: &Dictionary<'_>, store: &Store) -> Result<u64> {
    ensure!(store.n_shards(Split::Train) > 0, "the store has no training vectors");
    let (mut active, mut rows, mut shard) = (0u64, 1u64, Shard::default());
    for (number, layer) in dictionary.layers.iter().enumerate() {
        store.read_shard_into(layer.tap, Split::Train, 0, &mut shard)?;
        let some = shard.vectors.len().min(ENCODE_ROWS * shard.width);
        let codes = dictionary.encode(number, Rows::new(&shard.vectors[..some], shard.width)?, |_, _| {})?;
        (active, rows) = (active + codes.n_active() as u64, rows.max(codes.n_rows() as u64));
    }
    // A fifth more than the sample says, and at least one latent a token.
    Ok(MOST_ACTIVE * rows / (active.max(rows) * 6 / 5))
}

/// Codes with an empty row for each that is not kept.
pub(super) fn spread(codes: &Codes, kept: &[bool]) -> Result<Codes> {
    let mut rows = codes.iter();
    let mut builder = CodesBuilder::new(codes.n_latents());
    for &kept in kept {
        if let (true, Some((latents, values))) = (kept, if kept { rows.next() } else { None }) {
            latents.iter().zip(values).for_each(|(&latent, &value)| builder.push(latent, value));
        }
        builder.end_row()?;
    }
    Ok(builder.finish())
}

fn append(all: &mut CodesBuilder, some: &Codes) -> Result<()> {
    for (latents, values) in some.iter() {
        latents.iter().zip(values).for_each(|(&latent, &value)| all.push(latent, value));
        all.end_row()?;
    }
    Ok(())
}

/// Of each row the latents of any layer with their largest activation, some thousand rows at a time.
fn merged(layers: &[Codes]) -> Result<Vec<Codes>> {
    let (n_rows, n_latents) = layers.first().map_or((0, 0), |codes| (codes.n_rows(), codes.n_latents()));
    let pieces: Vec<usize> = (0..n_rows).step_by(ENCODE_ROWS).collect();
    let piece = |&first: &usize| {
        let mut builder = CodesBuilder::new(n_latents);
        let mut row: Vec<(u32, f32)> = Vec::new();
        for i in first..(first + ENCODE_ROWS).min(n_rows) {
            row.clear();
            for (latents, values) in layers.iter().map(|codes| codes.row(i)) {
                row.extend(latents.iter().copied().zip(values.iter().copied()));
            }
            row.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
            row.dedup_by_key(|entry| entry.0);
            row.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row()?;
        }
        Ok(builder.finish())
    };
    pieces.par_iter().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(rows: &[&[(u32, f32)]]) -> Codes {
        let mut builder = CodesBuilder::new(9);
        for row in rows {
            row.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row().unwrap();
        }
        builder.finish()
    }

    #[test]
    fn a_token_has_each_latent_once_with_its_largest_activation() {
        let layers = [
            codes(&[&[(1, 2.0), (4, 1.0)], &[]]),
            codes(&[&[(0, 0.5), (4, 3.0)], &[]]),
            codes(&[&[(4, 2.0)], &[(8, 1.0)]]),
        ];
        let wanted = codes(&[&[(0, 0.5), (1, 2.0), (4, 3.0)], &[(8, 1.0)]]);
        assert_eq!(merged(&layers).unwrap(), [wanted]);
        assert!(merged(&[]).unwrap().is_empty());
    }

    #[test]
    fn rows_that_are_not_kept_are_empty() {
        let some = codes(&[&[(1, 2.0)], &[(3, 1.0)]]);
        let wanted = codes(&[&[], &[(1, 2.0)], &[], &[(3, 1.0)]]);
        assert_eq!(spread(&some, &[false, true, false, true]).unwrap(), wanted);
    }

    #[test]
    fn moments_by_hand() {
        let mut moments = VectorMoments::new(2);
        assert_eq!(moments.mean(), [0.0, 0.0]);
        moments.add(&[1.0, 3.0], Undo { scale: 2.0, shift: 0.0 });
        moments.add(&[2.0, -3.0], Undo { scale: 1.0, shift: 0.0 });
        assert_eq!((moments.mean(), moments.scale()), (vec![1.5, 0.0], 1.5));
    }
}
