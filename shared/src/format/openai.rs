//! The `.pt` files of OpenAI's sparse_autoencoder: a state dictionary saved by torch.
//!
//! `pre_bias [d]`, `encoder.weight [n, d]`, `latent_bias [n]`, `decoder.weight [d, n]` (absent where tied), `activation` by
//! name. Latents are `σ(encoder (x − pre_bias) + latent_bias)`. Files with the activation TopK standardise every input on its
//! own before that and undo it afterwards (their loader decides it by the activation's name), which weights cannot express.

use std::io::{Read, Seek, Write};

use super::error::FormatError;
use super::fold;
use super::tensors::transpose;
use super::torch::{self, Item, TorchFile};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// The file's name in messages.
pub const WEIGHTS: &str = "autoencoder.pt";

/// Whether a `.pt` file is one of these: it has `pre_bias`. A file that cannot be opened is not.
#[must_use]
pub fn is_openai(weights: impl Read + Seek) -> bool {
    TorchFile::open(WEIGHTS, weights).is_ok_and(|file| file.has("pre_bias") && file.has("latent_bias"))
}

/// Reads a file.
///
/// # Errors
/// If it does not parse, its activation is not the ReLU, tensors disagree or a weight is not finite.
pub fn read(weights: impl Read + Seek) -> Result<Sae, FormatError> {
    let mut file = TorchFile::open(WEIGHTS, weights)?;
    match file.text("activation") {
        None | Some("ReLU") => {}
        Some("TopK") => {
            let found =
                "TopK, with which every input is standardised on its own; weights alone cannot express that";
            return Err(FormatError::field(WEIGHTS, "activation", "ReLU", found));
        }
        Some(other) => return Err(FormatError::field(WEIGHTS, "activation", "ReLU", other)),
    }
    let (n, d, w_enc) = file.matrix("encoder.weight")?;
    // A tied decoder is the encoder's transpose and has no tensor of its own, or the encoder's again.
    let w_dec = if file.has("decoder.weight") {
        transpose(&file.exact("decoder.weight", &[d, n])?, d, n)
    } else if file.has("decoder.linear.weight") {
        file.exact("decoder.linear.weight", &[n, d])?
    } else {
        w_enc.clone()
    };
    let mut parts = SaeParts {
        d_in: d,
        d_out: d,
        w_enc,
        b_enc: file.exact("latent_bias", &[n])?,
        w_dec,
        b_dec: file.exact("pre_bias", &[d])?,
        activation: Activation::Relu,
        w_skip: None,
        rows: RowScaling::None,
    };
    fold::pre_encoder_bias(&mut parts);
    Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))
}

/// Writes a file that `Autoencoder.from_state_dict` loads; its statistics of use say that nothing was counted.
///
/// # Errors
/// If the autoencoder is no ReLU one with equal widths, which is all the format holds, or writing fails.
pub fn write(sae: &Sae, target: impl Write + Seek) -> Result<(), FormatError> {
    fold::refuse_skip(WEIGHTS, sae)?;
    fold::refuse_scaled_rows(WEIGHTS, sae)?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    let found = match sae.activation() {
        Activation::Relu if dims.d_out == d => None,
        Activation::Relu => Some(format!("a transcoder from {d} to {}", dims.d_out)),
        Activation::JumpRelu { .. } => Some("thresholds".to_owned()),
        Activation::TopK { k } => {
            Some(format!("top-k with k = {k}, which goes with standardised inputs there"))
        }
    };
    if let Some(found) = found {
        return Err(FormatError::field(WEIGHTS, "activation", "a ReLU autoencoder", found));
    }
    let (w_dec, bias) = (transpose(sae.w_dec(), n, d), fold::bias_behind_b_dec(sae));
    let (zeros, ones) = (vec![0.0; n], vec![1.0; n]);
    let never = vec![0; n];
    let items = [
        ("pre_bias", Item::F32(&[d], sae.b_dec())),
        ("latent_bias", Item::F32(&[n], &bias)),
        ("stats_last_nonzero", Item::I64(&never)),
        ("latents_activation_frequency", Item::F32(&[n], &ones)),
        ("latents_mean_square", Item::F32(&[n], &zeros)),
        ("encoder.weight", Item::F32(&[n, d], sae.w_enc())),
        ("decoder.weight", Item::F32(&[d, n], &w_dec)),
        ("activation", Item::Text("ReLU")),
        ("activation_state_dict", Item::Empty),
    ];
    torch::write(WEIGHTS, &items, target)
}
