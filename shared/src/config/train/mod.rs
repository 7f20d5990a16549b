//! The keys of a training run; `choices` holds the words that some of them are, `check` what they must satisfy together.
//!
//! The defaults are made for short runs: a few thousand steps over some hundred thousand vectors, repeated.
//! The published JumpReLU recipe assumes billions of tokens: with ε = 0.001 and a learning rate of 7e-5 a
//! threshold sees a handful of window samples and moves by a few per cent in a thousand steps, so L0 stays
//! where it started. What differs, and why, is said at each key; `configs/gemma-scope.toml` has the
//! published values.

use serde::{Deserialize, Serialize};

mod check;
mod choices;

pub use choices::{
    AllLayers, DecoderBiasInit, EncoderPrecision, FromData, LatentFunction, Layers, Loss, Normalise,
    Products, Route, ThresholdInit, Thresholds,
};

use super::Count;
use crate::loss::{AuxForm, Parametrisation};
use crate::tap::{Site, TapPoint};

/// Configuration of a training run; every key has a default except what names the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The tap of the store to train on, such as `resid.14`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<TapPoint>,
    /// Several layers of `sites` for one dictionary, instead of `tap`: `"all"`, or their numbers (a multi-layer SAE, arXiv 2409.04185).
    /// Every vector of each is an example.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// The sites of `layers`.
    pub sites: Vec<Site>,
    /// Whether this stands for one autoencoder for each of `layers`, alike in everything else: the controls of a multi-layer SAE.
    /// Each sees as many vectors as is said here.
    pub each_layer: bool,
    /// How vectors are brought to one length.
    pub normalise: Normalise,
    /// What is minimised of the reconstruction: `mse` of normalised vectors, or as published for multi-layer SAEs the mean over layers
    /// of the batch's `fvu`.
    pub loss: Loss,
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
    /// What has a threshold of its own: each latent (`per_latent`), or each latent at each layer (`per_layer`), with `target_l0` as
    /// the target of every layer. `jumprelu` over several layers only.
    pub thresholds: Thresholds,
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
    /// What AuxK measures: `gao` as published for top-k, or `mlsae` as published for multi-layer SAEs.
    pub aux_form: AuxForm,
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
    /// Whether the encoder has a bias; without one, as mlsae and its files, `z = W (x − b_dec)`.
    pub encoder_bias: bool,
    /// Vectors longer than this many times the median norm are not trained on (massive activations, see
    /// `native::train::normalise`); 0 trains on all. One vector of eight times the median norm in a batch is enough to set
    /// a run back by hundreds of steps (resid.14 of SmolLM2-135M, width 4096: FVU from 0.19 to 0.22 and no better
    /// 100 steps later), or to blow it up where β₁ is 0; between 4 and 10 times lie 2 vectors in a million.
    pub max_norm: f64,
    /// A latent counts as dead when it did not fire in this many tokens.
    pub dead_window: Count,
    /// How the encoder product is found, `f32` or `bf16`; the result is the same to the last bit.
    pub encoder_precision: EncoderPrecision,
    /// How a card multiplies matrices; the processor does so in f32.
    pub products: Products,
    /// Which route a step takes on a card: `auto`, `sparse` or `dense`.
    pub route: Route,
    /// Whether a card sums in a fixed order, so that the same run on the same card gives the same bits.
    pub deterministic: bool,
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
            layers: None,
            sites: vec![Site::Resid],
            each_layer: false,
            normalise: Normalise::Scalar,
            loss: Loss::Mse,
            target: None,
            skip: false,
            width: 4096,
            activation: LatentFunction::JumpRelu,
            k: 0,
            thresholds: Thresholds::PerLatent,
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
            aux_form: AuxForm::Gao,
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
            encoder_bias: true,
            max_norm: 4.0,
            dead_window: Count(300_000),
            encoder_precision: EncoderPrecision::F32,
            products: Products::Tf32,
            route: Route::Auto,
            deterministic: true,
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigError, Override, resolve, to_toml};

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
    fn layers_are_all_or_numbers_and_exclude_a_tap() {
        let of = |text: &str| from(&format!("target_l0 = 4.0\n{text}"));
        assert_eq!(of("layers = 'all'").unwrap().layers, Some(Layers::All(AllLayers::All)));
        let some = of("layers = [3, 0]\nsites = ['mlp']\nnormalise = 'standardise'").unwrap();
        assert_eq!((some.layers, some.sites), (Some(Layers::Some(vec![3, 0])), vec![Site::Mlp]));
        for broken in [
            "layers = []",
            "layers = 'some'",
            "layers = 'all'\nsites = []",
            "layers = 'all'\ntap = 'resid.1'",
            "layers = [0]\ntarget = 'mlp.1'",
            "tap = 'mlp_in.1'\ntarget = 'mlp.1'\nnormalise = 'standardise'",
        ] {
            assert!(of(broken).is_err(), "{broken}");
        }
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
            ("activation = 'topk'\nk = 32\nlayers = 'all'\nthresholds = 'per_layer'", "thresholds"),
            ("target_l0 = 40\nthresholds = 'per_layer'", "thresholds"),
            ("target_l0 = 40\neach_layer = true", "each_layer"),
            ("activation = 'relu'\nlambda = 0.1\nencoder_bias = false", "encoder_bias"),
            ("target_l0 = 40\ntarget = 'mlp.1'\ntap = 'mlp_in.1'\nencoder_bias = false", "encoder_bias"),
            ("target_l0 = 40\ntarget = 'mlp.1'\ntap = 'mlp_in.1'\naux_form = 'mlsae'", "aux_form"),
        ] {
            let error = from(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
        let set = [Override::parse("target_l0=40").unwrap(), Override::parse("width=64").unwrap()];
        assert_eq!(resolve::<TrainConfig>("width = 8", &set).unwrap().width, 64);
    }
}
