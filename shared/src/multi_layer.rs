//! One dictionary for several layers (a multi-layer SAE, arXiv 2409.04185): what each layer's vectors need beside the weights.
//!
//! The weights speak about vectors in units of a scalar of their layer: `x / c_l`. At one layer this is an ordinary autoencoder of raw
//! activations, whose biases and thresholds are in that layer's units; encoder rows and directions are the same at all. Layers may
//! have thresholds of their own; those of the weights themselves are then the means over layers. A lens may bring them into one
//! space before ([`crate::lens`]); "raw" is then what it makes of activations.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{ShapeError, check_len};
use crate::format::FormatError;
use crate::format::tensors::TensorFile;
use crate::format::tuned_lens;
use crate::forward::Dims;
use crate::lens::Translator;
use crate::reference::dot;
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
    /// Raw vectors longer than this, translated where there is a lens, were not trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_input_norm: Option<f64>,
}

impl Layer {
    /// A layer whose vectors are read as they are.
    #[must_use]
    pub fn of_raw(tap: TapPoint) -> Self {
        Self { tap, scale: 1.0, max_input_norm: None }
    }

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
    /// Whether a lens translates vectors before anything else, in the same file.
    #[serde(default, skip_serializing_if = "is_false")]
    pub translated: bool,
    /// Its maps, one a layer; empty where there is none.
    #[serde(skip)]
    pub lens: Vec<Arc<Translator>>,
}

/// The name of the file with the thresholds and maps of layers.
pub const TENSORS: &str = "multi_layer.safetensors";
/// What stands before the names of a lens's tensors in it.
const LENS: &str = "lens.";

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
        let thresholds_per_layer = !thresholds.is_empty();
        Self { layers, thresholds_per_layer, thresholds, translated: false, lens: Vec::new() }
    }

    /// The same behind `lens`, which has a map for each layer.
    ///
    /// # Errors
    /// If it has another number of them.
    pub fn behind(self, lens: Vec<Arc<Translator>>) -> Result<Self, ShapeError> {
        check_len("maps of a lens", &[self.layers.len()], lens.len())?;
        Ok(Self { translated: true, lens, ..self })
    }

    /// The map of layer number `layer`, where there is a lens.
    #[must_use]
    pub fn translator(&self, layer: usize) -> Option<&Arc<Translator>> {
        self.lens.get(layer)
    }

    /// The file of what layers have of their own besides scales: a tensor `threshold [L, n]`, and those of a lens. None where they have
    /// neither.
    ///
    /// # Errors
    /// If thresholds are not whole rows, one for each layer.
    pub fn write_tensors(&self) -> Result<Option<Vec<u8>>, FormatError> {
        if !self.thresholds_per_layer && !self.translated {
            return Ok(None);
        }
        let n_layers = self.layers.len();
        let shape = [n_layers, self.thresholds.len() / n_layers.max(1)];
        let thresholds: &[(&str, &[usize], &[f32])] = &[("threshold", &shape, &self.thresholds)];
        let thresholds = if self.thresholds_per_layer { thresholds } else { &[] };
        tuned_lens::write_with(TENSORS, &self.lens, LENS, thresholds).map(Some)
    }

    /// Whether there is a file to read besides.
    #[must_use]
    pub fn has_tensors(&self) -> bool {
        self.thresholds_per_layer || self.translated
    }

    /// Takes thresholds and maps from the file that [`MultiLayer::write_tensors`] made, for an autoencoder of `dims`.
    ///
    /// # Errors
    /// If they are not in it, of another shape, not finite, thresholds are negative or a map has no inverse.
    pub fn read_tensors(&mut self, bytes: &[u8], dims: Dims) -> Result<(), FormatError> {
        let file = TensorFile::open(TENSORS, bytes)?;
        if self.thresholds_per_layer {
            let thresholds = file.exact("threshold", &[self.layers.len(), dims.n_latents])?;
            if let Some(wrong) = thresholds.iter().find(|theta| !(theta.is_finite() && **theta >= 0.0)) {
                return Err(FormatError::field(TENSORS, "threshold", "finite values of at least 0", wrong));
            }
            self.thresholds = thresholds;
        }
        if self.translated {
            self.lens = tuned_lens::read_tensors(TENSORS, &file, LENS)?;
            let (wanted, found) = ((self.layers.len(), dims.d_in), (self.lens.len(), self.lens[0].width()));
            if wanted != found {
                let told = |(n, d)| format!("{n} maps of width {d}");
                return Err(FormatError::field(TENSORS, LENS, told(wanted), told(found)));
            }
        }
        Ok(())
    }

    /// Whether the weights are those of raw activations at every layer.
    #[must_use]
    pub fn is_one(&self) -> bool {
        !self.has_tensors() && self.layers.iter().all(|layer| layer.scale == 1.0)
    }

    /// The autoencoder of raw activations of layer number `layer`: that of translated ones ([`MultiLayer::of_translated`]) with the map
    /// of a lens within its weights, `W' = W (I + W_l)`, `b' = b + W b_l`, and directions and bias through the inverse.
    ///
    /// # Errors
    /// As [`MultiLayer::of_translated`], or if translated vectors are scaled one by one, which weights cannot say.
    pub fn at(&self, sae: &Sae, layer: usize) -> Result<Sae, ShapeError> {
        let sae = self.of_translated(sae, layer)?;
        let Some(map) = self.translator(layer) else { return Ok(sae) };
        let Dims { d_in, d_out, .. } = sae.dims();
        check_len("maps of a lens", &[d_in, d_out], map.weight().len())?;
        if !sae.rows().is_none() || sae.w_skip().is_some() {
            let (value, expected) =
                ("vectors scaled one by one after it".to_owned(), "nothing between it and the weights");
            return Err(ShapeError::Value { name: "lens", index: layer, value, expected });
        }
        let mut parts = sae.into_parts();
        for (row, bias) in parts.w_enc.chunks_exact_mut(d_in).zip(&mut parts.b_enc) {
            #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
            let moved = (f64::from(*bias) + dot(row, map.bias())) as f32;
            *bias = moved;
            row.copy_from_slice(&map.pull_back(row));
        }
        parts.w_dec.chunks_exact_mut(d_out).for_each(|row| row.copy_from_slice(&map.lift(row)));
        parts.b_dec = map.backward(&parts.b_dec);
        Sae::new(parts)
    }

    /// The autoencoder of translated activations of layer number `layer`, or of raw ones without a lens: with `z = W x / c + b` and `f = σ(z)`, in raw units
    /// `z' = c z = W x + c b`, `θ' = c θ`, and the reconstruction `c x̂ = W_decᵀ f' + c b_dec`.
    ///
    /// # Errors
    /// If there is no such layer, its scale is not a positive number, or vectors are scaled one by one and by layer both.
    pub fn of_translated(&self, sae: &Sae, layer: usize) -> Result<Sae, ShapeError> {
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
