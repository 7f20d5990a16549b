//! `encoder.safetensors` and `decoder.safetensors`: an autoencoder cut in two, because pages that only
//! look at features need neither, and pages that encode need the first alone.

use super::error::{PackError, check};
use super::manifest::{ActivationKind, SaeInfo};
use super::tensors::{Reader, Writer};
use super::{DECODER, ENCODER, MAX_WIDTH};
use crate::sae::{Activation, Sae, SaeParts};

/// What is needed to encode.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoder {
    /// Encoder rows `[n_latents, d_in]`.
    pub w_enc: Vec<f32>,
    /// Encoder bias `[n_latents]`.
    pub b_enc: Vec<f32>,
    /// Thresholds `[n_latents]`; zeros when the activation has none.
    pub threshold: Vec<f32>,
}

/// What is needed to decode.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// Decoder directions `[n_latents, d_out]`.
    pub w_dec: Vec<f32>,
    /// Decoder bias `[d_out]`.
    pub b_dec: Vec<f32>,
    /// The skip connection `[d_out, d_in]`, where there is one.
    pub w_skip: Option<Vec<f32>>,
}

impl ActivationKind {
    /// The kind of `activation`.
    #[must_use]
    pub fn of(activation: &Activation) -> Self {
        match activation {
            Activation::JumpRelu { .. } => Self::JumpRelu,
            Activation::Relu => Self::Relu,
            Activation::TopK { k } => Self::TopK { k: *k },
        }
    }
}

impl Encoder {
    /// The encoding half of `sae`.
    #[must_use]
    pub fn of(sae: &Sae) -> Self {
        let threshold = match sae.activation() {
            Activation::JumpRelu { threshold } => threshold.clone(),
            Activation::Relu | Activation::TopK { .. } => vec![0.0; sae.dims().n_latents],
        };
        Self { w_enc: sae.w_enc().to_vec(), b_enc: sae.b_enc().to_vec(), threshold }
    }

    /// Reads `encoder.safetensors` of an autoencoder with these sizes.
    ///
    /// # Errors
    /// If tensors are missing, stray, of other shapes or types, not finite, or a threshold is negative.
    pub fn read(info: &SaeInfo, bytes: &[u8]) -> Result<Self, PackError> {
        let n = info.n_latents;
        let reader = Reader::new(ENCODER, bytes, &["w_enc", "b_enc", "threshold"])?;
        let encoder = Self {
            w_enc: reader.values("w_enc", &[n, info.d_in])?,
            b_enc: reader.values("b_enc", &[n])?,
            threshold: reader.values("threshold", &[n])?,
        };
        if let Some(i) = encoder.threshold.iter().position(|&t| t < 0.0) {
            let found = format!("{} at {i}", encoder.threshold[i]);
            return Err(PackError::invalid(ENCODER, "threshold", "values of at least 0", found));
        }
        if info.activation != ActivationKind::JumpRelu {
            let zero = encoder.threshold.iter().all(|&t| t == 0.0);
            check(zero, ENCODER, "threshold", format!("zeros for {:?}", info.activation), "other values")?;
        }
        Ok(encoder)
    }

    /// The bytes of `encoder.safetensors`.
    ///
    /// # Errors
    /// If lengths do not fit each other or a value is not finite.
    pub fn write(&self) -> Result<Vec<u8>, PackError> {
        let n = self.b_enc.len();
        let mut writer = Writer::new(ENCODER);
        writer.add("w_enc", &[n, self.w_enc.len() / n.max(1)], self.w_enc.iter().copied())?;
        writer.add("b_enc", &[n], self.b_enc.iter().copied())?;
        writer.add("threshold", &[n], self.threshold.iter().copied())?;
        writer.finish()
    }

    /// The whole autoencoder, when the decoder is at hand.
    ///
    /// # Errors
    /// If the halves do not fit each other.
    pub fn join(self, decoder: Decoder, info: &SaeInfo) -> Result<Sae, PackError> {
        self.build(decoder, info)
    }

    /// An autoencoder that can only encode: its decoder is one column of zeros.
    ///
    /// # Errors
    /// If lengths do not fit.
    pub fn without_decoder(self, info: &SaeInfo) -> Result<Sae, PackError> {
        let n = self.b_enc.len();
        self.build(Decoder { w_dec: vec![0.0; n], b_dec: vec![0.0], w_skip: None }, info)
    }

    fn build(self, decoder: Decoder, info: &SaeInfo) -> Result<Sae, PackError> {
        let activation = match info.activation {
            ActivationKind::JumpRelu => Activation::JumpRelu { threshold: self.threshold },
            ActivationKind::Relu => Activation::Relu,
            ActivationKind::TopK { k } => Activation::TopK { k },
        };
        let (w_enc, b_enc) = (self.w_enc, self.b_enc);
        let Decoder { w_dec, b_dec, w_skip } = decoder;
        let (d_in, d_out, rows) = (info.d_in, b_dec.len(), info.rows);
        Ok(Sae::new(SaeParts { d_in, d_out, w_enc, b_enc, w_dec, b_dec, activation, w_skip, rows })?)
    }
}

impl Decoder {
    /// The decoding half of `sae`.
    #[must_use]
    pub fn of(sae: &Sae) -> Self {
        let w_skip = sae.w_skip().map(<[f32]>::to_vec);
        Self { w_dec: sae.w_dec().to_vec(), b_dec: sae.b_dec().to_vec(), w_skip }
    }

    /// Reads `decoder.safetensors` of an autoencoder with these sizes.
    ///
    /// # Errors
    /// If tensors are missing, stray, of other shapes or types, or not finite.
    pub fn read(info: &SaeInfo, bytes: &[u8]) -> Result<Self, PackError> {
        let reader = Reader::new(DECODER, bytes, &["w_dec", "b_dec", "w_skip"])?;
        let shape = reader.shape("b_dec")?;
        let d_out = match shape[..] {
            [d_out] if (1..=MAX_WIDTH).contains(&d_out) => d_out,
            _ => return Err(PackError::invalid(DECODER, "b_dec", "shape [d_out]", format!("{shape:?}"))),
        };
        Ok(Self {
            w_dec: reader.values("w_dec", &[info.n_latents, d_out])?,
            b_dec: reader.values("b_dec", &[d_out])?,
            w_skip: reader.has("w_skip").then(|| reader.values("w_skip", &[d_out, info.d_in])).transpose()?,
        })
    }

    /// The bytes of `decoder.safetensors`.
    ///
    /// # Errors
    /// If lengths do not fit each other or a value is not finite.
    pub fn write(&self) -> Result<Vec<u8>, PackError> {
        let d_out = self.b_dec.len();
        let mut writer = Writer::new(DECODER);
        writer.add("w_dec", &[self.w_dec.len() / d_out.max(1), d_out], self.w_dec.iter().copied())?;
        writer.add("b_dec", &[d_out], self.b_dec.iter().copied())?;
        if let Some(w_skip) = &self.w_skip {
            writer.add("w_skip", &[d_out, w_skip.len() / d_out.max(1)], w_skip.iter().copied())?;
        }
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_scaling::RowScaling;
    use crate::tap::Site;

    fn sae() -> Sae {
        Sae::new(SaeParts {
            d_in: 2,
            d_out: 3,
            w_enc: vec![1.0, 0.5, -1.0, 2.0, 0.25, 4.0],
            b_enc: vec![0.1, 0.2, 0.3],
            w_dec: (0u8..9).map(f32::from).collect(),
            b_dec: vec![1.0, 2.0, 3.0],
            activation: Activation::JumpRelu { threshold: vec![0.5, 0.25, 0.0] },
            w_skip: None,
            rows: RowScaling::None,
        })
        .unwrap()
    }

    fn info() -> SaeInfo {
        SaeInfo {
            site: Site::Resid,
            layer: 0,
            d_in: 2,
            n_latents: 3,
            activation: ActivationKind::JumpRelu,
            rows: RowScaling::None,
        }
    }

    #[test]
    fn both_halves_join_to_the_same_autoencoder() {
        let encoder = Encoder::read(&info(), &Encoder::of(&sae()).write().unwrap()).unwrap();
        let decoder = Decoder::read(&info(), &Decoder::of(&sae()).write().unwrap()).unwrap();
        assert_eq!(encoder.clone().join(decoder, &info()).unwrap(), sae());
        let encodes = encoder.without_decoder(&info()).unwrap();
        assert_eq!((encodes.w_enc(), encodes.activation()), (sae().w_enc(), sae().activation()));
    }

    #[test]
    fn a_skip_connection_and_scaled_rows_come_back() {
        let info = SaeInfo { rows: RowScaling::LAYER_NORM, ..info() };
        let w_skip = Some(vec![0.5, -1.0, 0.25, 2.0, 0.0, 1.0]);
        let sae = Sae::new(SaeParts { w_skip, rows: info.rows, ..sae().into_parts() }).unwrap();
        let encoder = Encoder::read(&info, &Encoder::of(&sae).write().unwrap()).unwrap();
        let bytes = Decoder::of(&sae).write().unwrap();
        assert_eq!(encoder.clone().without_decoder(&info).unwrap().rows(), info.rows);
        assert_eq!(encoder.join(Decoder::read(&info, &bytes).unwrap(), &info).unwrap(), sae);
        assert!(Decoder::read(&SaeInfo { d_in: 3, ..info }, &bytes).is_err());
    }

    #[test]
    fn other_sizes_and_bad_thresholds_are_refused() {
        let bytes = Encoder::of(&sae()).write().unwrap();
        assert!(Encoder::read(&SaeInfo { d_in: 3, ..info() }, &bytes).is_err());
        assert!(Encoder::read(&SaeInfo { n_latents: 4, ..info() }, &bytes).is_err());
        assert!(Encoder::read(&SaeInfo { activation: ActivationKind::Relu, ..info() }, &bytes).is_err());
        let mut negative = Encoder::of(&sae());
        negative.threshold[1] = -0.5;
        assert!(
            Encoder::read(&info(), &negative.write().unwrap()).unwrap_err().to_string().contains("-0.5 at 1")
        );
        let decoder = Decoder::of(&sae()).write().unwrap();
        assert!(Decoder::read(&SaeInfo { n_latents: 4, ..info() }, &decoder).is_err());
        assert!(Decoder::read(&info(), &bytes).is_err());
    }
}
