//! Stores in an object store: a real S3-compatible server on a loopback port, a harvest into it that is killed at many
//! moments, and training from it. What is in the bucket afterwards is, byte for byte, what a local harvest writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use native::harvest::{self, Inputs, Output};
use native::model;
use native::stop::StopFlag;
use native::store::{MANIFEST, Place, Split, Store};
use native::train::{ActivationSource, StoreTaps, run};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use shared::config::harvest::HarvestConfig;
use shared::config::{self, Count, resolve};
use shared::tap::{Site, TapPoint};
use support::{files_of, prepare, this_program};

const HARVEST: &str = "STRATASCOPE_TEST_BUCKET_HARVEST";
const STORE: &str = "STRATASCOPE_TEST_BUCKET_STORE";
const OUT: &str = "STRATASCOPE_TEST_BUCKET_OUT";
const TAP: TapPoint = TapPoint { site: Site::Resid, layer: 1 };

/// An S3 server that keeps its buckets in a folder, until the test ends.
struct Server {
    address: SocketAddr,
    folder: PathBuf,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    /// Starts with an empty bucket called `data`.
    fn start(folder: &Path) -> Self {
        fs::create_dir_all(folder.join("data")).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut builder = S3ServiceBuilder::new(FileSystem::new(folder).unwrap());
        builder.set_auth(SimpleAuth::from_single("reader", "open sesame"));
        let service = builder.build();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    // A client that is killed breaks its connection.
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { address, folder: folder.to_owned(), _runtime: runtime }
    }

    fn settings(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", "reader".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "open sesame".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    fn place(&self, url: &str) -> Place {
        Place::with_settings(Path::new(url), self.settings().into_iter()).unwrap()
    }

    /// This test program again, running only `test`, with the server's credentials in its environment.
    fn child(&self, test: &str) -> Command {
        let mut command = this_program(test);
        command.envs(self.settings());
        command
    }

    fn harvest(&self, settings: &HarvestConfig, url: &str, work: &Path) -> Child {
        let mut child = self.child("harvest_in_this_process");
        child.env(HARVEST, config::to_toml(settings).unwrap()).env(STORE, url).env(OUT, work);
        child.spawn().unwrap()
    }

    /// The objects under `prefix` of the bucket `data`.
    fn objects(&self, prefix: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        files_of(&self.folder.join("data").join(prefix))
    }
}

/// The killed process: one harvest, as the command does it. Does nothing when run among the other tests.
#[test]
fn harvest_in_this_process() {
    let (Ok(text), Ok(url), Ok(work)) = (std::env::var(HARVEST), std::env::var(STORE), std::env::var(OUT))
    else {
        return;
    };
    let settings: HarvestConfig = resolve(&text, &[]).unwrap();
    let output = Output::at(Place::of(Path::new(&url)).unwrap(), Some(Path::new(&work))).unwrap();
    if harvest::finished(&settings, output.clone()).unwrap().is_none() {
        let loaded = model::load(settings.model.as_ref()).unwrap();
        let inputs = Inputs::of(&loaded, &settings).unwrap();
        harvest::run(&settings, output, &inputs, &StopFlag::default()).unwrap();
    }
}

/// A process that trains on the store its environment names.
#[test]
fn train_in_this_process() {
    let (Err(_), Ok(url), Ok(out)) = (std::env::var(HARVEST), std::env::var(STORE), std::env::var(OUT))
    else {
        return;
    };
    train(&url, Path::new(&out));
}

fn train(store: &str, out: &Path) {
    let keys = "tap = 'resid.1'\nwidth = 64\ntarget_l0 = 4.0\nsteps = 80\nbatch = 128\ncheckpoint_every = 50\nlog_every = 10\n";
    let source: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(Path::new(store)).unwrap());
    run(&source, &resolve(keys, &[]).unwrap(), out, &StopFlag::default()).unwrap();
}

fn local(settings: &HarvestConfig, out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let inputs = Inputs::of(&loaded, settings).unwrap();
    harvest::run(settings, out, &inputs, &StopFlag::default()).unwrap();
    files_of(out)
}

#[test]
fn killed_at_any_moment_the_bucket_ends_with_the_bytes_of_a_local_store() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("server"));
    let settings = prepare(folder.path());
    let expected = local(&settings, &folder.path().join("local"));
    let started = Instant::now();
    let whole = folder.path().join("work-whole");
    assert!(server.harvest(&settings, "s3://data/whole", &whole).wait().unwrap().success());
    let takes = started.elapsed();
    assert!(server.objects("whole") == expected);
    assert_eq!(fs::read_dir(&whole).unwrap().count(), 0, "the folder of work is empty at the end");

    let mut killed_unfinished = 0;
    for sixth in 1..6u32 {
        let (prefix, work) = (format!("runs/killed-{sixth}"), folder.path().join(format!("work-{sixth}")));
        let url = format!("s3://data/{prefix}/");
        for _ in 0..3 {
            let mut child = server.harvest(&settings, &url, &work);
            std::thread::sleep(takes * sixth / 6);
            child.kill().unwrap();
            child.wait().unwrap();
            killed_unfinished += u32::from(Store::at(server.place(&url)).is_err());
        }
        assert!(server.harvest(&settings, &url, &work).wait().unwrap().success());
        let found = server.objects(&prefix);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{sixth}/6");
        assert!(found == expected, "killed after {sixth}/6 of {takes:?}");
        assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
    }
    assert!(killed_unfinished > 3, "no kill fell inside a harvest");
}

#[test]
fn training_from_a_bucket_gives_the_weights_of_a_local_store() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("server"));
    let settings = HarvestConfig { dtype: config::harvest::StoreDtype::Bf16, ..prepare(folder.path()) };
    let store = folder.path().join("local");
    local(&settings, &store);
    let work = folder.path().join("work");
    assert!(server.harvest(&settings, "s3://data/store", &work).wait().unwrap().success());

    let (near, far) = (Store::open(&store).unwrap(), Store::at(server.place("s3://data/store")).unwrap());
    assert_eq!((near.manifest(), near.manifest_sha256()), (far.manifest(), far.manifest_sha256()));
    for split in Split::ALL {
        assert_eq!(near.tokens(split).unwrap(), far.tokens(split).unwrap());
        for index in 0..near.n_shards(split) {
            assert_eq!(
                near.read_shard(TAP, split, index).unwrap(),
                far.read_shard(TAP, split, index).unwrap()
            );
        }
    }
    far.verify(|_| ()).unwrap();

    let (from_near, from_far) = (folder.path().join("near"), folder.path().join("far"));
    train(store.to_str().unwrap(), &from_near);
    let mut child = server.child("train_in_this_process");
    assert!(child.env(STORE, "s3://data/store").env(OUT, &from_far).status().unwrap().success());
    let weights = |out: &Path| fs::read(out.join("sae_weights.safetensors")).unwrap();
    assert!(weights(&from_near) == weights(&from_far));
}

#[test]
fn what_is_wrong_with_a_bucket_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("server"));
    let settings = prepare(folder.path());
    let work = folder.path().join("work");
    assert!(server.harvest(&settings, "s3://data/store", &work).wait().unwrap().success());
    let store = Store::at(server.place("s3://data/store")).unwrap();
    let says = |error: anyhow::Error, words: &[&str]| {
        let text = format!("{error:#}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    };

    // A damaged, a shortened and a missing object.
    let name = "train/resid.1/shard-00000.safetensors";
    let path = server.folder.join("data/store").join(name);
    let url = format!("s3://data/store/{name}");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&path, &bad).unwrap();
    says(store.read_shard(TAP, Split::Train, 0).unwrap_err(), &[&url, "damaged"]);
    fs::write(&path, &good[..good.len() - 8]).unwrap();
    says(store.read_shard(TAP, Split::Train, 0).unwrap_err(), &[&url, "truncated"]);
    fs::remove_file(&path).unwrap();
    says(store.read_shard(TAP, Split::Train, 0).unwrap_err(), &[&url, "does not exist"]);

    // No store, no bucket, wrong credentials, nobody there.
    says(
        Store::at(server.place("s3://data/other")).unwrap_err(),
        &["s3://data/other", "not a finished store"],
    );
    assert!(Store::at(server.place("s3://nothing/store")).is_err());
    let mut wrong = server.settings();
    wrong[1].1 = "guess".to_owned();
    let place = Place::with_settings(Path::new("s3://data/store"), wrong.into_iter()).unwrap();
    says(Store::at(place).unwrap_err(), &["s3://data/store/manifest.json", "credentials"]);

    // Another harvest, a folder that is missing, and an unfinished harvest that goes elsewhere.
    let to = |url: &str, work: &Path| Output::at(server.place(url), Some(work)).unwrap();
    let other = HarvestConfig { seed: 7, ..settings.clone() };
    says(harvest::finished(&other, to("s3://data/store", &work)).unwrap_err(), &["s3://data/store", "seed"]);
    says(Output::at(server.place("s3://data/store"), None).unwrap_err(), &["--work"]);
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let inputs = Inputs::of(&loaded, &settings).unwrap();
    let (stop, elsewhere) = (StopFlag::default(), folder.path().join("elsewhere"));
    let few = HarvestConfig { tokens: Count(1000), ..settings.clone() };
    let error = harvest::run(&few, to("s3://data/store", &elsewhere), &inputs, &stop).unwrap_err();
    says(error, &["finished store"]);
    // Stopped before the first bucket is sent: neither another bucket nor a folder may take it over.
    let unfinished = folder.path().join("unfinished");
    let mut child = server.harvest(&settings, "s3://data/once", &unfinished);
    while !unfinished.join(harvest::PARTIAL_MANIFEST).exists() {
        assert!(child.try_wait().unwrap().is_none(), "the harvest was over before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!server.folder.join("data/once").join(MANIFEST).exists());
    let error = harvest::run(&settings, to("s3://data/twice", &unfinished), &inputs, &stop).unwrap_err();
    says(error, &["goes to s3://data/once, not to s3://data/twice"]);
    let error = harvest::run(&settings, &unfinished, &inputs, &stop).unwrap_err();
    says(error, &["goes to s3://data/once"]);
    // The same place may, and sees what was removed from the bucket meanwhile.
    let sent = server.folder.join("data/once").join(name);
    let mut child = server.harvest(&settings, "s3://data/once", &unfinished);
    while !sent.exists() || unfinished.join(name).exists() {
        assert!(child.try_wait().unwrap().is_none(), "the harvest was over before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let shard = fs::read(&sent).unwrap();
    fs::remove_file(&sent).unwrap();
    let error = harvest::run(&settings, to("s3://data/once", &unfinished), &inputs, &stop).unwrap_err();
    says(error, &["s3://data/once/train/resid.1/shard-00000.safetensors", "now has none"]);
    assert!(!server.folder.join("data/once").join(MANIFEST).exists());
    fs::write(&sent, shard).unwrap();
    harvest::run(&settings, to("s3://data/once", &unfinished), &inputs, &stop).unwrap();
    assert!(server.objects("once").contains_key(Path::new(MANIFEST)));
}

#[test]
fn a_bucket_that_cannot_be_reached_is_said_within_a_minute() {
    let settings = [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let place = Place::with_settings(Path::new("s3://data/store"), settings.into_iter()).unwrap();
    let started = Instant::now();
    let error = format!("{:#}", Store::at(place).unwrap_err());
    assert!(error.contains("s3://data/store/manifest.json"), "{error}");
    assert!(started.elapsed().as_secs() < 60);
    let unnamed =
        [("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")];
    let unnamed = unnamed.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let place = Place::with_settings(Path::new("s3://data/store"), unnamed.into_iter()).unwrap();
    let error = format!("{:#}", Store::at(place).unwrap_err());
    assert!(error.contains("no credentials are set"), "{error}");
    let nowhere = [("AWS_ENDPOINT_URL".to_owned(), "127.0.0.1:9".to_owned())];
    let error = Place::with_settings(Path::new("s3://data/store"), nowhere.into_iter()).unwrap_err();
    assert!(format!("{error:#}").contains("AWS_ENDPOINT_URL"), "{error:#}");
}
