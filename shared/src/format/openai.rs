//! The `.pt` files of OpenAI's sparse_autoencoder: a state dictionary saved by torch.
//!
//! `pre_bias [d]`, `encoder.weight [n, d]`, `latent_bias [n]`, `decoder.weight [d, n]` (absent where tied), `activation` by
//! name. Latents are `σ(encoder (x − pre_bias) + latent_bias)`. Files with the activation TopK standardise every input on its
//! own before that and undo it afterwards, and those with ReLU do not: their loader goes by the activation's name.

use std::io::{Read, Seek, Write};

use super::error::FormatError;
use super::fold;
use super::tensors::transpose;
use super::torch::{self, Item, TorchFile};
use crate::row_scaling::RowScaling;
use crate::sae::{Activation, Sae, SaeParts};

/// The file's name in messages.
pub const WEIGHTS: &str = "autoencoder.pt";
/// Where the activation's settings are.
const SETTINGS: &str = "activation_state_dict";
/// What top-k applies to the values it keeps.
const AFTER: &str = "postact_fn";

/// Whether a `.pt` file is one of these: it has `pre_bias`. A file that cannot be opened is not.
#[must_use]
pub fn is_openai(weights: impl Read + Seek) -> bool {
    TorchFile::open(WEIGHTS, weights).is_ok_and(|file| file.has("pre_bias") && file.has("latent_bias"))
}

/// Reads a file.
///
/// # Errors
/// If it does not parse, its activation is neither ReLU nor TopK with it, tensors disagree or a weight is not finite.
pub fn read(weights: impl Read + Seek) -> Result<Sae, FormatError> {
    let mut file = TorchFile::open(WEIGHTS, weights)?;
    let (activation, rows) = match file.text("activation") {
        None | Some("ReLU") => (Activation::Relu, RowScaling::None),
        Some("TopK") => {
            let after = file.text_in(SETTINGS, AFTER).unwrap_or("nothing");
            if after != "ReLU" {
                return Err(FormatError::field(WEIGHTS, &format!("{SETTINGS}.{AFTER}"), "ReLU", after));
            }
            (Activation::TopK { k: file.count_in(SETTINGS, "k")? }, RowScaling::LAYER_NORM)
        }
        Some(other) => return Err(FormatError::field(WEIGHTS, "activation", "ReLU or TopK", other)),
    };
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
        activation,
        w_skip: None,
        rows,
    };
    fold::pre_encoder_bias(&mut parts);
    Sae::new(parts).map_err(|e| FormatError::weights(WEIGHTS, e))
}

/// Writes a file that `Autoencoder.from_state_dict` loads; its statistics of use say that nothing was counted.
///
/// # Errors
/// If widths differ, or the autoencoder is neither a ReLU one that reads vectors as they are nor a top-k one that standardises
/// them, which is all the format holds, or writing fails.
pub fn write(sae: &Sae, target: impl Write + Seek) -> Result<(), FormatError> {
    fold::refuse_skip(WEIGHTS, sae)?;
    let dims = sae.dims();
    let (d, n) = (dims.d_in, dims.n_latents);
    if dims.d_out != d {
        let found = format!("a transcoder from {d} to {}", dims.d_out);
        return Err(FormatError::field(WEIGHTS, "pre_bias", "one width for input and output", found));
    }
    let top_k;
    let (name, settings): (&str, &[(&str, Item<'_>)]) = match sae.activation() {
        Activation::Relu => {
            fold::refuse_scaled_rows(WEIGHTS, sae)?;
            ("ReLU", &[])
        }
        Activation::TopK { k } => {
            fold::refuse_rows_but(WEIGHTS, sae, &[RowScaling::LAYER_NORM])?;
            top_k = [("k", Item::Int(*k)), (AFTER, Item::Text("ReLU"))];
            ("TopK", &top_k)
        }
        Activation::JumpRelu { .. } => {
            return Err(FormatError::field(WEIGHTS, "activation", "ReLU or top-k", "thresholds"));
        }
    };
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
        ("activation", Item::Text(name)),
        (SETTINGS, Item::Dict(settings)),
    ];
    torch::write(WEIGHTS, &items, target)
}
