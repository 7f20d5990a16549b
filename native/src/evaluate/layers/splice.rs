//! What the language model loses when one layer is replaced by its reconstruction, layer by layer.
//!
//! The untouched model runs once; each layer then goes on from its own block. The divergence is of the model's own distributions,
//! with its final soft-cap. Which positions keep their value, and which predictions count, is as in [`super::super::splice`].

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use shared::Rows;
use shared::lm::{Divergence, NoTap, TokenBatch};
use shared::tap::{Site, TapPoint};

use super::super::Options;
use super::super::splice::{Untouched, Written, counted, kept_positions, start};
use super::{AtLayer, Dictionary};
use crate::model::LoadedModel;
use crate::progress;
use crate::stop::{StopFlag, Stopped};
use crate::store::{Split, Store};

/// Tokens the language model runs at a time: what every layer's pass leaves of them is kept until their predictions are compared.
const TOKENS_PER_PASS: usize = 512;

/// Measured in the language model with one layer replaced; in nats a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSplice {
    /// Predictions compared.
    pub n_predictions: u64,
    /// Loss of the untouched model.
    pub ce_clean: f64,
    /// `CE(spliced) − CE(clean)`.
    pub delta_loss: f64,
    /// Standard error of `delta_loss` over sequences; absent for a single sequence.
    pub delta_loss_error: Option<f64>,
    /// `KL(clean ‖ spliced)` of the predicted distributions.
    pub kl: f64,
}

/// Splices each layer of `dictionary` into `model`, on held-out sequences of `store`.
///
/// # Errors
/// If the model refuses the tokens or has no such tap, or there is nothing to compare.
pub(super) fn all(
    dictionary: &Dictionary<'_>,
    store: &Store,
    model: &LoadedModel,
    options: &Options,
    stop: &StopFlag,
) -> Result<Vec<LayerSplice>> {
    let tokens = store.tokens(Split::HeldOut)?;
    let length = tokens.sequence_length;
    let kept = kept_positions(&tokens, |position, id| store.manifest().keeps(position, id));
    let n = options.sequences.min(tokens.n_sequences());
    let n_layers = dictionary.layers().len();
    let bar = progress::bar((n * length * n_layers) as u64, "splice", "tokens");
    let mut totals: Vec<Totals> = vec![Totals::default(); n_layers];
    let per_pass = (TOKENS_PER_PASS / length.max(1)).max(1);
    for first in (0..n).step_by(per_pass) {
        let range = first * length..(first + per_pass).min(n) * length;
        let batch = TokenBatch::new(&tokens.ids[range.clone()], length)?;
        let pass = Pass::new(dictionary, model, batch, &kept[range.clone()])?;
        let mut changed = Vec::with_capacity(n_layers);
        for layer in 0..n_layers {
            if stop.is_raised() {
                return Err(Stopped.into());
            }
            changed.push(pass.splice(&dictionary.at(layer)?)?);
            bar.inc(range.len() as u64);
        }
        pass.compare(&changed, &mut totals)?;
    }
    bar.finish_and_clear();
    totals.iter().map(Totals::report).collect()
}

/// Some sequences through the untouched model.
struct Pass<'a> {
    model: &'a LoadedModel,
    tokens: TokenBatch<'a>,
    kept: &'a [bool],
    seen: Untouched,
    last: TapPoint,
    clean: Vec<f32>,
}

impl<'a> Pass<'a> {
    fn new(
        dictionary: &Dictionary<'_>,
        model: &'a LoadedModel,
        tokens: TokenBatch<'a>,
        kept: &'a [bool],
    ) -> Result<Self> {
        let last = TapPoint::new(Site::Resid, model.model.spec().n_layers - 1);
        let points = dictionary.layers().iter().map(|layer| layer.tap);
        let mut seen = Untouched::new(points.chain([last]));
        let clean = model.model.forward_nll(tokens, &mut seen)?;
        Ok(Self { model, tokens, kept, seen, last, clean })
    }

    /// The model with one layer replaced.
    fn splice(&self, at: &AtLayer) -> Result<Changed> {
        let subject = &at.subject;
        let input = self.seen.value(subject.input)?;
        let read = at.read(input)?;
        let x = Rows::new(&read, input.width())?;
        let kept: Vec<bool> =
            self.kept.iter().zip(x.iter()).map(|(kept, x)| *kept || !subject.limit.keeps(x)).collect();
        let written = at.write(subject.reconstruct(x, &kept)?)?;
        let model = &self.model.model;
        let last = if subject.input.site == Site::Resid {
            let residual = replaced(input, &written, &kept);
            let (residual, next) = (Rows::new(&residual, input.width())?, subject.input.layer + 1);
            model.forward_last_from(self.tokens, residual, next, &mut NoTap)?
        } else {
            let Some((before, first)) = start(subject.input) else {
                bail!("a multi-layer SAE of {} cannot be spliced", subject.input)
            };
            let mut tap = Written { point: subject.output, rows: Some(written), kept: &kept };
            model.forward_last_from(self.tokens, self.seen.value(before)?, first, &mut tap)?
        };
        Ok(Changed { last, counted: counted(&kept, self.tokens.seq()) })
    }

    /// Adds what each of `changed` loses to its total.
    fn compare(&self, changed: &[Changed], totals: &mut [Totals]) -> Result<()> {
        let untouched = self.seen.value(self.last)?;
        let rows = changed.iter().map(|changed| Rows::new(&changed.last, untouched.width()));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        let found = self.model.model.divergences(self.tokens, untouched, &rows)?;
        for ((changed, found), totals) in changed.iter().zip(found).zip(totals) {
            totals.add(&self.clean, &found, &changed.counted, self.tokens.seq())?;
        }
        Ok(())
    }
}

/// What the last block leaves with one layer replaced, and which predictions count.
struct Changed {
    /// `[tokens, d_model]`.
    last: Vec<f32>,
    counted: Vec<bool>,
}

/// `x` with those rows that are not kept replaced by `written`, in order.
fn replaced(x: Rows<'_>, written: &[f32], kept: &[bool]) -> Vec<f32> {
    let mut out = x.data().to_vec();
    let rows = out.chunks_exact_mut(x.width()).zip(kept).filter(|(_, kept)| !**kept);
    for ((row, _), new) in rows.zip(written.chunks_exact(x.width())) {
        row.copy_from_slice(new);
    }
    out
}

/// Sums of losses, of divergences and of per-sequence differences.
#[derive(Debug, Clone, Default)]
struct Totals {
    n: u64,
    clean: f64,
    kl: f64,
    difference: f64,
    /// Mean difference of each sequence.
    differences: Vec<f64>,
}

impl Totals {
    fn add(&mut self, clean: &[f32], spliced: &[Divergence], counted: &[bool], length: usize) -> Result<()> {
        ensure!(
            [clean.len(), spliced.len()] == [counted.len(); 2],
            "the model made other predictions than asked for"
        );
        let per_sequence = length.saturating_sub(1).max(1);
        for start in (0..counted.len()).step_by(per_sequence) {
            let (mut n, mut difference) = (0u32, 0.0);
            for i in (start..start + per_sequence).filter(|&i| counted[i]) {
                let Divergence { nll, kl } = spliced[i];
                ensure!(nll.is_finite() && kl.is_finite(), "the spliced pass gave a loss of {nll}");
                self.clean += f64::from(clean[i]);
                self.kl += f64::from(kl);
                (n, difference) = (n + 1, difference + f64::from(nll) - f64::from(clean[i]));
            }
            if n > 0 {
                self.n += u64::from(n);
                self.difference += difference;
                self.differences.push(difference / f64::from(n));
            }
        }
        Ok(())
    }

    fn report(&self) -> Result<LayerSplice> {
        ensure!(self.n > 0, "no predictions to compare: give more held-out sequences");
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = self.n as f64;
        Ok(LayerSplice {
            n_predictions: self.n,
            ce_clean: self.clean / n,
            delta_loss: self.difference / n,
            delta_loss_error: super::super::splice::standard_error(&self.differences),
            kl: self.kl / n,
        })
    }
}
