//! `flow/thresholds.safetensors`: the thresholds of layers that have their own.
//!
//! The thresholds of the pack's encoder are then the lowest of any layer; [`crate::layer_thresholds`] encodes with both.

use super::FlowInfo;
use crate::pack::error::{PackError, check};
use crate::pack::tensors::{Reader, Writer};

/// Path of the thresholds inside a pack.
pub const FLOW_THRESHOLDS: &str = "flow/thresholds.safetensors";

/// Thresholds of latents at each layer, in the dictionary's units.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowThresholds {
    /// `[L, n]`.
    values: Vec<f32>,
    n_latents: usize,
}

impl FlowThresholds {
    /// These thresholds `[L, n]` of a dictionary of `n_latents`.
    #[must_use]
    pub fn new(values: Vec<f32>, n_latents: usize) -> Self {
        Self { values, n_latents }
    }

    /// Those of layer number `layer`, `[n]`; empty where there is none.
    #[must_use]
    pub fn layer(&self, layer: usize) -> &[f32] {
        self.values.get(layer * self.n_latents..(layer + 1) * self.n_latents).unwrap_or_default()
    }

    /// Reads the file of the section `info` of a dictionary of `n_latents`.
    ///
    /// # Errors
    /// If the tensor is missing, misshapen, negative or not finite, or others are there.
    pub fn read(info: &FlowInfo, n_latents: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let reader = Reader::new(FLOW_THRESHOLDS, bytes, &["threshold"])?;
        let read = Self::new(reader.values("threshold", &[info.layers.len(), n_latents])?, n_latents);
        read.validate()?;
        Ok(read)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// If they are not whole rows, or a threshold is negative or not finite.
    pub fn write(&self) -> Result<Vec<u8>, PackError> {
        self.validate()?;
        let mut writer = Writer::new(FLOW_THRESHOLDS);
        let n_layers = self.values.len() / self.n_latents.max(1);
        writer.add("threshold", &[n_layers, self.n_latents], self.values.iter().copied())?;
        writer.finish()
    }

    fn validate(&self) -> Result<(), PackError> {
        let bad = self.values.iter().find(|v| !(**v >= 0.0 && v.is_finite()));
        check(bad.is_none(), FLOW_THRESHOLDS, "threshold", "values of at least 0", format!("{bad:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::tests::info;
    use super::*;

    #[test]
    fn thresholds_come_back_and_keep_their_rules() {
        let info = info(&mut BTreeMap::new());
        let thresholds = FlowThresholds::new(vec![0.5, 1.0, 0.0, 2.0, 3.0, 4.0], 3);
        let bytes = thresholds.write().unwrap();
        assert_eq!(FlowThresholds::read(&info, 3, &bytes).unwrap(), thresholds);
        assert_eq!((thresholds.layer(1), thresholds.layer(2)), (&[2.0, 3.0, 4.0][..], &[][..]));
        assert!(FlowThresholds::read(&info, 2, &bytes).is_err());
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(FlowThresholds::new(vec![bad, 1.0], 1).write().is_err());
        }
        assert!(FlowThresholds::new(vec![1.0; 3], 2).write().is_err(), "half a row");
        for end in 0..bytes.len() {
            assert!(FlowThresholds::read(&info, 3, &bytes[..end]).is_err(), "cut at {end}");
        }
    }
}
