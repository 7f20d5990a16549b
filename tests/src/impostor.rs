//! Backends that are wrong in one way each. The suite must reject every one of them, or it judges nothing.

use shared::{
    Activation, Codes, CodesBuilder, Dims, Forward, RowScaling, Rows, Sae, SaeParts, ShapeError, reference,
};

use crate::impostor_rows::{scaled_wrongly, undone_wrongly};

/// What is wrong with an impostor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `z ≥ θ` for `z > θ`.
    AtLeast,
    /// A ReLU where a threshold is.
    ThresholdIgnored,
    /// Thresholds of the neighbouring latent.
    ThresholdShifted,
    /// Decides in f32 without rechecking near the threshold.
    Uncertified,
    /// `w_enc` read as `[d_in, n]`.
    EncoderTransposed,
    /// `w_dec` read as `[d_out, n]`.
    DecoderTransposed,
    /// No encoder bias.
    NoEncoderBias,
    /// No decoder bias.
    NoDecoderBias,
    /// Subtracts the decoder bias from inputs, as if it had not been folded.
    DecoderBiasTwice,
    /// Reports latent `i + 1` for latent `i`.
    OffByOneLatent,
    /// Forgets the last latent, as a loop over whole tiles would.
    LastLatentForgotten,
    /// Gives every row the codes of the first.
    FirstRowRepeated,
    /// Values off by one part in ten thousand.
    ValuesOff,
    /// Ties of top-k go to the higher latent.
    TieToHigher,
    /// Top-k without the ReLU after it.
    NegativesKept,
    /// Keeps one latent too many in top-k.
    OneTooMany,
    /// Latents above the threshold come out with the threshold subtracted.
    ShiftedRelu,
    /// Takes rows of any width.
    WidthUnchecked,
    /// Reconstructs from the first active latent only.
    DecodesOneLatent,
    /// Returns a value that is not a number.
    NotANumber,
    /// No skip connection.
    SkipIgnored,
    /// `w_skip` read as `[d_in, d_out]`.
    SkipTransposed,
    /// The skip connection reads what the encoder reads.
    SkipOfScaled,
    /// What the skip connection adds is scaled back with the rest.
    SkipUndone,
    /// Encodes vectors as they are, where rows are scaled.
    NotScaled,
    /// The deviation with `d` for `d − 1`.
    BiasedDeviation,
    /// Divides by the deviation alone.
    EpsForgotten,
    /// Undoes with what was divided by, ε included.
    EpsUndone,
    /// The reconstruction stays on the scale of the encoder.
    NotUndone,
    /// The mean is not added back.
    MeanForgotten,
    /// Every row is scaled back by the statistics of the first.
    StatisticsOfFirstRow,
    /// To norm 1 for √d.
    UnitNorm,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Self; 32] = [
        Self::AtLeast,
        Self::ThresholdIgnored,
        Self::ThresholdShifted,
        Self::Uncertified,
        Self::EncoderTransposed,
        Self::DecoderTransposed,
        Self::NoEncoderBias,
        Self::NoDecoderBias,
        Self::DecoderBiasTwice,
        Self::OffByOneLatent,
        Self::LastLatentForgotten,
        Self::FirstRowRepeated,
        Self::ValuesOff,
        Self::TieToHigher,
        Self::NegativesKept,
        Self::OneTooMany,
        Self::ShiftedRelu,
        Self::WidthUnchecked,
        Self::DecodesOneLatent,
        Self::NotANumber,
        Self::SkipIgnored,
        Self::SkipTransposed,
        Self::SkipOfScaled,
        Self::SkipUndone,
        Self::NotScaled,
        Self::BiasedDeviation,
        Self::EpsForgotten,
        Self::EpsUndone,
        Self::NotUndone,
        Self::MeanForgotten,
        Self::StatisticsOfFirstRow,
        Self::UnitNorm,
    ];
}

/// The reference with one fault.
#[derive(Debug, Clone)]
pub struct Impostor {
    honest: Sae,
    /// The dictionary with the fault in its weights, where the fault lies there.
    sae: Sae,
    fault: Fault,
}

impl Impostor {
    /// The reference on `sae` with `fault`.
    ///
    /// # Errors
    /// Never for a fault of [`Fault::ALL`]; the faulty weights are checked like any others.
    pub fn new(sae: Sae, fault: Fault) -> Result<Self, ShapeError> {
        let Dims { d_in, d_out, n_latents: n } = sae.dims();
        let mut parts: SaeParts = sae.clone().into_parts();
        match fault {
            Fault::ThresholdIgnored if sae.activation().threshold(0).is_some() => {
                parts.activation = Activation::Relu;
            }
            Fault::ThresholdShifted => {
                if let Activation::JumpRelu { threshold } = &mut parts.activation {
                    threshold.rotate_right(1);
                }
            }
            Fault::EncoderTransposed => parts.w_enc = transposed(&parts.w_enc, d_in, n),
            Fault::DecoderTransposed => parts.w_dec = transposed(&parts.w_dec, d_out, n),
            Fault::NoEncoderBias => parts.b_enc.fill(0.0),
            Fault::NoDecoderBias => parts.b_dec.fill(0.0),
            Fault::DecoderBiasTwice if d_in == d_out => {
                for (i, bias) in parts.b_enc.iter_mut().enumerate() {
                    *bias -= parts.b_dec.iter().zip(sae.encoder_row(i)).map(|(b, w)| b * w).sum::<f32>();
                }
            }
            Fault::OneTooMany => {
                if let Activation::TopK { k } = &mut parts.activation {
                    *k = (*k + 1).min(n);
                }
            }
            Fault::SkipIgnored => parts.w_skip = None,
            Fault::SkipTransposed => {
                parts.w_skip = parts.w_skip.map(|w_skip| transposed(&w_skip, d_in, d_out));
            }
            Fault::EpsForgotten => {
                if let RowScaling::Standardise { eps } = &mut parts.rows {
                    *eps = 0.0;
                }
            }
            _ => {}
        }
        Ok(Self { honest: sae, sae: Sae::new(parts)?, fault })
    }

    fn encode_faulty(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        let Dims { d_in, n_latents: n, .. } = self.sae.dims();
        let cut: Vec<f32>;
        let x = if self.fault == Fault::WidthUnchecked && x.width() > d_in {
            cut = x.iter().flat_map(|row| row[..d_in].to_vec()).collect();
            Rows::new(&cut, d_in)?
        } else {
            x
        };
        let codes = match scaled_wrongly(&self.sae, self.fault, x)? {
            Some((sae, x)) => reference::encode(&sae, Rows::new(&x, d_in)?)?,
            None => reference::encode(&self.sae, x)?,
        };
        let scaled = self.honest.rows().scaled(x);
        let x = Rows::new(&scaled, d_in)?;
        let mut builder = CodesBuilder::new(n);
        for (i, row) in x.iter().enumerate() {
            let source = if self.fault == Fault::FirstRowRepeated { 0 } else { i };
            let (latents, values) = codes.row(source);
            let mut row_codes: Vec<(u32, f32)> =
                latents.iter().copied().zip(values.iter().copied()).collect();
            self.spoil(row, &mut row_codes);
            for (latent, value) in row_codes {
                builder.push(latent, value);
            }
            builder.end_row()?;
        }
        Ok(builder.finish())
    }

    /// Applies the faults that show in the codes of one row; `x` is what the encoder reads.
    fn spoil(&self, x: &[f32], codes: &mut Vec<(u32, f32)>) {
        let n = u32::try_from(self.sae.dims().n_latents).unwrap_or(u32::MAX);
        let activation = self.honest.activation();
        let single = |latent: u32| {
            let i = latent as usize;
            self.honest.encoder_row(i).iter().zip(x).fold(self.honest.b_enc()[i], |sum, (w, x)| sum + w * x)
        };
        match self.fault {
            Fault::AtLeast => self.rethreshold(codes, x, |z, t| z >= t),
            Fault::Uncertified if activation.threshold(0).is_some() => {
                codes.clear();
                let active = |latent: &u32| Some(single(*latent)) > activation.threshold(*latent as usize);
                codes.extend((0..n).filter(active).map(|latent| (latent, single(latent))));
            }
            Fault::OffByOneLatent => {
                for (latent, _) in codes.iter_mut() {
                    *latent = (*latent + 1) % n;
                }
            }
            Fault::LastLatentForgotten => codes.retain(|&(latent, _)| latent + 1 < n),
            Fault::ValuesOff => codes.iter_mut().for_each(|(_, value)| *value *= 1.0001),
            Fault::NotANumber => {
                if let Some((_, value)) = codes.last_mut() {
                    *value = f32::NAN;
                }
            }
            Fault::ShiftedRelu => {
                for (latent, value) in codes.iter_mut() {
                    *value -= activation.threshold(*latent as usize).unwrap_or(0.0);
                }
            }
            Fault::TieToHigher | Fault::NegativesKept => {
                if let Activation::TopK { k } = *activation {
                    self.rerank(codes, x, k);
                }
            }
            _ => {}
        }
    }

    fn rethreshold(&self, codes: &mut Vec<(u32, f32)>, x: &[f32], active: fn(f64, f64) -> bool) {
        let Activation::JumpRelu { threshold } = self.honest.activation() else { return };
        codes.clear();
        for (latent, &t) in (0u32..).zip(threshold) {
            let z = reference::pre_activation(&self.honest, x, latent as usize);
            if active(z, f64::from(t)) {
                #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
                codes.push((latent, z as f32));
            }
        }
    }

    fn rerank(&self, codes: &mut Vec<(u32, f32)>, x: &[f32], k: usize) {
        let n = self.honest.dims().n_latents;
        let z: Vec<f64> = (0..n).map(|i| reference::pre_activation(&self.honest, x, i)).collect();
        let mut order: Vec<u32> = (0u32..).take(n).collect();
        if self.fault == Fault::TieToHigher {
            order.reverse();
        }
        order.sort_by(|&a, &b| z[b as usize].total_cmp(&z[a as usize]));
        order.truncate(k);
        if self.fault == Fault::TieToHigher {
            order.retain(|&i| z[i as usize] > 0.0);
        }
        #[expect(clippy::cast_possible_truncation, reason = "latents are stored as f32")]
        let ranked = order.into_iter().map(|i| (i, z[i as usize] as f32));
        *codes = ranked.collect();
    }
}

/// `[rows, cols]` values re-read as if they were stored `[cols, rows]`.
fn transposed(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..data.len()).map(|i| data[(i % rows) * cols + i / rows]).collect()
}

impl Forward for Impostor {
    type Error = ShapeError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, ShapeError> {
        self.encode_faulty(x)
    }

    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, ShapeError> {
        if self.fault != Fault::DecodesOneLatent {
            return undone_wrongly(&self.sae, self.fault, x, codes);
        }
        let mut builder = CodesBuilder::new(codes.n_latents());
        for (latents, values) in codes.iter() {
            for (&latent, &value) in latents.iter().zip(values).take(1) {
                builder.push(latent, value);
            }
            builder.end_row()?;
        }
        reference::decode(&self.sae, x, &builder.finish())
    }
}
