//! The options by which `lm score` steers a model: a latent's decoder direction, added at a tap.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use shared::lm::{LanguageModel, Steerer, TokenBatch, Tokenizer};
use shared::tap::TapPoint;

use crate::sae_files;

/// What is added where.
#[derive(Debug, clap::Args)]
pub(super) struct SteerArgs {
    /// Also score the model steered by a latent of this autoencoder: `alpha` times the latent's decoder direction is
    /// added to the activation of every token but special ones.
    #[arg(long, value_name = "SAE", requires = "latent", requires = "alpha")]
    steer: Option<PathBuf>,
    /// The latent, counted from 0.
    #[arg(long, requires = "steer")]
    latent: Option<usize>,
    /// How much of the direction is added, in the units of the model's activations.
    #[arg(long, requires = "steer", allow_negative_numbers = true)]
    alpha: Option<f32>,
    /// Where it is added, such as resid.14; the autoencoder's own tap unless given.
    #[arg(long, requires = "steer", value_name = "TAP")]
    at: Option<TapPoint>,
}

/// A direction of the model, ready to be added.
#[derive(Debug)]
pub(super) struct Steering {
    point: TapPoint,
    direction: Vec<f32>,
    alpha: f32,
}

impl SteerArgs {
    /// What is asked for, if anything is, checked against the model.
    pub(super) fn read(&self, model: &LanguageModel) -> Result<Option<Steering>> {
        let (Some(path), Some(latent), Some(alpha)) = (&self.steer, self.latent, self.alpha) else {
            return Ok(None);
        };
        ensure!(alpha.is_finite(), "--alpha is {alpha}, expected a finite number");
        let file = sae_files::read(path)?;
        let point = self.at.or(file.metadata.tap).with_context(|| {
            format!("{} does not say which tap it belongs to; name it with --at", path.display())
        })?;
        let (dims, spec) = (file.sae.dims(), model.spec());
        let n = dims.n_latents;
        ensure!(latent < n, "{} has latents 0..={}, not {latent}", path.display(), n.saturating_sub(1));
        ensure!(point.layer < spec.n_layers, "{point}: the model has layers 0..={}", spec.n_layers - 1);
        let (found, wanted) = (dims.d_out, spec.site_width(point.site));
        ensure!(found == wanted, "{}: directions of {found} values, {point} has {wanted}", path.display());
        Ok(Some(Steering { point, direction: file.sae.decoder_direction(latent).to_vec(), alpha }))
    }
}

impl Steering {
    /// The tap that adds the direction to every token of `batch` but special ones.
    pub(super) fn tap(&self, batch: TokenBatch<'_>, tokenizer: &Tokenizer) -> Steerer {
        let special = tokenizer.special_ids();
        let keep = batch.ids().iter().map(|id| special.binary_search(id).is_ok()).collect();
        Steerer::new(self.point, keep, &self.direction, self.alpha)
    }

    /// What is done, for messages.
    pub(super) fn describe(&self) -> String {
        let length = self.direction.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        format!("{} times a direction of length {length:.3} added at {}", self.alpha, self.point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;
    use crate::sae_files::{SaeFile, SaeFormat};
    use shared::format::SaeMetadata;
    use shared::{Activation, RowScaling, Sae, SaeParts};
    use std::path::Path;

    fn sae(d: usize, tap: Option<&str>) -> SaeFile {
        let parts = SaeParts {
            d_in: d,
            d_out: d,
            w_enc: vec![0.5; 2 * d],
            b_enc: vec![0.0; 2],
            w_dec: (0..2 * d).map(|i| i as f32).collect(),
            b_dec: vec![0.0; d],
            activation: Activation::JumpRelu { threshold: vec![1.0; 2] },
            w_skip: None,
            rows: RowScaling::None,
        };
        let metadata = SaeMetadata { tap: tap.map(|t| t.parse().unwrap()), ..SaeMetadata::default() };
        SaeFile { sae: Sae::new(parts).unwrap(), metadata }
    }

    #[test]
    fn steering_takes_the_latents_direction_and_the_autoencoders_tap() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lm/llama");
        let (model, _) = model::load_weights(&golden).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sae");
        let d = model.spec().d_model;
        sae_files::write(&path, SaeFormat::SaeLens, &sae(d, Some("resid.1"))).unwrap();
        let args = |latent, alpha, at: Option<&str>| SteerArgs {
            steer: Some(path.clone()),
            latent: Some(latent),
            alpha: Some(alpha),
            at: at.map(|t| t.parse().unwrap()),
        };
        let steering = args(1, -2.5, None).read(&model).unwrap().unwrap();
        assert_eq!((steering.point.to_string().as_str(), steering.alpha), ("resid.1", -2.5));
        assert_eq!(steering.direction, (d..2 * d).map(|i| i as f32).collect::<Vec<_>>());
        let steering = args(0, 1.0, Some("mlp_in.2")).read(&model).unwrap().unwrap();
        assert_eq!(steering.point.to_string(), "mlp_in.2");
        let refused = |args: SteerArgs, what: &str| {
            let error = format!("{:#}", args.read(&model).unwrap_err());
            assert!(error.contains(what), "{error}");
        };
        refused(args(2, 1.0, None), "latents 0..=1");
        refused(args(0, f32::NAN, None), "finite");
        refused(args(0, 1.0, Some("resid.3")), "layers 0..=2");
        refused(args(0, 1.0, Some("attn.0")), "attn.0 has 36");
        sae_files::write(&path, SaeFormat::SaeLens, &sae(d, None)).unwrap();
        refused(args(0, 1.0, None), "--at");
        let nothing = SteerArgs { steer: None, latent: None, alpha: None, at: None };
        assert!(nothing.read(&model).unwrap().is_none());
    }
}
