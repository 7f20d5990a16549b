//! Held-out vectors of the same tokens at every layer, encoded and fed to the metrics.
//!
//! A shard is read a layer at a time, and its codes are kept until all layers have theirs; activations are compared between layers
//! in units of the layer's scale, in which the dictionary was trained.

use anyhow::{Result, ensure};
use shared::metrics::{Fvu, L0, LayerCosine, LayerOverlap, LayerUse, LayerVariance};
use shared::{Codes, CodesBuilder, Rows};

use super::super::ENCODE_ROWS;
use super::{AtLayer, Dictionary};
use crate::progress;
use crate::stop::{StopFlag, Stopped};
use crate::store::{Shard, Split, Store};

/// What was seen at one layer.
#[derive(Debug)]
pub struct LayerMeters {
    /// Error and variance, of vectors in raw units.
    pub fvu: Fvu,
    /// The same before a lens is undone.
    pub fvu_translated: Option<Fvu>,
    /// Active latents.
    pub l0: L0,
    /// Vectors left out for their norm.
    pub n_outliers: u64,
}

/// What was seen at all layers.
#[derive(Debug)]
pub struct Encoded {
    /// Layer by layer.
    pub layers: Vec<LayerMeters>,
    /// Where latents were active.
    pub layer_use: LayerUse,
    /// How their layer varies.
    pub variance: LayerVariance,
    /// Latents active at neighbouring layers.
    pub overlap: LayerOverlap,
    /// Vectors of neighbouring layers.
    pub cosines: Vec<LayerCosine>,
}

/// Encodes all held-out vectors of `store` at the layers of `dictionary`. A vector that is too long at a layer has no active latent
/// there, and no part in that layer's figures.
///
/// # Errors
/// If the store cannot be read, or holds no held-out vectors.
pub(super) fn held_out(dictionary: &Dictionary<'_>, store: &Store, stop: &StopFlag) -> Result<Encoded> {
    let (n_layers, n_latents) = (dictionary.layers().len(), dictionary.n_latents());
    let n_vectors = store.n_vectors(Split::HeldOut);
    ensure!(n_vectors > 0, "the store has no held-out vectors; harvest with a held-out share");
    let width = dictionary.file.sae.dims().d_in;
    let mut encoded = Encoded {
        layers: (0..n_layers)
            .map(|layer| LayerMeters {
                fvu: Fvu::new(width),
                fvu_translated: dictionary.layers.translator(layer).map(|_| Fvu::new(width)),
                l0: L0::default(),
                n_outliers: 0,
            })
            .collect(),
        layer_use: LayerUse::new(n_latents, n_layers),
        variance: LayerVariance::new(n_latents, n_layers),
        overlap: LayerOverlap::new(n_latents, n_layers),
        cosines: dictionary
            .layers()
            .windows(2)
            .map(|pair| Ok(LayerCosine::new([store.mean(pair[0].tap)?, store.mean(pair[1].tap)?])))
            .collect::<Result<_>>()?,
    };
    let bar = progress::bar(n_vectors * n_layers as u64, "encode", "vectors");
    for index in 0..store.n_shards(Split::HeldOut) {
        // The codes of each batch of rows, layer by layer.
        let mut batches: Vec<Vec<Codes>> = Vec::new();
        let mut below: Option<(Shard, Vec<bool>)> = None;
        for layer in 0..n_layers {
            let at = dictionary.at(layer)?;
            let shard = store.read_shard(at.subject.input, Split::HeldOut, index)?;
            let raw = Rows::new(&shard.vectors, shard.width)?;
            let read = at.read(raw)?;
            let x = Rows::new(&read, shard.width)?;
            let kept: Vec<bool> = x.iter().map(|row| at.subject.limit.keeps(row)).collect();
            batches.resize_with(x.n_rows().div_ceil(ENCODE_ROWS), Vec::new);
            for (batch, codes) in batches.iter_mut().enumerate() {
                if stop.is_raised() {
                    return Err(Stopped.into());
                }
                let rows = batch * ENCODE_ROWS..((batch + 1) * ENCODE_ROWS).min(x.n_rows());
                let meters = &mut encoded.layers[layer];
                let here = [raw, x].map(|x| x.slice(rows.start, rows.end));
                let scale = dictionary.layers()[layer].scale;
                codes.push(meters.encode(&at, here, &kept[rows.clone()], scale)?);
                bar.inc(rows.len() as u64);
            }
            if let Some((below, kept_below)) = &below {
                let both: Vec<bool> = kept.iter().zip(kept_below).map(|(a, b)| *a && *b).collect();
                let lower = chosen(Rows::new(&below.vectors, below.width)?, &both);
                let upper = chosen(raw, &both);
                encoded.cosines[layer - 1].update([Rows::new(&lower, width)?, Rows::new(&upper, width)?])?;
            }
            drop(read);
            below = Some((shard, kept));
        }
        let Encoded { layer_use, variance, overlap, .. } = &mut encoded;
        let (one, (two, three)) = rayon::join(
            || batches.iter().try_for_each(|layers| variance.update(layers)),
            || {
                rayon::join(
                    || batches.iter().try_for_each(|layers| overlap.update(layers)),
                    || batches.iter().try_for_each(|layers| layer_use.update(layers)),
                )
            },
        );
        one.and(two).and(three)?;
    }
    bar.finish_and_clear();
    Ok(encoded)
}

impl LayerMeters {
    /// Encodes and decodes the kept rows of `x`, of which `raw` was read; the codes of all rows, in units of `scale`.
    fn encode(&mut self, at: &AtLayer, [raw, x]: [Rows<'_>; 2], kept: &[bool], scale: f64) -> Result<Codes> {
        let within = chosen(x, kept);
        let rows = Rows::new(&within, x.width())?;
        let codes = at.subject.backend.encode(rows)?;
        let reconstruction = at.subject.backend.decode(rows, &codes)?;
        if let Some(fvu) = &mut self.fvu_translated {
            fvu.update(rows, Rows::new(&reconstruction, x.width())?)?;
        }
        let reconstruction = at.write(reconstruction)?;
        let wanted = chosen(raw, kept);
        self.fvu.update(Rows::new(&wanted, x.width())?, Rows::new(&reconstruction, x.width())?)?;
        self.l0.update(&codes);
        self.n_outliers += (x.n_rows() - rows.n_rows()) as u64;
        in_units(&codes, kept, scale)
    }
}

/// The codes of all rows, given those of the rows that are kept: values divided by `scale`, nothing active in the others.
pub(super) fn in_units(codes: &Codes, kept: &[bool], scale: f64) -> Result<Codes> {
    let mut builder = CodesBuilder::new(codes.n_latents());
    let mut found = codes.iter();
    for kept in kept {
        if let Some((latents, values)) = if *kept { found.next() } else { None } {
            for (&latent, &value) in latents.iter().zip(values) {
                #[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
                builder.push(latent, (f64::from(value) / scale) as f32);
            }
        }
        builder.end_row()?;
    }
    Ok(builder.finish())
}

/// The rows whose `kept` is true, in order.
pub(super) fn chosen(x: Rows<'_>, kept: &[bool]) -> Vec<f32> {
    x.iter().zip(kept).filter(|(_, kept)| **kept).flat_map(|(row, _)| row).copied().collect()
}
