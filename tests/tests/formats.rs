//! Weight files other programs wrote, files we write, and files nobody should trust.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use conformance::{compare, golden};
use native::sae_files::{self, SaeFile, SaeFormat};
use shared::format::tensors::TensorFile;
use shared::format::{dictionary_learning, gemma_scope, openai, saelens};
use shared::{Activation, RowScaling, Rows, reference};

const ARCHIVES: [(&str, &[u8]); 4] = [
    ("stored", include_bytes!("../golden/sae/stored.npz")),
    ("deflated", include_bytes!("../golden/sae/deflated.npz")),
    ("fortran_f8", include_bytes!("../golden/sae/fortran_f8.npz")),
    ("lower_case", include_bytes!("../golden/sae/lower_case.npz")),
];

#[test]
fn archives_of_numpy_hold_the_same_weights_however_written() {
    let goldens = golden::numpy().unwrap();
    let wanted = &goldens.iter().find(|g| g.name == "transcoder").unwrap().sae;
    for (name, bytes) in ARCHIVES {
        assert_eq!(gemma_scope::read(Cursor::new(bytes)).unwrap(), *wanted, "{name}");
    }
}

#[test]
fn folders_of_saelens_are_read_with_their_metadata() {
    for folder in &golden::SAELENS {
        let (sae, metadata) = saelens::read(folder.config, folder.weights).unwrap();
        assert_eq!(metadata.tap.unwrap().to_string(), "resid.4", "{}", folder.name);
        assert_eq!(metadata.context_size, Some(128), "{}", folder.name);
        assert_eq!(metadata.prepend_bos, Some(true), "{}", folder.name);
        assert_eq!(sae.dims().n_latents, 31);
    }
}

/// Folders of other programs, with what those compute from them.
const PEERS: [(&str, &str); 23] = [
    ("dictionary_learning_AutoEncoder", ""),
    ("dictionary_learning_AutoEncoderNew", ""),
    ("dictionary_learning_GatedAutoEncoder", ""),
    ("dictionary_learning_JumpReluAutoEncoder", ""),
    ("dictionary_learning_AutoEncoderTopK", ""),
    ("dictionary_learning_BatchTopKSAE", ""),
    ("dictionary_learning_MatryoshkaBatchTopKSAE", ""),
    ("openai", "3.pt"),
    ("sparsify", "layers.3"),
    ("sparsify_transcode", "layers.3"),
    ("mlsae", ""),
    ("openmoss_jumprelu", ""),
    ("openmoss_plain", ""),
    ("openmoss_relu", ""),
    ("openmoss_topk", ""),
    ("openmoss_tokenwise", ""),
    ("openai_topk", "3.pt"),
    ("sparsify_skip", "layers.3"),
    ("sparsify_skip_transcode", "layers.3"),
    ("mlsae_standardised", ""),
    ("mlsae_tfm", ""),
    ("gemma_scope_2_affine", ""),
    ("gemma_scope_2_resid", ""),
];

/// What the peer computed: `x`, `features`, `reconstruction`.
struct Expected {
    x: Vec<f32>,
    features: Vec<f32>,
    reconstruction: Vec<f32>,
}

fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sae/peers")
}

fn expected(name: &str) -> Expected {
    let bytes = fs::read(peers().join(name).join("expected.safetensors")).unwrap();
    let file = TensorFile::open(name, &bytes).unwrap();
    let data = |tensor: &str| file.read(tensor).unwrap().data;
    Expected { x: data("x"), features: data("features"), reconstruction: data("reconstruction") }
}

fn compute(file: &SaeFile, expected: &Expected) -> Result<(), String> {
    let rows = Rows::new(&expected.x, file.sae.dims().d_in).unwrap();
    let codes = reference::encode(&file.sae, rows).unwrap();
    let close =
        |wanted: &[f32], found: &[f32]| compare::close(wanted, found, 1e-5).map_err(|e| e.to_string());
    close(&expected.features, &codes.to_dense()).map(drop)?;
    // Row by row: rows of one file have very different sizes.
    let (found, width) = (reference::decode(&file.sae, rows, &codes).unwrap(), file.sae.dims().d_out);
    for (wanted, found) in expected.reconstruction.chunks(width).zip(found.chunks(width)) {
        let size = wanted.iter().fold(f32::MIN_POSITIVE, |m, w| m.max(w.abs()));
        let over = |values: &[f32]| values.iter().map(|v| v / size).collect::<Vec<_>>();
        close(&over(wanted), &over(found)).map(drop)?;
    }
    Ok(())
}

#[test]
fn files_of_other_programs_compute_what_those_compute() {
    for (name, inside) in PEERS {
        let file = sae_files::read(&peers().join(name).join(inside)).unwrap();
        compute(&file, &expected(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tap = file.metadata.tap.map(|tap| tap.to_string());
        let silent = ["openai", "mlsae", "mlsae_tfm", "gemma_scope_2_affine"];
        let said = !silent.contains(&name) && !name.starts_with("openai") && !name.ends_with("transcode");
        assert_eq!(tap.as_deref(), said.then_some("resid.3"), "{name}");
        let target = file.metadata.target.map(|tap| tap.to_string());
        assert_eq!(target.as_deref(), (name == "gemma_scope_2_affine").then_some("mlp.3"), "{name}");
        if name.starts_with("dictionary_learning") {
            assert_eq!(file.metadata.context_size, Some(128), "{name}");
        }
    }
}

#[test]
fn every_format_holds_what_it_says_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    for (name, inside) in PEERS {
        let file = sae_files::read(&peers().join(name).join(inside)).unwrap();
        for format in SaeFormat::ALL {
            let path = folder.path().join(name).join(format!("{format:?}"));
            match sae_files::write(&path, format, &file) {
                Ok(()) => {
                    assert!(holds(format, &file, name), "{name} as {format:?} was not refused");
                    let again = sae_files::read(&path).unwrap();
                    compute(&again, &expected(name)).unwrap_or_else(|e| panic!("{name} as {format:?}: {e}"));
                }
                Err(error) => {
                    assert!(!holds(format, &file, name), "{name} as {format:?}: {error:#}");
                    assert!(!path.exists(), "{name} as {format:?} left something");
                }
            }
        }
    }
}

/// What a format can say, after docs/formats.md.
fn holds(format: SaeFormat, file: &SaeFile, name: &str) -> bool {
    let sae = &file.sae;
    let relu = *sae.activation() == Activation::Relu;
    let top_k = matches!(sae.activation(), Activation::TopK { .. });
    let (skip, rows) = (sae.w_skip().is_some(), sae.rows());
    let one_width = sae.dims().d_in == sae.dims().d_out;
    let transcoder = !one_width || skip || file.metadata.target.is_some();
    match format {
        SaeFormat::SaeLens => !transcoder || (!top_k && rows.is_none()),
        SaeFormat::GemmaScope => !top_k && !skip && rows.is_none(),
        SaeFormat::GemmaScope2 => !top_k && rows.is_none(),
        SaeFormat::DictionaryLearning => one_width && !skip && rows.is_none(),
        SaeFormat::Sparsify => top_k && one_width && rows.is_none(),
        SaeFormat::OpenMoss => one_width && !skip && rows != RowScaling::LAYER_NORM,
        // Of the goldens only its own are without a bias beside the one subtracted from inputs.
        SaeFormat::Mlsae => name.starts_with("mlsae"),
        SaeFormat::OpenAi => {
            let scaled = if relu { RowScaling::None } else { RowScaling::LAYER_NORM };
            one_width && !skip && (relu || top_k) && rows == scaled
        }
    }
}

#[test]
fn damaged_torch_files_never_panic() {
    for (name, file) in
        [("dictionary_learning_BatchTopKSAE", "ae.pt"), ("openai", "3.pt"), ("openai_topk", "3.pt")]
    {
        let bytes = fs::read(peers().join(name).join(file)).unwrap();
        let config = br#"{"trainer": {"dict_class": "BatchTopKSAE"}}"#;
        let read = |bytes: &[u8]| {
            if name.starts_with("openai") {
                openai::read(Cursor::new(bytes))
            } else {
                dictionary_learning::read(Some(config), Cursor::new(bytes)).map(|(sae, _)| sae)
            }
        };
        let good = read(&bytes).unwrap();
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length]).is_err(), "{name} cut at {length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            if let Ok(sae) = read(&damaged) {
                assert_eq!(sae, good, "{name}: byte {at} changed the weights unnoticed");
            }
        }
    }
}

#[test]
fn converting_keeps_features_and_reconstructions() {
    let folder = tempfile::tempdir().unwrap();
    for (index, golden) in golden::saelens().unwrap().into_iter().enumerate() {
        let (_, metadata) =
            saelens::read(golden::SAELENS[index].config, golden::SAELENS[index].weights).unwrap();
        let file = SaeFile { sae: golden.sae, metadata };
        let expected =
            Expected { x: golden.x, features: golden.features, reconstruction: golden.reconstruction };
        for format in SaeFormat::ALL {
            let path = folder.path().join(golden.name).join(format!("{format:?}"));
            let written = sae_files::write(&path, format, &file);
            assert_eq!(written.is_ok(), holds(format, &file, golden.name), "{} as {format:?}", golden.name);
            if written.is_ok() {
                let again = sae_files::read(&path).unwrap();
                compute(&again, &expected).unwrap_or_else(|e| panic!("{} as {format:?}: {e}", golden.name));
            }
        }
    }
}

/// Cuts at every length and flips every byte: an error or the same sizes, never a panic.
#[test]
fn damaged_files_never_panic() {
    for (name, bytes) in ARCHIVES {
        for length in (0..bytes.len()).step_by(7) {
            assert!(gemma_scope::read(Cursor::new(&bytes[..length])).is_err(), "{name} cut at {length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[at] ^= 0x55;
            let _ = gemma_scope::read(Cursor::new(damaged));
        }
    }
    let folder = &golden::SAELENS[2];
    for at in 0..folder.weights.len() {
        assert!(saelens::read(folder.config, &folder.weights[..at]).is_err(), "weights cut at {at}");
        let mut damaged = folder.weights.to_vec();
        damaged[at] ^= 0x55;
        let _ = saelens::read(folder.config, &damaged);
    }
    for at in 0..folder.config.len() {
        assert!(saelens::read(&folder.config[..at], folder.weights).is_err(), "config cut at {at}");
        let mut damaged = folder.config.to_vec();
        damaged[at] ^= 0x55;
        let _ = saelens::read(&damaged, folder.weights);
    }
}
