//! The words of a training configuration: what a key may be, where it is more than a number.

use serde::{Deserialize, Serialize};

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
    /// Their geometric median, which long vectors pull at no more than short ones (arXiv 2409.04185 §3, as OpenAI's and Anthropic's).
    #[serde(rename = "geometric_median")]
    GeometricMedian,
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

/// How a card multiplies matrices; sums are in f32 always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// Factors of 11 bits, on tensor cores.
    #[default]
    Tf32,
    /// Factors of all 24 bits.
    F32,
    /// Factors of 8 bits, at twice the speed of [`Products::Tf32`].
    Bf16,
    /// Factors of 16 bits, as two of 8 each: three products.
    Bf16x3,
}

/// Which route a step takes on a card, after the encoder product and where its objective has both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// Whichever is estimated to be sooner, step by step: by how many latents are active, and how fast the card copies and multiplies.
    #[default]
    Auto,
    /// What is active, latent by latent.
    Sparse,
    /// Matrix products.
    Dense,
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

/// The layers of a multi-layer SAE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// These, counted from 0.
    Some(Vec<usize>),
    /// Every layer that the data hold.
    All(AllLayers),
}

/// The word for [`Layers::All`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllLayers {
    /// Every layer.
    All,
}

/// What has a threshold of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thresholds {
    /// Each latent.
    #[default]
    PerLatent,
    /// Each latent at each layer of a multi-layer SAE.
    PerLayer,
}

/// What is minimised of the reconstruction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// The mean squared error of normalised vectors.
    #[default]
    Mse,
    /// The mean over layers of the batch's FVU in raw units: squared errors over the variance of all elements of the layer
    /// (arXiv 2409.04185 §3).
    Fvu,
}

/// How vectors are brought to one length before training, and so by the autoencoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// Divided by one scalar C a tap, such that their mean squared length is 1; folded into the weights.
    #[default]
    Scalar,
    /// Each on its own: its mean taken away, its standard deviation divided out (mlsae, arXiv 2409.04185 §3).
    Standardise,
}
