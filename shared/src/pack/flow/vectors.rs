//! `flow/NN.x.safetensors`: the vectors of a text at every layer, so that a page can encode them itself.
//!
//! They are half-precision numbers times a power of two of their layer. Codes are computed from the vectors as they are
//! stored, so that whoever encodes them again finds the same active latents.

use half::f16;

use super::FlowEntry;
use crate::pack::error::{PackError, check};
use crate::pack::tensors::{Reader, Writer};

/// Largest exponent of a layer's unit, either way: the largest half-precision number times it is still finite.
const MAX_EXPONENT: i32 = 112;
/// Largest values of a layer are stored as 2¹⁴ to 2¹⁵: far from overflow, and small values keep their precision.
const TOP: i32 = 14;

/// The vectors of a text, each already divided by the scalar of its layer.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowVectors {
    /// The power of two that a layer's numbers are multiplied by, `[L]`.
    unit: Vec<f32>,
    /// `[L, t, d_in]`.
    x: Vec<f16>,
}

impl FlowVectors {
    /// Rounds the vectors of `n_layers` layers, `[L, t, d_in]`, to the nearest that can be stored (ties to even). Values that
    /// are not finite become zero: they must not be encoded.
    #[must_use]
    pub fn round(x: &[f32], n_layers: usize) -> Self {
        let per_layer = (x.len() / n_layers.max(1)).max(1);
        let (mut unit, mut rounded) = (Vec::with_capacity(n_layers), Vec::with_capacity(x.len()));
        for layer in x.chunks(per_layer) {
            let largest = layer.iter().filter(|v| v.is_finite()).fold(0.0f32, |m, v| m.max(v.abs()));
            #[expect(clippy::cast_possible_truncation, reason = "an exponent")]
            let exponent = if largest > 0.0 { largest.log2().floor() as i32 - TOP } else { 0 };
            let exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT);
            let by = 2f32.powi(-exponent);
            unit.push(2f32.powi(exponent));
            let finite = |v: f32| {
                if v.is_finite() { f16::from_f32(v * by).clamp(f16::MIN, f16::MAX) } else { f16::ZERO }
            };
            rounded.extend(layer.iter().map(|&v| finite(v)));
        }
        Self { unit, x: rounded }
    }

    /// The vectors of layer number `layer`, `[t, d_in]`: exactly what codes are computed from. Empty when there is none.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Vec<f32> {
        let per_layer = self.x.len() / self.unit.len().max(1);
        let unit = self.unit.get(layer).copied().unwrap_or_default();
        let values = self.x.get(layer * per_layer..(layer + 1) * per_layer).unwrap_or_default();
        values.iter().map(|v| v.to_f32() * unit).collect()
    }

    /// Reads the vectors of `entry` at `n_layers` layers, each `d_in` wide.
    ///
    /// # Errors
    /// If tensors are missing, stray, misshapen or not finite, or a unit is no power of two.
    pub fn read(entry: &FlowEntry, n_layers: usize, d_in: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let reader = Reader::new(&entry.vectors, bytes, &["unit", "x"])?;
        let read = Self {
            unit: reader.values("unit", &[n_layers])?,
            x: reader.values("x", &[n_layers, entry.words.len(), d_in])?,
        };
        read.validate(&entry.vectors)?;
        Ok(read)
    }

    /// The bytes of the file, called `file` in errors, for vectors `d_in` wide.
    ///
    /// # Errors
    /// If the vectors are not `d_in` wide.
    pub fn write(&self, d_in: usize, file: &str) -> Result<Vec<u8>, PackError> {
        self.validate(file)?;
        let n_layers = self.unit.len();
        let t = self.x.len() / (n_layers * d_in).max(1);
        let mut writer = Writer::new(file);
        writer.add("unit", &[n_layers], self.unit.iter().copied())?;
        writer.add("x", &[n_layers, t, d_in], self.x.iter().copied())?;
        writer.finish()
    }

    fn validate(&self, file: &str) -> Result<(), PackError> {
        let is_unit = |unit: f32| {
            let bounds = 2f32.powi(-MAX_EXPONENT)..=2f32.powi(MAX_EXPONENT);
            bounds.contains(&unit) && unit.to_bits() & 0x007f_ffff == 0
        };
        let stray = self.unit.iter().find(|unit| !is_unit(**unit));
        let wanted = format!("powers of two up to {MAX_EXPONENT} either way");
        check(stray.is_none(), file, "unit", wanted, format!("{stray:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> FlowEntry {
        FlowEntry {
            id: "a".to_owned(),
            title: String::new(),
            source: String::new(),
            file: String::new(),
            vectors: "v".to_owned(),
            words: vec![String::new(); 2],
        }
    }

    #[test]
    fn vectors_are_rounded_by_layer_and_come_back_as_they_were() {
        let x =
            [1e-3, -2e-3, 3e-9, 4e-3, 5e5, -0.5, f32::NAN, 7.0, 0.0, 0.0, 0.0, 0.0, 3e38, -1e38, 0.0, 1.0];
        let vectors = FlowVectors::round(&x, 4);
        let bytes = vectors.write(2, "v").unwrap();
        let read = FlowVectors::read(&entry(), 4, 2, &bytes).unwrap();
        assert_eq!(read, vectors);
        for (layer, wanted) in x.chunks(4).enumerate() {
            let largest = wanted.iter().filter(|v| v.is_finite()).fold(0.0f32, |m, v| m.max(v.abs()));
            for (found, &wanted) in read.layer(layer).into_iter().zip(wanted) {
                let wanted = if wanted.is_finite() { wanted } else { 0.0 };
                // Half a unit in the last of eleven places, or of the smallest step of the layer.
                let allowed = (wanted.abs() * 2f32.powi(-11)).max(largest * 2f32.powi(-38));
                assert!((found - wanted).abs() <= allowed, "{found} for {wanted}");
            }
        }
        assert_eq!(
            FlowVectors::round(&read.layer(0), 1).layer(0),
            read.layer(0),
            "rounding twice is rounding once"
        );
        assert!(read.layer(4).is_empty());
    }

    #[test]
    fn other_shapes_and_units_are_refused() {
        let bytes = FlowVectors::round(&[1.0; 8], 2).write(2, "v").unwrap();
        for (n_layers, d_in) in [(3, 2), (2, 3), (1, 4)] {
            assert!(FlowVectors::read(&entry(), n_layers, d_in, &bytes).is_err());
        }
        for unit in [0.0, -1.0, 3.0, f32::INFINITY, f32::NAN, 1e-40] {
            let broken = FlowVectors { unit: vec![unit], x: vec![f16::ONE; 2] };
            assert!(broken.write(2, "v").is_err(), "{unit}");
        }
        for end in 0..bytes.len() {
            assert!(FlowVectors::read(&entry(), 2, 2, &bytes[..end]).is_err(), "cut at {end}");
        }
    }
}
