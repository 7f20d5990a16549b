//! One dictionary for several layers (a multi-layer SAE, arXiv 2409.04185): what each layer's vectors need beside the weights.
//!
//! The weights speak about vectors in units of a scalar of their layer: `x / c_l`. At one layer this is an ordinary autoencoder of raw
//! activations, whose biases and thresholds are in that layer's units; encoder rows and directions are the same at all. Layers may
//! have thresholds of their own; those of the weights themselves are then the means over layers.

use serde::{Deserialize, Serialize};

use crate::error::{ShapeError, check_len};
use crate::format::FormatError;
use crate::format::tensors::{self, TensorFile};
use crate::sae::{Activation, Sae};
use crate::tap::TapPoint;

/// A layer that the dictionary was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Where in the language model.
    pub tap: TapPoint,
    /// c_l: what raw vectors are divided by; 1 where each is scaled on its own.
    pub scale: f64,
    /// Raw vectors longer than this were not trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_input_norm: Option<f64>,
}

impl Layer {
    /// Raw vectors of this layer in the dictionary's units, `x / c_l`.
    #[must_use]
    pub fn in_units(&self, raw: &[f32]) -> Vec<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "vectors are f32")]
        raw.iter().map(|&x| (f64::from(x) / self.scale) as f32).collect()
    }
}

/// The layers of a multi-layer SAE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiLayer {
    /// The layers, in the order they were trained in.
    pub layers: Vec<Layer>,
    /// Whether each layer has thresholds of its own, in a file beside (docs/formats.md).
    #[serde(default, skip_serializing_if = "is_false")]
    pub thresholds_per_layer: bool,
    /// They `[L, n]`, in the units of the weights; empty where all share those of the weights.
    #[serde(skip)]
    pub thresholds: Vec<f32>,
}

/// The name of the file with the thresholds of layers.
pub const THRESHOLDS: &str = "multi_layer.safetensors";

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

impl MultiLayer {
    /// The number of the layer at `tap`.
    #[must_use]
    pub fn find(&self, tap: TapPoint) -> Option<usize> {
        self.layers.iter().position(|layer| layer.tap == tap)
    }

    /// Layers with `thresholds [L, n]` of their own, or with those of the weights if that is empty.
    #[must_use]
    pub fn new(layers: Vec<Layer>, thresholds: Vec<f32>) -> Self {
        Self { layers, thresholds_per_layer: !thresholds.is_empty(), thresholds }
    }

    /// The file of the thresholds, where layers have their own: a tensor `threshold [L, n]`.
    ///
    /// # Errors
    /// If they are not whole rows, one for each layer.
    pub fn write_thresholds(&self) -> Result<Option<Vec<u8>>, FormatError> {
        if !self.thresholds_per_layer {
            return Ok(None);
        }
        let n_layers = self.layers.len();
        let shape = [n_layers, self.thresholds.len() / n_layers.max(1)];
        tensors::serialize(THRESHOLDS, &[("threshold", &shape, &self.thresholds)]).map(Some)
    }

    /// Takes the thresholds from the file that [`MultiLayer::write_thresholds`] made, for an autoencoder of `n_latents` latents.
    ///
    /// # Errors
    /// If they are not in it, of another shape, negative or not finite.
    pub fn read_thresholds(&mut self, bytes: &[u8], n_latents: usize) -> Result<(), FormatError> {
        let file = TensorFile::open(THRESHOLDS, bytes)?;
        let thresholds = file.exact("threshold", &[self.layers.len(), n_latents])?;
        if let Some(wrong) = thresholds.iter().find(|theta| !(theta.is_finite() && **theta >= 0.0)) {
            return Err(FormatError::field(THRESHOLDS, "threshold", "finite values of at least 0", wrong));
        }
        self.thresholds = thresholds;
        Ok(())
    }

    /// Whether the weights are those of raw activations at every layer.
    #[must_use]
    pub fn is_one(&self) -> bool {
        !self.thresholds_per_layer && self.layers.iter().all(|layer| layer.scale == 1.0)
    }

    /// The autoencoder of raw activations of layer number `layer`: with `z = W x / c + b` and `f = σ(z)`, in raw units
    /// `z' = c z = W x + c b`, `θ' = c θ`, and the reconstruction `c x̂ = W_decᵀ f' + c b_dec`.
    ///
    /// # Errors
    /// If there is no such layer, its scale is not a positive number, or vectors are scaled one by one and by layer both.
    pub fn at(&self, sae: &Sae, layer: usize) -> Result<Sae, ShapeError> {
        let found = self.layers.len();
        let Some(Layer { scale, .. }) = self.layers.get(layer) else {
            let value = layer.to_string();
            return Err(ShapeError::Value {
                name: "layer",
                index: found,
                value,
                expected: "one of those trained on",
            });
        };
        let fits = scale.is_finite() && *scale > 0.0 && (*scale == 1.0 || sae.rows().is_none());
        if !fits {
            let (value, expected) =
                (scale.to_string(), "positive, and 1 where vectors are scaled one by one");
            return Err(ShapeError::Value { name: "scale of a layer", index: layer, value, expected });
        }
        let mut parts = sae.clone().into_parts();
        if self.thresholds_per_layer {
            let n = sae.dims().n_latents;
            check_len("thresholds of layers", &[self.layers.len(), n], self.thresholds.len())?;
            let threshold = self.thresholds[layer * n..(layer + 1) * n].to_vec();
            parts.activation = Activation::JumpRelu { threshold };
        }
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        let rescale =
            |values: &mut [f32]| values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
        rescale(&mut parts.b_enc);
        rescale(&mut parts.b_dec);
        if let Activation::JumpRelu { threshold } = &mut parts.activation {
            rescale(threshold);
        }
        Sae::new(parts)
    }
}
