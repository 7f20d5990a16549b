//! The keys of a training run.
//!
//! The defaults are made for short runs: a few thousand steps over some hundred thousand vectors, repeated.
//! The published JumpReLU recipe assumes billions of tokens: with ε = 0.001 and a learning rate of 7e-5 a
//! threshold sees a handful of window samples and moves by a few per cent in a thousand steps, so L0 stays
//! where it started. What differs, and why, is said at each key; `configs/gemma-scope.toml` has the
//! published values.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Count};
use crate::loss::Parametrisation;
use crate::tap::TapPoint;

/// Where thresholds start.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ThresholdInit {
    /// The same θ for every latent, in units of the normalised data.
    Value(f64),
    /// From data.
    FromData(FromData),
}

/// The word for [`ThresholdInit::FromData`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FromData {
    /// The quantile of each latent's own pre-activations at which it fires equally often, such that the mean
    /// L0 is `init_l0`: no latent starts dead, none starts dense.
    Quantile,
}

/// Where the decoder bias starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecoderBiasInit {
    /// The mean of the first vectors.
    Mean,
    /// Zero, as published.
    Zero,
}

/// How a training step finds its encoder product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPrecision {
    /// All of it in f32.
    #[default]
    F32,
    /// In bf16, and once more in f32 what that cannot rule out: the same bits, sooner. Needs a processor with AVX512-BF16;
    /// without it as `F32`.
    Bf16,
}

/// The latent function that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LatentFunction {
    /// `max(z, 0)` under a norm penalty.
    Relu,
    /// A trained threshold for each latent (arXiv 2407.14435).
    JumpRelu,
    /// A gate and a magnitude path (arXiv 2404.16014), released as a JumpReLU.
    Gated,
    /// The `k` largest of a row (arXiv 2406.04093).
    TopK,
    /// The `k · batch` largest of a batch (arXiv 2412.06410), released as a JumpReLU with one threshold.
    BatchTopK,
}

impl LatentFunction {
    /// Whether a number of latents is chosen, rather than a penalty balanced.
    #[must_use]
    pub fn chooses(self) -> bool {
        matches!(self, Self::TopK | Self::BatchTopK)
    }

    /// Whether sparsity comes from a norm of the latents.
    #[must_use]
    pub fn has_norm(self) -> bool {
        matches!(self, Self::Relu | Self::Gated)
    }
}

/// Configuration of a training run; every key has a default except what names the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The tap of the store to train on, such as `resid.14`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<TapPoint>,
    /// The tap to reconstruct instead, such as `mlp.14` with `tap = "mlp_in.14"`: a transcoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<TapPoint>,
    /// Whether a transcoder gets a linear skip connection from input to target (Gemma Scope 2's affine transcoders).
    pub skip: bool,
    /// Number of latents.
    pub width: usize,
    /// The latent function: `jumprelu`, `topk`, `batchtopk`, `gated` or `relu`.
    pub activation: LatentFunction,
    /// Active latents a row of `topk` and `batchtopk`.
    pub k: usize,
    /// Mean number of active latents to reach and hold; exclusive with `lambda`. A JumpReLU gets a quadratic term in its L0;
    /// where a norm is penalised, its weight is steered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_l0: Option<f64>,
    /// λ of the sparsity term, `λ‖f‖₀` for a JumpReLU, `λ Σ f^p` for `relu` and `gated`; exclusive with `target_l0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Weight of `(L̄0/L0* − 1)²` when `target_l0` is given. Large enough that the L0 at which it balances the
    /// reconstruction lies within a few per cent of the target, whatever the data.
    pub target_weight: f64,
    /// Whether a norm penalty weighs each latent by the length of its direction, which is then free (RI-L1); else directions
    /// have length 1.
    pub decoder_norm: bool,
    /// The p that the norm penalty is annealed to from 1 (p-annealing, arXiv 2408.00113 §4); 1 = L1 throughout.
    pub p_end: f64,
    /// Share of the run after which p begins to fall.
    pub p_start: f64,
    /// Steps in which p falls, between `p_start` and the fall of the learning rate (`lr_decay_share`).
    pub p_updates: u32,
    /// Nested dictionaries (Matryoshka), as ascending shares of the width that end with 1; empty = none.
    pub prefixes: Vec<f64>,
    /// Dead latents that reconstruct what is left of a row (AuxK); 0 = none.
    pub aux_k: usize,
    /// Weight of AuxK, 1/32 as published.
    pub aux_weight: f64,
    /// Whether the 4k largest reconstruct too, at a weight of 1/8 (multi-TopK); `topk` only.
    pub multi_topk: bool,
    /// Weight of the loss that pulls dead latents towards their thresholds; 0 = none. `jumprelu` only.
    pub dead_loss: f64,
    /// Steps between two resamplings, which begin dead latents again where reconstruction is worst (Bricken et al. 2023);
    /// 0 = never. None while the learning rate rises or falls.
    pub resample_every: u64,
    /// Training tokens (vectors) in all, repeats counted; a whole number of batches is taken.
    pub tokens: Count,
    /// Steps in all, instead of `tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Count>,
    /// Vectors a step.
    pub batch: usize,
    /// Seed of initialisation and data order.
    pub seed: u64,
    /// Learning rate of weights and biases. Short runs want a high one: on resid.14 of SmolLM2-135M, width 4096, top-k 40,
    /// 700 steps of 1024 end at an FVU of 0.195, 0.170, 0.158 with 8e-4, 1.6e-3, 3.2e-3. Runs of more steps, and wider
    /// ones, want a lower one.
    pub lr: f64,
    /// Adam's β₁. With 0, as published for JumpReLU and gated autoencoders, there is no first moment to store and latents
    /// without gradient are left alone, which large runs want; short ones reconstruct better with 0.9 (by 5 % of FVU after
    /// 400 steps of 1024 at a learning rate of 1.6e-3).
    pub beta1: f64,
    /// Adam's β₂.
    pub beta2: f64,
    /// Adam's ε.
    pub adam_eps: f64,
    /// Learning rate of the threshold parameter. Under Adam a log θ moves by about this much a step, so a run
    /// of a few thousand steps needs it well above `lr` for θ to move by more than a few per cent. Seen on
    /// resid.14 of SmolLM2-135M at width 4096, L0* = 40: with 2e-3 (lr 8e-4, ε 0.03) L0 sank to 25 while the random
    /// dictionary settled and was 27 after 300 steps; with 1e-2 and ε 0.05 it was within 5 % by step 250, and in a
    /// run of 5,859 steps within 1 % from step 1,400 on. ε differed too, so the rate alone is not proven the cause.
    pub threshold_lr: f64,
    /// Steps of the cosine warm-up of both learning rates, from a tenth.
    pub lr_warmup_steps: u64,
    /// Share of the run, at its end, over which both learning rates fall linearly to zero.
    pub lr_decay_share: f64,
    /// Steps over which the weight of the sparsity term grows linearly from zero.
    pub sparsity_warmup_steps: u64,
    /// Width ε of the straight-through window, in units of the normalised data. Wider means more samples a
    /// threshold learns from in a batch, and more bias.
    pub bandwidth: f64,
    /// Whether log θ or θ is trained.
    pub parametrisation: Parametrisation,
    /// Where thresholds start: a number, or `"quantile"`.
    pub threshold_init: ThresholdInit,
    /// Mean L0 at the start with `threshold_init = "quantile"`; 0 = twice the target (or 1/64 of the width).
    pub init_l0: f64,
    /// Where the decoder bias starts.
    pub decoder_bias_init: DecoderBiasInit,
    /// Whether the encoder reads `x − b_dec`; a transcoder never does.
    pub pre_bias: bool,
    /// Vectors longer than this many times the median norm are not trained on (massive activations, see
    /// `native::train::normalise`); 0 trains on all. One vector of eight times the median norm in a batch is enough to set
    /// a run back by hundreds of steps (resid.14 of SmolLM2-135M, width 4096: FVU from 0.19 to 0.22 and no better
    /// 100 steps later), or to blow it up where β₁ is 0; between 4 and 10 times lie 2 vectors in a million.
    pub max_norm: f64,
    /// A latent counts as dead when it did not fire in this many tokens.
    pub dead_window: Count,
    /// How the encoder product is found, `f32` or `bf16`; the result is the same to the last bit.
    pub encoder_precision: EncoderPrecision,
    /// Steps between two lines of the log.
    pub log_every: u64,
    /// Whether the log is written as a TensorBoard event file too, under SAELens' names.
    pub tensorboard: bool,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
    /// Minutes after which a checkpoint is written in any case.
    pub checkpoint_minutes: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            tap: None,
            target: None,
            skip: false,
            width: 4096,
            activation: LatentFunction::JumpRelu,
            k: 0,
            target_l0: None,
            lambda: None,
            target_weight: 10.0,
            decoder_norm: false,
            p_end: 1.0,
            p_start: 0.27,
            p_updates: 10,
            prefixes: Vec::new(),
            aux_k: 0,
            aux_weight: 1.0 / 32.0,
            multi_topk: false,
            dead_loss: 0.0,
            resample_every: 0,
            tokens: Count(6_000_000),
            steps: None,
            batch: 1024,
            seed: 0,
            lr: 2e-3,
            beta1: 0.9,
            beta2: 0.999,
            adam_eps: 1e-8,
            threshold_lr: 1e-2,
            lr_warmup_steps: 100,
            lr_decay_share: 0.3,
            sparsity_warmup_steps: 0,
            bandwidth: 0.1,
            parametrisation: Parametrisation::Log,
            threshold_init: ThresholdInit::FromData(FromData::Quantile),
            init_l0: 0.0,
            decoder_bias_init: DecoderBiasInit::Mean,
            pre_bias: true,
            max_norm: 4.0,
            dead_window: Count(300_000),
            encoder_precision: EncoderPrecision::F32,
            log_every: 50,
            tensorboard: false,
            checkpoint_every: 1000,
            checkpoint_minutes: 5.0,
        }
    }
}

impl TrainConfig {
    /// Steps of the whole run.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.steps.map_or_else(|| self.tokens.0 / self.batch.max(1) as u64, |steps| steps.0)
    }

    /// The mean L0 that quantile thresholds start at.
    #[must_use]
    pub fn initial_l0(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^53")]
        let width = self.width as f64;
        let l0 =
            if self.init_l0 > 0.0 { self.init_l0 } else { self.target_l0.map_or(width / 64.0, |t| 2.0 * t) };
        l0.clamp(0.5, width / 2.0)
    }

    /// Whether the encoder reads `x − b_dec`.
    #[must_use]
    pub fn subtracts_bias(&self) -> bool {
        self.pre_bias && self.target.is_none()
    }

    /// Lengths of the nested dictionaries, the whole last; empty when there are none.
    #[must_use]
    pub fn prefix_lengths(&self) -> Vec<usize> {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "widths are far below 2^53"
        )]
        let length = |share: &f64| (share * self.width as f64).round() as usize;
        self.prefixes.iter().map(length).collect()
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Override, resolve, to_toml};

    fn from(text: &str) -> Result<TrainConfig, ConfigError> {
        let config: TrainConfig = resolve(text, &[])?;
        config.check().map(|()| config)
    }

    #[test]
    fn resolved_configs_are_read_back_the_same() {
        for text in
            ["target_l0 = 40", "lambda = 6e-4\nthreshold_init = 0.001\nsteps = '2k'\ntap = 'resid.14'"]
        {
            let config = from(text).unwrap();
            assert_eq!(from(&to_toml(&config).unwrap()).unwrap(), config);
        }
        let topk = from("activation = 'topk'\nk = 32\naux_k = 256\nprefixes = [0.25, 1.0]").unwrap();
        assert_eq!((topk.prefix_lengths(), topk.beta1), (vec![1024, 4096], 0.9));
        assert_eq!(from(&to_toml(&topk).unwrap()).unwrap(), topk);
        let quantile =
            from("target_l0 = 40\nthreshold_init = 'quantile'\ntokens = '1M'\nbatch = 1000").unwrap();
        assert_eq!((quantile.total_steps(), quantile.initial_l0()), (1000, 80.0));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (text, key) in [
            ("", "target_l0"),
            ("target_l0 = 40\nlambda = 1.0", "lambda"),
            ("target_l0 = 5000", "target_l0"),
            ("target_l0 = 40\nlr = 0.0", "lr"),
            ("target_l0 = 40\nbandwidth = nan", "bandwidth"),
            ("target_l0 = 40\nbatch = 0", "batch"),
            ("target_l0 = 40\ntokens = 10", "tokens"),
            ("target_l0 = 40\nthreshold_init = -1.0", "threshold_init"),
            ("target_l0 = 40\nlr_decay_share = 2.0", "lr_decay_share"),
            ("target_l0 = 40\nwith = 3", "with"),
            ("target_l0 = 40\nthreshold_init = 'median'", "threshold_init"),
            ("activation = 'topk'", "k"),
            ("activation = 'topk'\nk = 5000", "k"),
            ("activation = 'topk'\nk = 32\ntarget_l0 = 40", "target_l0"),
            ("k = 32\ntarget_l0 = 40", "k"),
            ("target_l0 = 40\ndecoder_norm = true", "decoder_norm"),
            ("target_l0 = 40\np_end = 0.2", "p_end"),
            ("activation = 'gated'\nlambda = 0.1\np_end = 0.0", "p_end"),
            ("activation = 'batchtopk'\nk = 32\nmulti_topk = true", "multi_topk"),
            ("activation = 'topk'\nk = 32\nprefixes = [0.5, 0.25, 1.0]", "prefixes"),
            ("activation = 'topk'\nk = 32\nprefixes = [0.5]", "prefixes"),
            ("activation = 'topk'\nk = 32\nbeta1 = 1.0", "beta1"),
            ("activation = 'topk'\nk = 32\ndead_loss = 1.0", "dead_loss"),
        ] {
            let error = from(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
        let set = [Override::parse("target_l0=40").unwrap(), Override::parse("width=64").unwrap()];
        assert_eq!(resolve::<TrainConfig>("width = 8", &set).unwrap().width, 64);
    }
}
