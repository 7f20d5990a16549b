//! What a training configuration must satisfy that types cannot say.

use super::{LatentFunction, Layers, Normalise, ThresholdInit, Thresholds, TrainConfig};
use crate::config::ConfigError;
use crate::loss::AuxForm;

impl TrainConfig {
    /// Checks what types cannot say, key by key and across keys.
    ///
    /// # Errors
    /// Names the key, its value and what is allowed.
    pub fn check(&self) -> Result<(), ConfigError> {
        let positive: [(&'static str, f64); 4] = [
            ("lr", self.lr),
            ("threshold_lr", self.threshold_lr),
            ("bandwidth", self.bandwidth),
            ("target_weight", self.target_weight),
        ];
        for (key, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::value(key, value, "a positive number"));
            }
        }
        if self.width == 0 || u32::try_from(self.width).is_err() {
            return Err(ConfigError::value("width", self.width, "at least 1 and below 2^32"));
        }
        if self.target.is_some() && self.target == self.tap {
            return Err(ConfigError::value("target", "the tap itself", "another tap, or none"));
        }
        self.check_layers()?;
        if self.skip && self.target.is_none() {
            return Err(ConfigError::value("skip", self.skip, "false: only a transcoder (target) can skip"));
        }
        if !(1..1 << 24).contains(&self.batch) {
            return Err(ConfigError::value("batch", self.batch, "from 1 to 2^24"));
        }
        if self.total_steps() == 0 {
            return Err(ConfigError::value("tokens", self.tokens, "at least one batch"));
        }
        if !(0.0..=1.0).contains(&self.lr_decay_share) {
            return Err(ConfigError::value("lr_decay_share", self.lr_decay_share, "from 0 to 1"));
        }
        if self.log_every == 0 || self.checkpoint_every == 0 {
            return Err(ConfigError::value("log_every and checkpoint_every", 0, "at least 1"));
        }
        if !(self.checkpoint_minutes.is_finite() && self.checkpoint_minutes > 0.0) {
            return Err(ConfigError::value(
                "checkpoint_minutes",
                self.checkpoint_minutes,
                "a positive number",
            ));
        }
        if !(self.max_norm == 0.0 || (self.max_norm.is_finite() && self.max_norm >= 1.0)) {
            return Err(ConfigError::value("max_norm", self.max_norm, "0 or at least 1"));
        }
        if let ThresholdInit::Value(value) = self.threshold_init
            && !(value.is_finite() && value > 0.0)
        {
            return Err(ConfigError::value("threshold_init", value, "a positive number or \"quantile\""));
        }
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
        let width = self.width as f64;
        self.check_variant()?;
        if self.activation.chooses() {
            return Ok(());
        }
        match (self.target_l0, self.lambda) {
            (Some(target), None) if target > 0.0 && target < width => Ok(()),
            (Some(target), None) => {
                Err(ConfigError::value("target_l0", target, "above 0 and below the width"))
            }
            (None, Some(lambda)) if lambda.is_finite() && lambda >= 0.0 => Ok(()),
            (None, Some(lambda)) => Err(ConfigError::value("lambda", lambda, "a number of at least 0")),
            (None, None) => Err(ConfigError::value("target_l0", "missing", "a target L0, or else a lambda")),
            (Some(_), Some(lambda)) => {
                Err(ConfigError::value("lambda", lambda, "no lambda beside a target_l0"))
            }
        }
    }

    /// What several layers, and vectors scaled one by one, go with.
    fn check_layers(&self) -> Result<(), ConfigError> {
        if self.normalise != Normalise::Scalar && self.target.is_some() {
            return Err(ConfigError::value(
                "normalise",
                "standardise",
                "scalar: a transcoder has two scales",
            ));
        }
        if self.thresholds == Thresholds::PerLayer
            && !(self.layers.is_some() && self.activation == LatentFunction::JumpRelu)
        {
            let expected = "per_latent, but for a jumprelu over several layers";
            return Err(ConfigError::value("thresholds", "per_layer", expected));
        }
        let Some(layers) = &self.layers else {
            let expected = "layers to make one autoencoder each for";
            let fault = || ConfigError::value("each_layer", true, expected);
            return if self.each_layer { Err(fault()) } else { Ok(()) };
        };
        if self.tap.is_some() || self.target.is_some() {
            return Err(ConfigError::value(
                "layers",
                format!("{layers:?}"),
                "no tap or target beside layers",
            ));
        }
        if self.sites.is_empty() || matches!(layers, Layers::Some(some) if some.is_empty()) {
            return Err(ConfigError::value(
                "layers",
                format!("{layers:?}"),
                "at least one layer of one site",
            ));
        }
        Ok(())
    }

    /// Keys that only some latent functions know.
    fn check_variant(&self) -> Result<(), ConfigError> {
        let name = toml::Value::try_from(self.activation).map_or_else(|_| String::new(), |v| v.to_string());
        let only = |key, used: bool, fits: bool, value: String| {
            let expected = format!("nothing: activation is {name}");
            if used && !fits { Err(ConfigError::value(key, value, expected)) } else { Ok(()) }
        };
        let (norm, chooses) = (self.activation.has_norm(), self.activation.chooses());
        let jump = self.activation == LatentFunction::JumpRelu;
        only("k", self.k > 0, chooses, self.k.to_string())?;
        let sparsity = self.target_l0.or(self.lambda);
        let key = if self.target_l0.is_some() { "target_l0" } else { "lambda" };
        only(key, sparsity.is_some(), !chooses, format!("{sparsity:?}"))?;
        only("decoder_norm", self.decoder_norm, norm, "true".to_owned())?;
        only("p_end", self.p_end < 1.0, norm, self.p_end.to_string())?;
        only("multi_topk", self.multi_topk, self.activation == LatentFunction::TopK, "true".to_owned())?;
        only("encoder_bias", !self.encoder_bias, !norm, "false".to_owned())?;
        if self.target.is_some() {
            if !self.encoder_bias {
                return Err(ConfigError::value(
                    "encoder_bias",
                    false,
                    "true: a transcoder has no other bias",
                ));
            }
            if self.aux_form == AuxForm::Mlsae {
                return Err(ConfigError::value("aux_form", "mlsae", "gao: this is a transcoder"));
            }
        }
        only("dead_loss", self.dead_loss > 0.0, jump, self.dead_loss.to_string())?;
        if chooses && !(1..=self.width).contains(&self.k) {
            return Err(ConfigError::value("k", self.k, "from 1 to the width"));
        }
        if !(self.p_end > 0.0 && self.p_end <= 1.0) {
            return Err(ConfigError::value("p_end", self.p_end, "above 0 and at most 1"));
        }
        let annealed = self.p_end < 1.0;
        if annealed && !((0.0..1.0 - self.lr_decay_share).contains(&self.p_start) && self.p_updates > 0) {
            let expected = "from 0 to below 1 − lr_decay_share, with p_updates at least 1";
            return Err(ConfigError::value("p_start", self.p_start, expected));
        }
        if self.aux_k > self.width {
            return Err(ConfigError::value("aux_k", self.aux_k, "at most the width"));
        }
        for (key, value) in [("aux_weight", self.aux_weight), ("dead_loss", self.dead_loss)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::value(key, value, "a number of at least 0"));
            }
        }
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(ConfigError::value(key, value, "from 0 to below 1"));
            }
        }
        let lengths = self.prefix_lengths();
        let ascending = lengths.windows(2).all(|pair| pair[0] < pair[1]) && !lengths.starts_with(&[0]);
        let whole = lengths.last().is_none_or(|&last| last == self.width);
        if !(ascending && whole) {
            let value = format!("{:?}", self.prefixes);
            return Err(ConfigError::value(
                "prefixes",
                value,
                "ascending shares of the width that end with 1",
            ));
        }
        Ok(())
    }
}
