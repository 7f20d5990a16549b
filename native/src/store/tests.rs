//! Stores that are broken on purpose: every reading names the file or the field, and none panics.

use std::fs;

use super::manifest::{Dropped, FORMAT, SplitInfo, TextCounts, TokenizerInfo, VERSION};
use super::tensors::{TensorHeader, write};
use super::*;
use crate::model::ModelProvenance;

const TAP: &str = "resid.3";

fn point() -> TapPoint {
    TAP.parse().unwrap()
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn file(path: &Path, tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> FileInfo {
    let headers: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| TensorHeader { name, dtype, shape, bytes: data.len() as u64 })
        .collect();
    write(path, &headers, |out| tensors.iter().try_for_each(|t| out.write_all(&t.3))).unwrap()
}

fn shard_file(folder: &Path) -> FileInfo {
    let x: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    file(
        &shard_path(folder, point(), Split::Train, 0),
        &[
            ("x", "F32", &[3, 2], x),
            ("sequence", "U32", &[3], u32s(&[1, 0, 1])),
            ("position", "U32", &[3], u32s(&[1, 2, 3])),
        ],
    )
}

/// A store of two sequences of four tokens and one shard of three vectors of width 2.
fn small(folder: &Path) -> Manifest {
    let tokens = |split, n: usize| {
        let ids: Vec<u32> = (0..4 * n as u32).collect();
        file(&tokens_path(folder, split), &[("ids", "U32", &[n, 4], u32s(&ids))])
    };
    let mean = file(&mean_path(folder, point()), &[("mean", "F32", &[2], u32s(&[0, 0]))]);
    Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        writer: "test".to_owned(),
        model: ModelProvenance {
            name: "m".to_owned(),
            source: "m".to_owned(),
            format: "gguf".to_owned(),
            sha256: "0".repeat(64),
            architecture: "llama".to_owned(),
            precision: shared::Precision::F32,
        },
        n_layers: 5,
        d_model: 2,
        tokenizer: TokenizerInfo {
            vocab_size: 8,
            bos: None,
            separator: None,
            special_ids: vec![0],
            dropped_ids: vec![],
        },
        sequence_length: 4,
        dropped: Dropped { special_tokens: true, positions: vec![0] },
        dtype: StoreDtype::F32,
        bucket_vectors: 10,
        seed: 0,
        taps: vec![TapInfo { point: point(), width: 2, scale: 1.5, mean }],
        train: SplitInfo {
            n_sequences: 2,
            n_vectors: 3,
            tokens: tokens(Split::Train, 2),
            shards: vec![ShardInfo { n_vectors: 3, files: vec![shard_file(folder)] }],
        },
        held_out: SplitInfo {
            n_sequences: 0,
            n_vectors: 0,
            tokens: tokens(Split::HeldOut, 0),
            shards: Vec::new(),
        },
        text: Vec::new(),
        text_counts: TextCounts::default(),
    }
}

fn opened(folder: &Path, manifest: &Manifest) -> Result<Store> {
    fs::write(folder.join(MANIFEST), serde_json::to_vec(manifest).unwrap()).unwrap();
    Store::open(folder)
}

#[test]
fn reads_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = opened(folder.path(), &small(folder.path())).unwrap();
    for _ in 0..2 {
        let shard = store.read_shard(point(), Split::Train, 0).unwrap();
        assert_eq!((shard.vectors, shard.width), ((0..6).map(|i| i as f32).collect(), 2));
        assert_eq!((shard.sequences, shard.positions), (vec![1, 0, 1], vec![1, 2, 3]));
    }
    assert_eq!(store.tokens(Split::Train).unwrap().sequence(1), [4, 5, 6, 7]);
    assert_eq!(store.tokens(Split::HeldOut).unwrap().n_sequences(), 0);
    assert_eq!((store.mean(point()).unwrap(), store.tap(point()).unwrap().scale), (vec![0.0, 0.0], 1.5));
    assert!(store.tap("mlp.0".parse().unwrap()).unwrap_err().to_string().contains("holds resid.3"));
    assert!(store.read_shard(point(), Split::Train, 1).unwrap_err().to_string().contains("no shard 1"));
    let words = store.describe();
    assert!(words.contains("resid.3") && words.contains("C 1.500000"), "{words}");
}

#[test]
fn our_files_are_what_the_safetensors_crate_reads() {
    let folder = tempfile::tempdir().unwrap();
    shard_file(folder.path());
    let bytes = fs::read(shard_path(folder.path(), point(), Split::Train, 0)).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(parsed.tensor("x").unwrap().shape(), [3, 2]);
    assert_eq!(parsed.tensor("position").unwrap().data(), u32s(&[1, 2, 3]));
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 64, 56);
}

#[test]
fn tensors_may_stand_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut manifest = small(folder.path());
    let path = shard_path(folder.path(), point(), Split::Train, 0);
    let x: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    manifest.train.shards[0].files[0] = file(
        &path,
        &[
            ("position", "U32", &[3], u32s(&[1, 2, 3])),
            ("x", "F32", &[3, 2], x),
            ("sequence", "U32", &[3], u32s(&[1, 0, 1])),
        ],
    );
    let shard = opened(folder.path(), &manifest).unwrap().read_shard(point(), Split::Train, 0).unwrap();
    assert_eq!(shard.vectors, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!((shard.sequences, shard.positions), (vec![1, 0, 1], vec![1, 2, 3]));
}

/// A shard long enough for several threads and an odd last piece, of every type, into fresh and into used memory.
#[test]
fn long_shards_are_read_whole_by_several_threads() {
    let (n, width) = (70_001usize, 101usize);
    let value = |i: usize| (i % 251) as f32 - 125.0;
    for dtype in [StoreDtype::F32, StoreDtype::Bf16, StoreDtype::F16] {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = small(folder.path());
        let bytes = |v: f32| match dtype {
            StoreDtype::F32 => v.to_le_bytes().to_vec(),
            StoreDtype::Bf16 => half::bf16::from_f32(v).to_le_bytes().to_vec(),
            StoreDtype::F16 => half::f16::from_f32(v).to_le_bytes().to_vec(),
        };
        let x: Vec<u8> = (0..n * width).flat_map(|i| bytes(value(i))).collect();
        let (sequence, position) = (vec![1; n], (0..n as u32).map(|i| i % 3).collect::<Vec<_>>());
        let path = shard_path(folder.path(), point(), Split::Train, 0);
        let info = file(
            &path,
            &[
                ("x", dtype.safetensors_name(), &[n, width], x.clone()),
                ("sequence", "U32", &[n], u32s(&sequence)),
                ("position", "U32", &[n], u32s(&position)),
            ],
        );
        manifest.dtype = dtype;
        (manifest.sequence_length, manifest.train.n_sequences) = (1 << 20, 2);
        manifest.taps[0].width = width;
        manifest.train.n_vectors = n as u64;
        manifest.train.shards[0] = ShardInfo { n_vectors: n as u64, files: vec![info] };
        let store = opened(folder.path(), &manifest).unwrap();
        let mut shard = Shard::default();
        for _ in 0..2 {
            store.read_shard_into(point(), Split::Train, 0, &mut shard).unwrap();
            assert!(shard.vectors.iter().enumerate().all(|(i, &v)| v == value(i)) && shard.width == width);
            assert_eq!(
                (shard.vectors.len(), &shard.sequences, &shard.positions),
                (n * width, &sequence, &position)
            );
            shard.vectors.fill(9.0);
            shard.vectors.truncate(5);
        }
        let mut raw = vec![0; store.raw_bytes(point(), Split::Train, 0).unwrap()];
        store.read_raw(point(), Split::Train, 0, &mut raw).unwrap();
        assert!(raw == x, "{dtype:?}: not as it is stored");
        let short = store.read_raw(point(), Split::Train, 0, &mut raw[1..]).unwrap_err();
        assert!(format!("{short:#}").contains("room for"), "{short:#}");
        // A bit anywhere, also where one thread's stretch ends and the next begins.
        let good = fs::read(&path).unwrap();
        for at in [400, good.len() / 4, good.len() / 2, good.len() - 4 * n - 2] {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            let error = format!("{:#}", store.read_shard(point(), Split::Train, 0).unwrap_err());
            assert!(error.contains("CRC-64"), "{at}: {error}");
            let error = store.read_raw(point(), Split::Train, 0, &mut raw).unwrap_err();
            assert!(format!("{error:#}").contains("CRC-64"), "{at}: {error:#}");
        }
        // The manifest of a first version has no CRC: the SHA-256 finds the same.
        manifest.version = 1;
        manifest.train.shards[0].files[0].crc64 = None;
        let store = opened(folder.path(), &manifest).unwrap();
        let error = format!("{:#}", store.read_shard(point(), Split::Train, 0).unwrap_err());
        assert!(error.contains("SHA-256"), "{error}");
        fs::write(&path, &good).unwrap();
        store.read_shard_into(point(), Split::Train, 0, &mut shard).unwrap();
        assert_eq!(shard.vectors[1], -124.0);
    }
}

#[test]
fn verifying_reads_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let store = opened(folder.path(), &small(folder.path())).unwrap();
    let total = std::sync::atomic::AtomicU64::new(0);
    let add = |bytes| {
        total.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    };
    store.verify(add).unwrap();
    let files = store.manifest().files();
    assert_eq!((files.len(), total.into_inner()), (4, files.iter().map(|(_, f)| f.bytes).sum::<u64>()));
    for (name, _) in files {
        let path = folder.path().join(&name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&path, bad).unwrap();
        let error = format!("{:#}", store.verify(|_| ()).unwrap_err());
        assert!(error.contains(&name), "{error}");
        fs::write(&path, good).unwrap();
    }
    store.verify(|_| ()).unwrap();
}

#[test]
fn damaged_shards_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = opened(folder.path(), &small(folder.path())).unwrap();
    let path = shard_path(folder.path(), point(), Split::Train, 0);
    let good = fs::read(&path).unwrap();
    let error = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", store.read_shard(point(), Split::Train, 0).unwrap_err());
        assert!(error.contains("shard-00000.safetensors"), "{error}");
        error
    };
    assert!(error(&good[..good.len() - 1]).contains("truncated"));
    assert!(error(&[]).contains("truncated"));
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let _ = error(&flipped);
    let at = good.len() - 30;
    flipped = good.clone();
    flipped[at] ^= 1;
    assert!(error(&flipped).contains("CRC-64"));
    let mut header = good.clone();
    header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(error(&header).contains("header length"));
    header = good.clone();
    header[8] = b'!';
    assert!(error(&header).contains("broken header"));
    fs::remove_file(&path).unwrap();
    assert!(store.read_shard(point(), Split::Train, 0).is_err());
    fs::write(&path, &good).unwrap();
    store.read_shard(point(), Split::Train, 0).unwrap();
}

#[test]
fn shards_of_other_shapes_types_and_origins_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut manifest = small(folder.path());
    let path = shard_path(folder.path(), point(), Split::Train, 0);
    let (x, s, p) = (vec![0u8; 24], u32s(&[0, 1, 1]), u32s(&[1, 2, 3]));
    let cases: [(&str, Vec<(&str, &str, &[usize], Vec<u8>)>); 6] = [
        (
            "shape",
            vec![
                ("x", "F32", &[2, 3], x.clone()),
                ("sequence", "U32", &[3], s.clone()),
                ("position", "U32", &[3], p.clone()),
            ],
        ),
        (
            "type",
            vec![
                ("x", "I32", &[3, 2], x.clone()),
                ("sequence", "U32", &[3], s.clone()),
                ("position", "U32", &[3], p.clone()),
            ],
        ),
        (
            "`position` is missing",
            vec![("x", "F32", &[3, 2], x.clone()), ("sequence", "U32", &[3], s.clone())],
        ),
        (
            "more tensors",
            vec![
                ("x", "F32", &[3, 2], x.clone()),
                ("sequence", "U32", &[3], s.clone()),
                ("position", "U32", &[3], p.clone()),
                ("y", "U32", &[1], u32s(&[1])),
            ],
        ),
        (
            "outside",
            vec![
                ("x", "F32", &[3, 2], x.clone()),
                ("sequence", "U32", &[3], u32s(&[0, 2, 1])),
                ("position", "U32", &[3], p.clone()),
            ],
        ),
        (
            "outside",
            vec![
                ("x", "F32", &[3, 2], x.clone()),
                ("sequence", "U32", &[3], s),
                ("position", "U32", &[3], u32s(&[1, 2, 4])),
            ],
        ),
    ];
    for (word, tensors) in cases {
        manifest.train.shards[0].files[0] = file(&path, &tensors);
        let store = opened(folder.path(), &manifest).unwrap();
        let error = format!("{:#}", store.read_shard(point(), Split::Train, 0).unwrap_err());
        assert!(error.contains(word) && error.contains("shard-00000"), "{word}: {error}");
    }
}

#[test]
fn manifests_that_cannot_be_meant_are_refused_with_the_field() {
    let folder = tempfile::tempdir().unwrap();
    let good = serde_json::to_value(small(folder.path())).unwrap();
    let refuse = |word: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut broken = good.clone();
        change(&mut broken);
        fs::write(folder.path().join(MANIFEST), broken.to_string()).unwrap();
        let error = format!("{:#}", Store::open(folder.path()).unwrap_err());
        assert!(error.contains(word) && error.contains(MANIFEST), "{word}: {error}");
    };
    for key in good.as_object().unwrap().keys() {
        refuse(&format!("missing field `{key}`"), &|m| drop(m.as_object_mut().unwrap().remove(key)));
    }
    refuse("unknown field `extra`", &|m| m["extra"] = 1.into());
    refuse("unknown field `extra`", &|m| m["taps"][0]["extra"] = 1.into());
    refuse("format", &|m| m["format"] = "zip".into());
    refuse("version", &|m| m["version"] = 3.into());
    refuse("version", &|m| m["version"] = 0.into());
    refuse("crc64", &|m| m["taps"][0]["mean"]["crc64"] = "12".into());
    refuse("sequence_length", &|m| m["sequence_length"] = 0.into());
    refuse("taps", &|m| m["taps"] = serde_json::json!([]));
    refuse("unordered", &|m| m["taps"] = serde_json::json!([m["taps"][0], m["taps"][0]]));
    refuse("taps[resid.3].width", &|m| m["taps"][0]["width"] = (1u64 << 60).into());
    refuse("taps[resid.3].scale", &|m| m["taps"][0]["scale"] = 0.0.into());
    refuse("train.n_sequences", &|m| m["train"]["n_sequences"] = u64::MAX.into());
    refuse("train.n_vectors", &|m| m["train"]["n_vectors"] = 4.into());
    refuse("train.n_vectors", &|m| m["train"]["shards"][0]["n_vectors"] = u64::MAX.into());
    refuse("train.shards[0].files", &|m| m["train"]["shards"][0]["files"] = serde_json::json!([]));
    refuse("sha256", &|m| m["train"]["shards"][0]["files"][0]["sha256"] = "../../x".into());
    refuse("bytes", &|m| m["train"]["tokens"]["bytes"] = u64::MAX.into());
    refuse("special_ids", &|m| m["tokenizer"]["special_ids"] = serde_json::json!([3, 1]));
    fs::write(folder.path().join(MANIFEST), "{").unwrap();
    assert!(Store::open(folder.path()).is_err());
    fs::remove_file(folder.path().join(MANIFEST)).unwrap();
    assert!(Store::open(folder.path()).unwrap_err().to_string().contains("no manifest.json"));
}
