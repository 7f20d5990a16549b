//! The client against a hub that redirects, breaks off, refuses and lies.

pub(crate) mod server;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use sha1::{Digest, Sha1};

use super::*;
use crate::files::{hex, sha256};
use server::{Reply, Request, Server};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn git_blob(bytes: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

/// An entry of a list of files, as the hub writes it: from 1000 bytes on kept outside git.
pub(crate) fn entry(path: &str, bytes: &[u8]) -> serde_json::Value {
    let mut entry = json!({"type": "file", "oid": git_blob(bytes), "size": bytes.len(), "path": path});
    if bytes.len() >= 1000 {
        entry["lfs"] = json!({"oid": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
    }
    entry
}

fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761)).to_le_bytes()).collect()
}

fn model_files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
        ("onnx/model.onnx", vec![1; 2000]),
        ("pytorch_model.bin", vec![2; 2000]),
        ("tokenizer.json", vec![b' '; 1500]),
        ("tokenizer_config.json", b"[]".to_vec()),
    ]
}

/// Answers as a hub does that has `a/b` with `files`; `None` for what is a file itself.
fn catalogue(files: &[(&'static str, Vec<u8>)], request: &Request) -> Option<Reply> {
    let path = request.path.split('?').next().unwrap();
    if path == "/api/models/a/b/revision/main" {
        return Some(Reply::ok(json!({"sha": COMMIT, "siblings": []}).to_string()));
    }
    if path == format!("/api/models/a/b/tree/{COMMIT}") {
        let list: Vec<_> = files.iter().map(|(path, bytes)| entry(path, bytes)).collect();
        return Some(Reply::ok(json!(list).to_string()));
    }
    let name = path.strip_prefix(&format!("/a/b/resolve/{COMMIT}/"))?;
    if files.iter().any(|(path, _)| *path == name) {
        None
    } else {
        Some(Reply::refused(404, "EntryNotFound"))
    }
}

fn file_of(request: &Request) -> Vec<u8> {
    let name = request.path.rsplit('/').next().unwrap().to_owned();
    model_files().into_iter().find(|(path, _)| *path == name).unwrap().1
}

fn hub() -> Server {
    Server::start(|request| {
        catalogue(&model_files(), request).unwrap_or_else(|| Reply::part(&file_of(request), request))
    })
}

pub(crate) fn settings(address: &str, folder: &Path) -> Arc<Settings> {
    Arc::new(Settings {
        endpoint: address.to_owned(),
        cache: folder.join("hub"),
        lists: folder.join("lists"),
        token: Some("secret".to_owned()),
        offline: false,
        pause: Duration::from_millis(1),
    })
}

fn with(settings: &Arc<Settings>, change: impl FnOnce(&mut Settings)) -> Arc<Settings> {
    let mut changed = Settings::clone(settings);
    change(&mut changed);
    Arc::new(changed)
}

/// A data set `c/d` with `files` at its main branch.
pub(crate) fn dataset(files: Vec<(String, Vec<u8>)>) -> Server {
    Server::start(move |request| {
        let path = request.path.split('?').next().unwrap();
        if path == "/api/datasets/c/d/revision/main" {
            return Reply::ok(json!({"sha": COMMIT}).to_string());
        }
        if path.starts_with(&format!("/api/datasets/c/d/tree/{COMMIT}")) {
            let list: Vec<_> = files.iter().map(|(path, bytes)| entry(path, bytes)).collect();
            return Reply::ok(json!(list).to_string());
        }
        let name = path.strip_prefix(&format!("/datasets/c/d/resolve/{COMMIT}/")).unwrap();
        Reply::part(&files.iter().find(|(path, _)| path == name).unwrap().1, request)
    })
}

const ALL: Need = Need { weights: true, tokenizer: true };

fn model(text: &str) -> ModelId {
    ModelId::parse(text).unwrap().unwrap()
}

fn message<T: fmt::Debug>(result: Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

#[test]
fn a_model_lands_in_the_shared_layout_and_is_then_used_without_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub();
    let settings = settings(&server.address, folder.path());
    let (path, label) = fetch_model(&settings, &model("a/b"), ALL).unwrap();
    assert_eq!(label, format!("a/b@{COMMIT}"));
    assert_eq!(path, folder.path().join("hub/models--a--b/snapshots").join(COMMIT));
    let requests = server.take();
    for unwanted in [".bin", ".onnx"] {
        assert!(!requests.iter().any(|r| r.path.ends_with(unwanted)), "{requests:?}");
    }
    for (name, bytes) in model_files() {
        let wanted = !name.ends_with(".bin") && !name.ends_with(".onnx");
        assert_eq!(path.join(name).exists(), wanted, "{name}");
        if wanted {
            assert!(fs::read(path.join(name)).unwrap() == bytes, "{name}");
            let hash = if bytes.len() < 1000 { git_blob(&bytes) } else { sha256(&bytes) };
            assert!(path.join("../../blobs").join(&hash).is_file(), "{name}");
            #[cfg(unix)]
            assert_eq!(fs::read_link(path.join(name)).unwrap(), Path::new("../../blobs").join(hash));
        }
    }
    let refs = folder.path().join("hub/models--a--b/refs/main");
    assert_eq!(fs::read_to_string(refs).unwrap(), COMMIT);

    let offline = with(&settings, |s| s.offline = true);
    assert_eq!(fetch_model(&offline, &model("a/b"), ALL).unwrap().0, path);
    // Without our saved list too, as when Hugging Face's own programs fetched it.
    fs::remove_dir_all(folder.path().join("lists")).unwrap();
    assert_eq!(fetch_model(&offline, &model("a/b"), ALL).unwrap().0, path);
    assert!(message(fetch_model(&offline, &model("a/c"), ALL)).contains("--offline"));
    assert!(server.take().is_empty());
}

#[test]
fn a_hub_that_cannot_be_reached_is_replaced_by_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub();
    let online = settings(&server.address, folder.path());
    let (path, _) = fetch_model(&online, &model("a/b"), ALL).unwrap();
    // Nobody listens on the port that was just given back.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = with(&online, |s| s.endpoint = format!("http://{dead}"));
    assert_eq!(fetch_model(&unreachable, &model("a/b"), ALL).unwrap().0, path);
    assert!(message(fetch_model(&unreachable, &model("a/c"), ALL)).contains("cannot reach http://127"));
}

#[test]
fn broken_connections_are_taken_up_where_they_broke() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        catalogue(&model_files(), request).unwrap_or_else(|| {
            let mut reply = Reply::part(&file_of(request), request);
            reply.sent = 200_000;
            reply
        })
    });
    let settings = settings(&server.address, folder.path());
    let (path, _) = fetch_model(&settings, &model("a/b"), ALL).unwrap();
    assert!(fs::read(path.join("model.safetensors")).unwrap() == weights());
    let asked: Vec<_> = server
        .take()
        .iter()
        .filter(|r| r.path.ends_with("model.safetensors"))
        .map(|r| r.from().unwrap_or(0))
        .collect();
    assert_eq!(asked, [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]);
}

#[test]
fn what_a_killed_process_left_is_gone_on_with_unless_it_is_wrong() {
    for (left, from, again) in [(weights()[..5000].to_vec(), 5000, false), (vec![7; 5000], 5000, true)] {
        let folder = tempfile::tempdir().unwrap();
        let server = hub();
        let settings = settings(&server.address, folder.path());
        let blobs = folder.path().join("hub/models--a--b/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", sha256(&weights()))), left).unwrap();
        let (path, _) = fetch_model(&settings, &model("a/b"), ALL).unwrap();
        assert!(fs::read(path.join("model.safetensors")).unwrap() == weights());
        let asked: Vec<_> = server
            .take()
            .iter()
            .filter(|r| r.path.ends_with("model.safetensors"))
            .map(|r| r.from().unwrap_or(0))
            .collect();
        assert_eq!(asked, if again { vec![from, 0] } else { vec![from] });
    }
}

#[test]
fn a_server_that_cannot_go_on_in_the_middle_sends_everything_again() {
    let folder = tempfile::tempdir().unwrap();
    let tries = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        catalogue(&model_files(), request).unwrap_or_else(|| {
            let mut reply = Reply::ok(file_of(request));
            let cut =
                request.path.ends_with("model.safetensors") && tries.fetch_add(1, Ordering::SeqCst) == 0;
            reply.sent = if cut { 300_000 } else { usize::MAX };
            reply
        })
    });
    let settings = settings(&server.address, folder.path());
    let (path, _) = fetch_model(&settings, &model("a/b"), ALL).unwrap();
    assert!(fs::read(path.join("model.safetensors")).unwrap() == weights());
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_where_it_redirects() {
    let folder = tempfile::tempdir().unwrap();
    let store = Server::start(|request| Reply::part(&file_of(request), request));
    let elsewhere = store.address.clone();
    let server = Server::start(move |request| {
        catalogue(&model_files(), request).unwrap_or_else(|| {
            let name = request.path.rsplit('/').next().unwrap();
            // Large files lie elsewhere, small ones on another address of the hub itself.
            let to = match (name, request.path.starts_with("/moved/")) {
                ("model.safetensors" | "tokenizer.json", _) => format!("{elsewhere}/{name}"),
                (_, false) => format!("/moved/{name}"),
                (_, true) => return Reply::ok(file_of(request)),
            };
            Reply { status: 302, ..Reply::ok("") }.with("location", to)
        })
    });
    let settings = settings(&server.address, folder.path());
    let (path, _) = fetch_model(&settings, &model("a/b"), ALL).unwrap();
    assert!(fs::read(path.join("model.safetensors")).unwrap() == weights());
    let (at_hub, at_store) = (server.take(), store.take());
    assert!(at_hub.iter().all(|r| r.header("authorization") == Some("Bearer secret")), "{at_hub:?}");
    assert!(at_hub.iter().any(|r| r.path.starts_with("/moved/")));
    assert_eq!(at_store.len(), 2);
    assert!(at_store.iter().all(|r| r.header("authorization").is_none()), "{at_store:?}");
}

#[test]
fn wrong_bytes_are_thrown_away() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        catalogue(&model_files(), request).unwrap_or_else(|| {
            let mut bytes = file_of(request);
            let last = bytes.len() - 1;
            bytes[last] ^= u8::from(!request.path.ends_with("config.json"));
            Reply::ok(bytes)
        })
    });
    let settings = settings(&server.address, folder.path());
    // config.json and tokenizer_config.json arrive as they are, the tokenizer does not.
    let error = message(fetch_model(&settings, &model("a/b"), Need { weights: false, tokenizer: true }));
    assert!(error.contains("tokenizer.json") && error.contains(&sha256(&[b' '; 1500])), "{error}");
    let blobs = fs::read_dir(folder.path().join("hub/models--a--b/blobs")).unwrap();
    let names: Vec<_> = blobs.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.iter().all(|name| name.len() == 40), "{names:?}");
}

#[test]
fn every_refusal_says_what_to_do() {
    let case = |status: u16, code: &'static str, at: &'static str| {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(move |request| {
            if request.path.contains(at) {
                return Reply::refused(status, code).with("x-error-message", "because");
            }
            catalogue(&model_files(), request).unwrap_or_else(|| Reply::ok(file_of(request)))
        });
        let settings = settings(&server.address, folder.path());
        (message(fetch_model(&settings, &model("a/b"), ALL)), server.take().len(), server.address)
    };
    let (error, _, address) = case(403, "GatedRepo", "/resolve/");
    for word in ["licence", &format!("{address}/a/b"), "HF_TOKEN", "because"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(case(401, "GatedRepo", "/resolve/").0.contains("licence"));
    assert!(case(404, "RepoNotFound", "/api/").0.contains("there is no model a/b"));
    assert!(case(404, "RevisionNotFound", "/revision/").0.contains("no revision `main`"));
    assert!(case(401, "", "/api/").0.contains("does not accept the token"));
    let (error, requests, _) = case(503, "", "/api/");
    assert!(error.contains("503") && requests == 5, "{requests} {error}");
    // Refused by name: no second request.
    assert_eq!(case(404, "RepoNotFound", "/api/").1, 1);
}

#[test]
fn models_are_found_in_what_the_repository_has() {
    let with_files = |files: Vec<(&'static str, Vec<u8>)>, id: &str| {
        let folder = tempfile::tempdir().unwrap();
        let listed = files.clone();
        let server = Server::start(move |request| {
            catalogue(&listed, request).unwrap_or_else(|| {
                let name = request.path.split(&format!("{COMMIT}/")).nth(1).unwrap();
                Reply::ok(listed.iter().find(|(path, _)| *path == name).unwrap().1.clone())
            })
        });
        fetch_model(&settings(&server.address, folder.path()), &model(id), ALL)
            .map(|(path, label)| (path.file_name().unwrap().to_string_lossy().into_owned(), label))
    };
    let gguf = |name| (name, b"GGUF".to_vec());
    let (file, label) = with_files(vec![gguf("q4.gguf"), ("README.md", vec![])], "a/b").unwrap();
    assert_eq!((file.as_str(), label), ("q4.gguf", format!("a/b@{COMMIT}:q4.gguf")));
    assert_eq!(
        with_files(vec![gguf("x/q4.gguf"), gguf("q8.gguf")], "a/b@main:x/q4.gguf").unwrap().0,
        "q4.gguf"
    );
    assert!(message(with_files(vec![gguf("q4.gguf"), gguf("q8.gguf")], "a/b")).contains("2 .gguf files"));
    assert!(message(with_files(vec![gguf("q4.gguf")], "a/b:q5.gguf")).contains("no file q5.gguf"));
    let config = ("config.json", b"{}".to_vec());
    let tokenizer = ("tokenizer.json", b"{}".to_vec());
    let pickled = vec![config.clone(), ("pytorch_model.bin", vec![1]), tokenizer.clone()];
    assert!(message(with_files(pickled, "a/b")).contains("pickles"));
    let index = json!({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}).to_string();
    let shards = |n| {
        let mut files = vec![config.clone(), ("model.safetensors.index.json", index.clone().into_bytes())];
        files.extend(
            [("model-1.safetensors", vec![1; 9]), ("model-2.safetensors", vec![2; 1009])][..n].to_vec(),
        );
        files.push(tokenizer.clone());
        files
    };
    assert_eq!(with_files(shards(2), "a/b").unwrap().0, COMMIT);
    assert!(message(with_files(shards(1), "a/b")).contains("model-2.safetensors"));
}

#[test]
fn long_lists_come_in_pages_and_impossible_paths_are_refused() {
    let list = |entries: Vec<serde_json::Value>, id: &'static str, prefix: &'static str| {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(move |request| {
            let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
            if path.ends_with("/revision/v%2F1") {
                return Reply::ok(json!({"sha": COMMIT}).to_string());
            }
            assert_eq!(path, format!("/api/datasets/c/d/tree/{COMMIT}/{prefix}").trim_end_matches('/'));
            let page: usize = query.split("cursor=").nth(1).map_or(0, |n| n.parse().unwrap());
            let reply = Reply::ok(json!(entries[page..page + 1]).to_string());
            if page + 1 == entries.len() {
                return reply;
            }
            let host = request.header("host").unwrap();
            reply.with(
                "link",
                format!("<http://{host}{path}?recursive=true&cursor={}>; rel=\"next\"", page + 1),
            )
        });
        let id = DatasetId::parse(id).unwrap().unwrap();
        let settings = settings(&server.address, folder.path());
        let names = |repo: Repo| repo.files.into_iter().map(|f| f.path).collect::<Vec<_>>().join(" ");
        let first = Repo::open(&settings, &id.repo, prefix).map(names)?;
        server.take();
        // The list of a commit does not change, so only the revision is asked for again.
        assert_eq!(Repo::open(&settings, &id.repo, prefix).map(names)?, first);
        assert_eq!(server.take().len(), 1);
        Ok::<_, anyhow::Error>(first)
    };
    let folder = json!({"type": "directory", "oid": "x", "size": 0, "path": "data"});
    let entries = vec![entry("data/b.txt", b"b"), folder, entry("data/a.parquet", &[0; 1000])];
    let id = "hf://datasets/c/d@v%2F1";
    assert_eq!(list(entries, id, "data").unwrap(), "data/a.parquet data/b.txt");
    for path in ["../x", "/etc/passwd", "a//b", "a/../../b", "a\\b"] {
        assert!(message(list(vec![entry(path, b"x")], id, "")).contains("impossible"), "{path}");
    }
    let mut odd = entry("a", b"x");
    odd["oid"] = json!("../../../x");
    assert!(message(list(vec![odd], id, "")).contains("impossible"));
}

/// The other process of the next test: loads a model as every command does. Does nothing among the other tests.
#[test]
fn load_in_this_process() {
    if std::env::var_os("STRATASCOPE_TEST_HUB").is_none() {
        return;
    }
    let loaded = crate::model::load(Path::new("a/b")).unwrap();
    assert_eq!(loaded.provenance.source, format!("a/b@{COMMIT}"));
    assert_eq!(loaded.tokenizer.encode("w5 w6").unwrap(), [5, 6]);
    let error = message(crate::model::load(Path::new("a/c")));
    assert!(error.contains("no model at a/c"), "{error}");
}

#[test]
fn the_environment_says_where_the_hub_is_and_what_it_gave_serves_offline() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lm/llama");
    let vocabulary: serde_json::Map<_, _> = (0..101).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    let files = vec![
        ("config.json", fs::read(golden.join("config.json")).unwrap()),
        ("model.safetensors", fs::read(golden.join("model.safetensors")).unwrap()),
        ("tokenizer.json", tokenizer.to_string().into_bytes()),
    ];
    let server = Server::start(move |request| {
        if request.path.starts_with("/api/models/a/c/") {
            return Reply::refused(404, "RepoNotFound");
        }
        catalogue(&files, request).unwrap_or_else(|| {
            let name = request.path.rsplit('/').next().unwrap();
            Reply::part(&files.iter().find(|(path, _)| *path == name).unwrap().1, request)
        })
    });
    let folder = tempfile::tempdir().unwrap();
    for offline in ["0", "1"] {
        let done = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hub::tests::load_in_this_process"])
            .env("STRATASCOPE_TEST_HUB", "1")
            .env("STRATASCOPE_CACHE", folder.path().join("ours"))
            .env("HF_ENDPOINT", format!("{}/", server.address))
            .env("HF_HOME", folder.path().join("theirs"))
            .env("HF_TOKEN", "secret")
            .env("HF_HUB_OFFLINE", offline)
            .env("NO_PROXY", "127.0.0.1")
            .env_remove("HF_HUB_CACHE")
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        let requests = server.take();
        assert_eq!(requests.is_empty(), offline == "1", "{requests:?}");
        assert!(requests.iter().all(|r| r.header("authorization") == Some("Bearer secret")));
    }
    assert!(folder.path().join("theirs/hub/models--a--b/snapshots").join(COMMIT).is_dir());
}
