//! The end of a run: the released autoencoder, its metrics on held-out vectors, and `run.json`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::config::train::TrainConfig;
use shared::metrics::{Fvu, L0};
use shared::multi_layer::{Layer, MultiLayer};
use shared::{Rows, Sae};

use super::checkpoint::{self, State};
use super::log::Line;
use super::normalise::{Normalisation, Scaling};
use super::params::Params;
use super::run::Run;
use crate::cpu::CpuBackend;
use crate::files::write_bytes;
use crate::input_limit;
use crate::sae_files::{SaeFile, release};

/// Held-out vectors that the final metrics are taken on.
const HELD_OUT_ROWS: usize = 20_000;

/// How a run ended, also written to `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Steps taken.
    pub steps: u64,
    /// Vectors trained on.
    pub tokens: u64,
    /// Mean L0 over the last tenth of the steps.
    pub l0: f64,
    /// FVU over the last tenth of the steps.
    pub fvu: f64,
    /// Share of latents that did not fire within the dead window.
    pub dead: f64,
    /// Mean L0 on held-out vectors, when there are some.
    pub held_out_l0: Option<f64>,
    /// FVU on held-out vectors, when there are some.
    pub held_out_fvu: Option<f64>,
    /// Batches not learned from.
    pub skipped: u64,
    /// How often earlier parameters were taken up again.
    pub rolled_back: u32,
    /// Training speed of this process, over all its steps.
    pub tokens_per_s: f64,
}

/// `run.json`: what was done, to which data, with what result.
#[derive(Serialize, Deserialize)]
struct RunFile {
    writer: String,
    identity: Value,
    config: TrainConfig,
    data: Value,
    /// The scalar C of each tap that was read.
    scales: Vec<f64>,
    /// That of a transcoder's targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    target_scale: Option<f64>,
    /// Raw vectors longer than this were not trained on, tap by tap.
    max_input_norms: Vec<Option<f64>>,
    metrics: Summary,
}

/// The summary of a finished run in `out`.
pub(super) fn finished(out: &Path, identity: &Value) -> Result<Option<Summary>> {
    let path = out.join("run.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: RunFile =
        serde_json::from_str(&text).with_context(|| format!("{} is not a training run", path.display()))?;
    if file.identity != *identity {
        bail!("{} holds another finished run; give another --out, or remove it", out.display());
    }
    Ok(Some(file.metrics))
}

impl Run<'_> {
    /// Writes the autoencoder and what is to be said of it.
    pub(super) fn finish(&mut self) -> Result<Summary> {
        self.settle()?;
        self.fetch()?;
        let elapsed = self.started.elapsed().as_secs_f64();
        let batch = self.config.batch as u64;
        let State { trainer, guard, dead, .. } = &self.state;
        let (l0, fvu) = self.last_tenth()?;
        let file = self.release()?;
        let (held_out_l0, held_out_fvu) = self.held_out(&file)?;
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let metrics = Summary {
            steps: trainer.step,
            tokens: trainer.step * batch,
            l0,
            fvu,
            dead: dead.share_within(self.config.dead_window.0).unwrap_or(0.0),
            held_out_l0,
            held_out_fvu,
            skipped: guard.skipped,
            rolled_back: guard.rolled_back,
            tokens_per_s: ((trainer.step - self.first_step) * batch) as f64 / elapsed.max(1e-9),
        };
        release(&self.out, &file)?;
        checkpoint::save(&self.out, &self.state, &self.identity)?;
        let Scaling { inputs, target, .. } = &self.state.scaling;
        let file = RunFile {
            writer: format!("stratascope {}", env!("CARGO_PKG_VERSION")),
            identity: self.identity.clone(),
            config: self.config.clone(),
            data: self.wiring.provenance(&**self.source),
            scales: inputs.iter().map(|input| input.scale).collect(),
            target_scale: target.as_ref().map(|target| target.scale),
            max_input_norms: inputs.iter().map(limit).collect(),
            metrics: metrics.clone(),
        };
        // Last: its presence says that the run is finished.
        write_bytes(&self.out.join("run.json"), &serde_json::to_vec_pretty(&file)?)?;
        Ok(metrics)
    }

    /// The autoencoder as others use it.
    fn release(&self) -> Result<SaeFile> {
        let State { trainer, scaling, .. } = &self.state;
        let mut parts = trainer.params.release(scaling.released())?.into_parts();
        parts.rows = scaling.rows;
        let (mut metadata, taps) = (self.source.metadata(), self.source.taps());
        metadata.target = self.wiring.target.and_then(|target| taps[target].point);
        let mut keep = |key: &str, value: Value| metadata.provenance.insert(key.to_owned(), value);
        keep("training", json!(self.config));
        keep("data", self.wiring.provenance(&**self.source));
        match (&self.wiring.inputs[..], &scaling.inputs[..]) {
            ([tap], [input]) if self.config.layers.is_none() => {
                keep(input_limit::PROVENANCE_KEY, json!(limit(input)));
                metadata.tap = taps[*tap].point;
            }
            (inputs, scales) => {
                let shared = scaling.released().input;
                let layer = |(tap, of): (&usize, &Normalisation)| {
                    let tap = taps[*tap].point.context("a layer without a name")?;
                    Ok(Layer { tap, scale: of.scale / shared, max_input_norm: limit(of) })
                };
                let all = inputs.iter().zip(scales).map(layer).collect::<Result<Vec<_>>>()?;
                let layers = MultiLayer::new(all, thresholds_of_layers(&trainer.params, shared));
                let lens: Vec<_> = inputs.iter().filter_map(|&tap| self.source.translator(tap)).collect();
                metadata.layers = Some(if lens.is_empty() { layers } else { layers.behind(lens)? });
            }
        }
        Ok(SaeFile { sae: Sae::new(parts)?, metadata })
    }

    /// L0 and FVU over the log lines of the last tenth of the steps.
    fn last_tenth(&self) -> Result<(f64, f64)> {
        let text = fs::read_to_string(self.out.join("log.jsonl")).context("cannot read the log back")?;
        let lines: Vec<Line> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let from = self.config.total_steps() - self.config.total_steps() / 10;
        let last: Vec<&Line> = lines.iter().filter(|line| line.step >= from).collect();
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let n = last.len().max(1) as f64;
        Ok((last.iter().map(|l| l.l0).sum::<f64>() / n, last.iter().map(|l| l.fvu).sum::<f64>() / n))
    }

    /// L0 and FVU of the released weights on vectors that were never trained on, outliers left out as in training. The FVU of
    /// several taps is the mean of theirs.
    fn held_out(&self, file: &SaeFile) -> Result<(Option<f64>, Option<f64>)> {
        let Scaling { inputs, target, .. } = &self.state.scaling;
        let rows = HELD_OUT_ROWS.div_ceil(inputs.len());
        let mut raw = self.source.held_out(&self.wiring.taps(), rows)?;
        let y = target.as_ref().and_then(|_| raw.pop());
        let [d_in, d_out] = self.wiring.widths(&**self.source);
        let (mut l0, mut fvus) = (L0::new(), Vec::new());
        for (number, (x, input)) in raw.iter().zip(inputs).enumerate() {
            let y = y.as_deref().unwrap_or(x);
            let keeps = |(x, y): &(&[f32], &[f32])| {
                input.keeps(x) && target.as_ref().is_none_or(|target| target.keeps(y))
            };
            let kept = x.chunks_exact(d_in).zip(y.chunks_exact(d_out)).filter(keeps);
            let (x, y): (Vec<&[f32]>, Vec<&[f32]>) = kept.unzip();
            let layers = file.metadata.layers.as_ref();
            // The source has translated them.
            let sae =
                layers.map_or_else(|| Ok(file.sae.clone()), |all| all.of_translated(&file.sae, number))?;
            let backend = CpuBackend::new(sae);
            let mut fvu = Fvu::new(d_out);
            for (x, y) in x.chunks(1024).zip(y.chunks(1024)) {
                let (x, y) = (x.concat(), y.concat());
                let x = Rows::new(&x, d_in)?;
                let codes = backend.encode(x)?;
                l0.update(&codes);
                fvu.update(Rows::new(&y, d_out)?, Rows::new(&backend.decode(x, &codes)?, d_out)?)?;
            }
            fvus.extend(fvu.value());
        }
        #[expect(clippy::cast_precision_loss, reason = "a number of taps")]
        let mean = (!fvus.is_empty()).then(|| fvus.iter().sum::<f64>() / fvus.len() as f64);
        Ok((l0.mean(), mean))
    }
}

/// θ of every layer `[L, n]` in the units of the released weights, where layers have their own.
fn thresholds_of_layers(params: &Params, scale: f64) -> Vec<f32> {
    let (n, n_layers, thetas) = (params.n_latents(), params.n_layers(), params.thetas());
    if n_layers == 1 {
        return Vec::new();
    }
    // A raw θ may have gone below zero, where latents never are.
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    let released = |theta: f32| (scale * f64::from(theta.max(0.0))) as f32;
    (0..n_layers)
        .flat_map(|layer| (0..n).map(move |latent| latent * n_layers + layer))
        .map(|at| released(thetas[at]))
        .collect()
}

/// The norm above which raw vectors are left out, when there is one.
fn limit(normalisation: &Normalisation) -> Option<f64> {
    Some(normalisation.limit).filter(|limit| limit.is_finite())
}
