//! Tuned lenses (arXiv 2303.08112): one linear map a layer, `params.pt` as its authors publish it or the same tensors as safetensors.
//!
//! `0.weight [d, d]` and `0.bias [d]` are of the residual stream after the first block, and so on.

use std::io::{Read, Seek};
use std::sync::Arc;

use super::error::FormatError;
use super::tensors::{TensorFile, serialize};
use super::torch::TorchFile;
use crate::lens::Translator;

/// The published file.
pub const PARAMS: &str = "params.pt";
/// The same as safetensors.
pub const LENS: &str = "lens.safetensors";

/// Layers, in order.
pub type Lens = Vec<Arc<Translator>>;

/// Reads `params.pt`.
///
/// # Errors
/// If the file does not parse, layers are missing or of different widths, or a map has no inverse.
pub fn read_params(file: impl Read + Seek) -> Result<Lens, FormatError> {
    let mut file = TorchFile::open(PARAMS, file)?;
    let n = (0..).take_while(|i| file.has(&format!("{i}.weight"))).count();
    layers(PARAMS, n, |name, d| match d {
        Some(d) => file.exact(name, &[d]),
        None => file.matrix(name).map(|(_, _, values)| values),
    })
}

/// Reads `lens.safetensors`, or the tensors after `prefix` of a larger file called `part` in messages.
///
/// # Errors
/// As [`read_params`].
pub fn read_tensors(part: &'static str, file: &TensorFile<'_>, prefix: &str) -> Result<Lens, FormatError> {
    let n = (0..).take_while(|i| file.has(&format!("{prefix}{i}.weight"))).count();
    layers(part, n, |name, d| match d {
        Some(d) => file.exact(&format!("{prefix}{name}"), &[d]),
        None => file.matrix(&format!("{prefix}{name}")).map(|(_, _, values)| values),
    })
}

/// The maps of `n` layers from what `tensor` finds: a matrix, or a vector of so many values.
fn layers(
    part: &'static str,
    n: usize,
    mut tensor: impl FnMut(&str, Option<usize>) -> Result<Vec<f32>, FormatError>,
) -> Result<Lens, FormatError> {
    if n == 0 {
        return Err(FormatError::field(part, "0.weight", "the map of the first layer", "none"));
    }
    let mut lens = Lens::new();
    for layer in 0..n {
        let weight = tensor(&format!("{layer}.weight"), None)?;
        let d = lens.first().map_or_else(|| weight.len().isqrt(), |first: &Arc<Translator>| first.width());
        let bias = tensor(&format!("{layer}.bias"), Some(d))?;
        lens.push(Arc::new(Translator::new(weight, bias).map_err(|e| FormatError::weights(part, e))?));
    }
    Ok(lens)
}

/// The file `lens.safetensors`.
///
/// # Errors
/// If it cannot be written.
pub fn write(lens: &[Arc<Translator>]) -> Result<Vec<u8>, FormatError> {
    write_with(LENS, lens, "", &[])
}

/// `others`, and the tensors of a lens after `prefix`.
pub(crate) fn write_with(
    part: &'static str,
    lens: &[Arc<Translator>],
    prefix: &str,
    others: &[(&str, &[usize], &[f32])],
) -> Result<Vec<u8>, FormatError> {
    let names: Vec<[String; 2]> =
        (0..lens.len()).map(|i| ["weight", "bias"].map(|kind| format!("{prefix}{i}.{kind}"))).collect();
    let shapes: Vec<[usize; 2]> = lens.iter().map(|map| [map.width(); 2]).collect();
    let mut all = others.to_vec();
    for ((map, names), shape) in lens.iter().zip(&names).zip(&shapes) {
        all.push((&names[0], shape, map.weight()));
        all.push((&names[1], &shape[..1], map.bias()));
    }
    serialize(part, &all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_and_what_is_missing_is_named() {
        let map = |w: f32| Arc::new(Translator::new(vec![w, 0.5, 0.0, w], vec![1.0, w]).unwrap());
        let lens = [map(0.25), map(2.0)];
        let bytes = write(&lens).unwrap();
        let file = TensorFile::open(LENS, &bytes).unwrap();
        assert_eq!(read_tensors(LENS, &file, "").unwrap(), lens);
        let error = read_tensors(LENS, &file, "other.").unwrap_err().to_string();
        assert!(error.contains("0.weight"), "{error}");
        let narrow =
            serialize(LENS, &[("0.weight", &[2, 2], &[0.0; 4]), ("0.bias", &[3], &[0.0; 3])]).unwrap();
        assert!(read_tensors(LENS, &TensorFile::open(LENS, &narrow).unwrap(), "").is_err());
    }
}
