//! Golden vectors compiled into the tests, so that the browser can run them too. The scripts that made them lie beside
//! them in `tests/golden/sae`.

use shared::format::tensors::{Tensor, TensorFile};
use shared::format::{FormatError, saelens};
use shared::{Activation, RowScaling, Sae, SaeParts};

/// An autoencoder, inputs, and what an independent program computed from them.
#[derive(Debug, Clone)]
pub struct Golden {
    /// The golden's file or folder.
    pub name: &'static str,
    /// The weights.
    pub sae: Sae,
    /// Inputs `[n_rows, d_in]`.
    pub x: Vec<f32>,
    /// Latents `[n_rows, n]`, dense.
    pub features: Vec<f32>,
    /// Reconstructions `[n_rows, d_out]`.
    pub reconstruction: Vec<f32>,
}

/// A folder SAELens wrote, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct SaeLensFolder {
    /// The folder's name.
    pub name: &'static str,
    /// `cfg.json`.
    pub config: &'static [u8],
    /// `sae_weights.safetensors`.
    pub weights: &'static [u8],
    /// What SAELens computes: `x`, `features`, `reconstruction`.
    pub expected: &'static [u8],
}

const NUMPY: [(&str, &[u8]); 7] = [
    ("jumprelu", include_bytes!("../golden/sae/jumprelu.safetensors")),
    ("relu", include_bytes!("../golden/sae/relu.safetensors")),
    ("topk", include_bytes!("../golden/sae/topk.safetensors")),
    ("transcoder", include_bytes!("../golden/sae/transcoder.safetensors")),
    ("skip", include_bytes!("../golden/sae/skip.safetensors")),
    ("standardised", include_bytes!("../golden/sae/standardised.safetensors")),
    ("norm", include_bytes!("../golden/sae/norm.safetensors")),
];

macro_rules! saelens_folder {
    ($name:literal) => {
        SaeLensFolder {
            name: $name,
            config: include_bytes!(concat!("../golden/sae/saelens/", $name, "/cfg.json")),
            weights: include_bytes!(concat!("../golden/sae/saelens/", $name, "/sae_weights.safetensors")),
            expected: include_bytes!(concat!("../golden/sae/saelens/", $name, "/expected.safetensors")),
        }
    };
}

/// Every folder SAELens wrote.
pub const SAELENS: [SaeLensFolder; 15] = [
    saelens_folder!("standard"),
    saelens_folder!("standard_flat"),
    saelens_folder!("jumprelu"),
    saelens_folder!("jumprelu_bf16"),
    saelens_folder!("topk"),
    saelens_folder!("topk_rescaled"),
    saelens_folder!("topk_flat"),
    saelens_folder!("gated"),
    saelens_folder!("transcoder"),
    saelens_folder!("jumprelu_transcoder"),
    saelens_folder!("scaled_input"),
    saelens_folder!("skip_transcoder"),
    saelens_folder!("jumprelu_skip_transcoder"),
    saelens_folder!("layer_norm"),
    saelens_folder!("constant_norm"),
];

/// The goldens of the f64 NumPy script; in each, one row sits exactly on a decision.
///
/// # Errors
/// If a committed file is damaged.
pub fn numpy() -> Result<Vec<Golden>, FormatError> {
    NUMPY.iter().map(|&(name, bytes)| read_numpy(name, bytes)).collect()
}

/// The folders SAELens wrote, read by our reader.
///
/// # Errors
/// If a folder cannot be read.
pub fn saelens() -> Result<Vec<Golden>, FormatError> {
    let read = |folder: &SaeLensFolder| {
        let (sae, _) = saelens::read(folder.config, folder.weights)?;
        let file = TensorFile::open(folder.name, folder.expected)?;
        let data = |name| file.read(name).map(|tensor| tensor.data);
        let (x, features, reconstruction) = (data("x")?, data("features")?, data("reconstruction")?);
        Ok(Golden { name: folder.name, sae, x, features, reconstruction })
    };
    SAELENS.iter().map(read).collect()
}

fn read_numpy(name: &'static str, bytes: &[u8]) -> Result<Golden, FormatError> {
    let file = TensorFile::open(name, bytes)?;
    let data = |name| file.read(name).map(|tensor| tensor.data);
    let (_, d_in, w_enc) = file.matrix("w_enc")?;
    let (_, d_out, w_dec) = file.matrix("w_dec")?;
    let activation = if file.has("threshold") {
        Activation::JumpRelu { threshold: data("threshold")? }
    } else if file.has("k") {
        let Tensor { data, .. } = file.read("k")?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small count stored as a float"
        )]
        Activation::TopK { k: data.first().map_or(0, |&k| k as usize) }
    } else {
        Activation::Relu
    };
    let rows = if file.has("eps") {
        RowScaling::Standardise { eps: data("eps")?.first().copied().unwrap_or(f32::NAN) }
    } else if file.has("norm") {
        RowScaling::Norm
    } else {
        RowScaling::None
    };
    let parts = SaeParts {
        d_in,
        d_out,
        w_enc,
        b_enc: data("b_enc")?,
        w_dec,
        b_dec: data("b_dec")?,
        activation,
        w_skip: if file.has("w_skip") { Some(data("w_skip")?) } else { None },
        rows,
    };
    let sae = Sae::new(parts).map_err(|source| FormatError::Weights { part: name.to_owned(), source })?;
    let (x, features, reconstruction) = (data("x")?, data("features")?, data("reconstruction")?);
    Ok(Golden { name, sae, x, features, reconstruction })
}
