//! What a latent causes: its contribution is taken out at a layer, the model runs on, and later layers are encoded again.

use anyhow::{Context, Result};
use shared::lm::{LmError, Tap, TapAction, Taps, TokenBatch};
use shared::pack::flow::{CHANGES, Change, Effect};
use shared::tap::TapPoint;
use shared::{Codes, Rows};

use super::Dictionary;
use super::texts::{Run, Seen, before};
use crate::features::geometry::largest;
use crate::model::LoadedModel;
use crate::progress;
use crate::stop::StopFlag;

/// For each text the effects of its `most` strongest latents among `described`, each removed at the layer where it is strongest
/// (but the last) on all tokens of the text; strongest first.
///
/// # Errors
/// If the model refuses a text, or a stop is asked for.
pub fn measure(
    runs: &[Run],
    model: &LoadedModel,
    dictionary: &Dictionary<'_>,
    described: &[u32],
    most: usize,
    stop: &StopFlag,
) -> Result<Vec<Vec<Effect>>> {
    let bar = progress::bar((runs.len() * most) as u64, "effects", "latents");
    let mut out = Vec::with_capacity(runs.len());
    for run in runs {
        let mut effects = Vec::new();
        for (latent, layer) in strongest(run, described, most) {
            stop.check()?;
            effects.push(remove(run, model, dictionary, latent, layer)?);
            bar.inc(1);
        }
        out.push(effects);
    }
    bar.finish_and_clear();
    Ok(out)
}

/// Summed activation of each latent.
fn sums(codes: &Codes) -> Vec<f64> {
    let mut sums = vec![0.0f64; codes.n_latents()];
    for (latents, values) in codes.iter() {
        latents.iter().zip(values).for_each(|(&latent, &value)| sums[latent as usize] += f64::from(value));
    }
    sums
}

/// The latents with the most activation in the text at one layer that has layers behind it, and that layer.
fn strongest(run: &Run, described: &[u32], most: usize) -> Vec<(u32, usize)> {
    let behind = run.codes.len().saturating_sub(1);
    let by_layer: Vec<Vec<f64>> = run.codes[..behind].iter().map(sums).collect();
    let best = |&latent: &u32| {
        let each = by_layer.iter().map(|sums| sums[latent as usize]).enumerate();
        let (layer, sum) = each.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)))?;
        (sum > 0.0).then_some((latent, layer, sum))
    };
    let mut all: Vec<(u32, usize, f64)> = described.iter().filter_map(best).collect();
    all.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
    all.into_iter().take(most).map(|(latent, layer, _)| (latent, layer)).collect()
}

/// Subtracts rows from the value at one tap.
struct Remover {
    point: TapPoint,
    rows: Vec<f32>,
}

impl Tap for Remover {
    fn wants(&self, point: TapPoint) -> bool {
        point == self.point
    }

    fn visit(&mut self, _point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        Ok(TapAction::Replace(value.data().iter().zip(&self.rows).map(|(x, out)| x - out).collect()))
    }
}

/// What the latent contributes to the raw vectors of every token, `[t, d]`.
fn contribution(run: &Run, dictionary: &Dictionary<'_>, latent: u32, layer: usize) -> Vec<f32> {
    let sae = dictionary.backend.sae();
    let (direction, scale) = (sae.decoder_direction(latent as usize), dictionary.layers[layer].scale);
    let x = run.vectors.layer(layer);
    let rows = run.codes[layer].iter().zip(x.chunks_exact(sae.dims().d_in));
    let mut out = Vec::with_capacity(x.len());
    for ((latents, values), x) in rows {
        let value = latents.binary_search(&latent).map_or(0.0, |at| f64::from(values[at]));
        let by = value * scale * sae.rows().undo(x).scale;
        #[expect(clippy::cast_possible_truncation, reason = "the language model computes in f32")]
        out.extend(direction.iter().map(|d| (by * f64::from(*d)) as f32));
    }
    out
}

fn remove(
    run: &Run,
    model: &LoadedModel,
    dictionary: &Dictionary<'_>,
    latent: u32,
    layer: usize,
) -> Result<Effect> {
    let point = dictionary.layers[layer].tap;
    let mut remover = Remover { point, rows: contribution(run, dictionary, latent, layer) };
    let later = layer + 1..dictionary.layers.len();
    let mut seen = Seen::of(dictionary.layers[later.clone()].iter().map(|layer| layer.tap));
    let tokens = TokenBatch::new(&run.tokens, run.tokens.len())?;
    let mut taps = Taps::new(vec![&mut remover, &mut seen]);
    let context = || format!("cannot go on without latent {latent} at {point}");
    match before(point) {
        Some((from, first)) => {
            model
                .model
                .forward_taps_from(tokens, run.seen.rows(from)?, first, &mut taps)
                .with_context(context)?;
        }
        None => {
            let last = shared::lm::Until::Layer(model.model.spec().n_layers - 1);
            model.model.forward(tokens, &mut taps, last).with_context(context)?;
        }
    }
    let mut changes = Vec::new();
    for number in later {
        let tap = dictionary.layers[number].tap;
        // A tap inside an earlier block than the one that was changed sees what it saw before.
        if seen.has(tap) {
            let after = run.encode(dictionary, number, seen.rows(tap)?)?;
            changes.extend(changed(number, &run.codes[number], &after));
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "shown to a few digits")]
    let removed = sums(&run.codes[layer])[latent as usize] as f32;
    Ok(Effect { latent, layer: u16::try_from(layer).unwrap_or(u16::MAX), removed, changes })
}

/// The latents whose summed activation changes most, largest change first.
fn changed(layer: usize, before: &Codes, after: &Codes) -> Vec<Change> {
    let (before, after) = (sums(before), sums(after));
    let differences = (0u32..).zip(before.iter().zip(&after).map(|(b, a)| (a - b).abs()));
    #[expect(clippy::cast_possible_truncation, reason = "shown to a few digits")]
    let most = largest(differences.filter(|d| d.1 > 0.0).map(|(latent, d)| (latent, d as f32)), CHANGES);
    #[expect(clippy::cast_possible_truncation, reason = "shown to a few digits")]
    let change = |latent: u32| Change {
        layer: u16::try_from(layer).unwrap_or(u16::MAX),
        latent,
        before: before[latent as usize] as f32,
        after: after[latent as usize] as f32,
    };
    most.into_iter().map(|(latent, _)| change(latent)).collect()
}
