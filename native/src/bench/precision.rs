//! What a number format costs: activations and next-token losses beside those in f32.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use shared::lm::{LanguageModel, LmError, Tap, TapAction, TokenBatch, Until};
use shared::tap::TapPoint;
use shared::{Precision, Rows};

use super::ids_of;
use crate::model;

/// Tokens of a sequence.
const LENGTH: usize = 256;

/// ‖Δ‖ / ‖f32‖ over all tokens at one tap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TapError {
    /// Where.
    pub point: TapPoint,
    /// The relative error.
    pub error: f64,
}

/// A format beside f32 on the same text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrecisionReport {
    /// The number format.
    pub precision: Precision,
    /// Tokens run.
    pub tokens: usize,
    /// Mean next-token loss in f32, nats.
    pub loss_f32: f64,
    /// Mean next-token loss in this format.
    pub loss: f64,
    /// Mean absolute difference of the loss of a token.
    pub loss_difference: f64,
    /// Relative errors of all taps, in the order of the model.
    pub taps: Vec<TapError>,
}

impl PrecisionReport {
    /// The tap with the largest error.
    #[must_use]
    pub fn worst(&self) -> Option<TapError> {
        self.taps.iter().copied().max_by(|a, b| a.error.total_cmp(&b.error))
    }
}

/// Sums of squares: differences, and the reference.
type Sums = BTreeMap<TapPoint, (f64, f64)>;

#[derive(Default)]
struct Kept(BTreeMap<TapPoint, Vec<f32>>);

impl Tap for Kept {
    fn wants(&self, _: TapPoint) -> bool {
        true
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.0.insert(point, value.data().to_vec());
        Ok(TapAction::Keep)
    }
}

/// Runs about `tokens` tokens of `text` in f32 and in `precision`.
///
/// # Errors
/// If model or text cannot be read, or the text is shorter.
pub fn compare(path: &Path, text: &Path, precision: Precision, tokens: usize) -> Result<PrecisionReport> {
    let reference = model::load(path)?;
    let (other, _) = model::load_weights_as(path, precision)?;
    let batch = tokens.div_ceil(LENGTH).max(1);
    let ids = ids_of(text, &reference.tokenizer, batch, LENGTH)?;
    let (mut sums, mut losses) = (Sums::new(), Vec::new());
    for ids in ids.chunks_exact(LENGTH) {
        let (wanted, wanted_losses) = run(&reference.model, ids)?;
        let (found, found_losses) = run(&other, ids)?;
        for (point, wanted) in &wanted {
            let found = found.get(point).context("the two formats have other taps")?;
            ensure!(found.len() == wanted.len(), "{point} has another size");
            let sum = sums.entry(*point).or_default();
            for (&found, &wanted) in found.iter().zip(wanted) {
                sum.0 += (f64::from(found) - f64::from(wanted)).powi(2);
                sum.1 += f64::from(wanted).powi(2);
            }
        }
        losses.extend(wanted_losses.into_iter().zip(found_losses));
    }
    let mean = |f: &dyn Fn(f64, f64) -> f64| {
        let each = losses.iter().map(|&(wanted, found)| f(f64::from(wanted), f64::from(found)));
        each.sum::<f64>() / losses.len() as f64
    };
    Ok(PrecisionReport {
        precision,
        tokens: ids.len(),
        loss_f32: mean(&|wanted, _| wanted),
        loss: mean(&|_, found| found),
        loss_difference: mean(&|wanted, found| (found - wanted).abs()),
        taps: sums.into_iter().map(|(point, (d, r))| TapError { point, error: (d / r).sqrt() }).collect(),
    })
}

fn run(model: &LanguageModel, ids: &[u32]) -> Result<(BTreeMap<TapPoint, Vec<f32>>, Vec<f32>)> {
    let tokens = TokenBatch::new(ids, ids.len())?;
    let mut kept = Kept::default();
    let logits = model.forward(tokens, &mut kept, Until::Logits)?.context("no logits")?;
    Ok((kept.0, shared::lm::nll(&logits, model.spec().vocab_size, tokens)))
}
