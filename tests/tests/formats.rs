//! Weight files other programs wrote, files we write, and files nobody should trust.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::io::Cursor;

use conformance::{compare, golden};
use native::sae_files::{self, SaeFile, SaeFormat};
use shared::format::{gemma_scope, saelens};
use shared::{Rows, reference};

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

#[test]
fn converting_keeps_features_and_reconstructions() {
    let folder = tempfile::tempdir().unwrap();
    for golden in golden::saelens().unwrap() {
        for (format, name) in [(SaeFormat::SaeLens, "lens"), (SaeFormat::GemmaScope, "scope")] {
            let path = folder.path().join(golden.name).join(name);
            let file = SaeFile { sae: golden.sae.clone(), metadata: Default::default() };
            let top_k = golden.name.starts_with("topk");
            if let Err(error) = sae_files::write(&path, format, &file) {
                assert!(top_k && format == SaeFormat::GemmaScope, "{}: {error:#}", golden.name);
                continue;
            }
            let sae = sae_files::read(&path).unwrap().sae;
            let codes = reference::encode(&sae, Rows::new(&golden.x, sae.dims().d_in).unwrap()).unwrap();
            compare::close(&golden.features, &codes.to_dense(), 1e-5).unwrap();
            compare::close(&golden.reconstruction, &reference::decode(&sae, &codes).unwrap(), 1e-5).unwrap();
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
