//! The controls of a multi-layer SAE: one autoencoder of each layer, alike in everything else.

use anyhow::{Context, Result};
use shared::config::train::{Thresholds, TrainConfig};

use super::source::{ActivationSource, Wiring};
use super::suite::Job;

/// `jobs` with one for each layer in place of those with `each_layer`, named and kept as `NAME/resid.14`. Each of them is what a
/// configuration with that `tap` alone would be.
///
/// # Errors
/// If `source` does not have the layers.
pub fn spread(jobs: Vec<Job>, source: &dyn ActivationSource) -> Result<Vec<Job>> {
    let mut all = Vec::new();
    for job in jobs {
        if !job.config.each_layer {
            all.push(job);
            continue;
        }
        let wiring = Wiring::of(&job.config, source).with_context(|| job.name.clone())?;
        for &tap in &wiring.inputs {
            let point = source.taps()[tap].point.context("a layer without a name")?;
            let name = if job.name.is_empty() { point.to_string() } else { format!("{}/{point}", job.name) };
            let config = TrainConfig {
                tap: Some(point),
                layers: None,
                sites: TrainConfig::default().sites,
                each_layer: false,
                // Which are the same where there is one layer.
                thresholds: Thresholds::PerLatent,
                ..job.config.clone()
            };
            all.push(Job { name, config, out: job.out.join(point.to_string()) });
        }
    }
    Ok(all)
}
