//! Harvests with a model that is a formula, so that every stored vector can be checked and a stop can fall anywhere.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use shared::Rows;
use shared::config::harvest::StoreDtype;
use shared::config::{Count, Portion};
use shared::tap::Site;

use super::*;

const VOCAB: u32 = 50_000;

/// A token a word: words are numbers.
struct Words;

impl Encode for Words {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}

/// Value `j` of the vector of `id` at `position`: exact in every stored type.
fn formula(point: TapPoint, id: u32, position: usize, j: usize) -> f32 {
    let site = point.site as usize + 1;
    ((id as usize * 7 + position * 3 + j * 5 + point.layer * 11) * site % 127) as f32 - 60.0
}

/// Raises `stop` after a number of batches, or fills a disk; `None` never stops.
struct Formula<'a> {
    stop: &'a StopFlag,
    batches_left: Cell<Option<u32>>,
    fill: Option<&'a Path>,
}

impl ActivationModel for Formula<'_> {
    fn n_layers(&self) -> usize {
        3
    }

    fn context_length(&self) -> usize {
        64
    }

    fn width(&self, site: Site) -> usize {
        if site == Site::Attn { 6 } else { 4 }
    }

    fn activations(
        &self,
        ids: &[u32],
        sequence_length: usize,
        points: &[TapPoint],
        read: &mut dyn FnMut(TapPoint, Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        for &point in points {
            let width = self.width(point.site);
            let value = |i: usize, j| formula(point, ids[i], i % sequence_length, j);
            let values: Vec<f32> =
                (0..ids.len()).flat_map(|i| (0..width).map(move |j| value(i, j))).collect();
            read(point, Rows::new(&values, width)?)?;
        }
        let left = self.batches_left.get().map(|n| n.saturating_sub(1));
        self.batches_left.set(left);
        match self.fill {
            _ if left != Some(0) => {}
            Some(path) if !path.exists() => fill_up(path),
            Some(_) => {}
            None => self.stop.raise(),
        }
        Ok(())
    }
}

/// Writes a file until its disk is full.
fn fill_up(path: &Path) {
    let mut file = File::create(path).unwrap();
    for piece in [vec![1; 1 << 20], vec![1; 1 << 10], vec![1; 1]] {
        while file.write_all(&piece).is_ok() {}
    }
}

struct Place {
    folder: tempfile::TempDir,
    config: HarvestConfig,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("text")).unwrap();
        for file in 0..6 {
            let words: Vec<_> = (0..400).map(|i| (10 + file * 400 + i).to_string()).collect();
            fs::write(folder.path().join(format!("text/{file}.txt")), words.join(" ")).unwrap();
        }
        let config = HarvestConfig {
            model: "formula".to_owned(),
            text: vec![folder.path().join("text").to_str().unwrap().to_owned()],
            taps: ["resid.1", "attn.0", "mlp.2"].map(str::to_owned).to_vec(),
            tokens: Count(2000),
            held_out: Portion::Share(0.2),
            part_tokens: 40,
            max_document_bytes: Count(400),
            sequence_length: 16,
            batch: 3,
            bucket_vectors: Some(Count(500)),
            shard_vectors: Some(Count(200)),
            ..HarvestConfig::default()
        };
        Self { folder, config }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, name: &str, batches: Option<u32>) -> Result<Summary> {
        self.run_filling(name, batches, None)
    }

    fn run_filling(&self, name: &str, batches: Option<u32>, fill: Option<&Path>) -> Result<Summary> {
        let stop = StopFlag::default();
        let model = Formula { stop: &stop, batches_left: Cell::new(batches), fill };
        let inputs = Inputs {
            encode: &Words,
            model: &model,
            tokenizer: TokenizerInfo {
                vocab_size: VOCAB as usize,
                bos: Some(1),
                separator: Some(2),
                special_ids: vec![1, 2],
                dropped_ids: vec![],
            },
            provenance: ModelProvenance {
                name: "formula".to_owned(),
                source: "formula".to_owned(),
                format: "none".to_owned(),
                sha256: "0".repeat(64),
                architecture: "formula".to_owned(),
                precision: shared::Precision::F32,
            },
            d_model: 4,
        };
        run(&self.config, &self.out(name), &inputs, &stop)
    }
}

/// Every file under `folder` and its bytes.
fn files_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut all, mut folders) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else {
                all.insert(entry.strip_prefix(folder).unwrap().to_owned(), fs::read(&entry).unwrap());
            }
        }
    }
    all
}

#[test]
fn every_vector_is_the_models_and_every_kept_token_is_there_once() {
    for dtype in [StoreDtype::F32, StoreDtype::Bf16, StoreDtype::F16] {
        let mut place = Place::new();
        place.config.dtype = dtype;
        place.run("store", None).unwrap();
        let store = Store::open(&place.out("store")).unwrap();
        let (resid, attn) = ("resid.1".parse().unwrap(), "attn.0".parse().unwrap());
        for split in Split::ALL {
            let tokens = store.tokens(split).unwrap();
            let mut seen = std::collections::HashSet::new();
            let mut in_order = 0;
            for index in 0..store.n_shards(split) {
                let shard = store.read_shard(resid, split, index).unwrap();
                let other = store.read_shard(attn, split, index).unwrap();
                assert_eq!((&shard.sequences, &shard.positions), (&other.sequences, &other.positions));
                let origins: Vec<_> = shard
                    .sequences
                    .iter()
                    .zip(&shard.positions)
                    .map(|(&s, &p)| (s as usize, p as usize))
                    .collect();
                in_order += origins.is_sorted() as u32;
                for (i, &(s, p)) in origins.iter().enumerate() {
                    let id = tokens.sequence(s)[p];
                    assert!(seen.insert((s, p)) && p != 0 && id > 2, "{s} {p} {id}");
                    for (shard, point) in [(&shard, resid), (&other, attn)] {
                        let row = &shard.vectors[i * shard.width..(i + 1) * shard.width];
                        assert!(row.iter().enumerate().all(|(j, &v)| v == formula(point, id, p, j)));
                    }
                }
            }
            let kept = |s: usize| {
                tokens
                    .sequence(s)
                    .iter()
                    .enumerate()
                    .filter(|&(p, &id)| store.manifest().keeps(p, id))
                    .count()
            };
            assert_eq!(seen.len(), (0..tokens.n_sequences()).map(kept).sum::<usize>());
            assert_eq!((seen.len() as u64, in_order), (store.n_vectors(split), 0));
        }
        assert!(store.n_shards(Split::Train) > 6 && store.n_shards(Split::HeldOut) > 0);
        assert!(
            !place.out("store").join(PARTIAL).exists() && !place.out("store").join(PARTIAL_MANIFEST).exists()
        );
    }
}

#[test]
fn the_scalar_and_the_mean_are_those_of_the_training_vectors() {
    let place = Place::new();
    place.run("store", None).unwrap();
    let store = Store::open(&place.out("store")).unwrap();
    for tap in &store.manifest().taps {
        let (mut squares, mut sum, mut n) = (0.0, vec![0.0; tap.width], 0.0);
        for index in 0..store.n_shards(Split::Train) {
            for row in
                store.read_shard(tap.point, Split::Train, index).unwrap().vectors.chunks_exact(tap.width)
            {
                n += 1.0;
                squares += row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                sum.iter_mut().zip(row).for_each(|(s, &v)| *s += f64::from(v));
            }
        }
        assert!((tap.scale / (squares / n).sqrt() - 1.0).abs() < 1e-12, "{}", tap.scale);
        let mean = store.mean(tap.point).unwrap();
        assert!(mean.iter().zip(&sum).all(|(&m, s)| (f64::from(m) - s / n).abs() < 1e-5), "{mean:?}");
    }
}

#[test]
fn stopped_after_any_batch_and_resumed_gives_the_same_bytes() {
    let place = Place::new();
    place.run("whole", None).unwrap();
    let whole = files_of(&place.out("whole"));
    for batches in [1, 2, 10, 11, 12, 13, 33, 40, 42] {
        let name = format!("stopped-{batches}");
        let stopped = place.run(&name, Some(batches));
        assert!(stopped.unwrap_err().is::<Stopped>(), "{batches}");
        assert!(
            Store::open(&place.out(&name)).unwrap_err().to_string().contains("run the same harvest again")
        );
        // Stopped twice: the second time somewhere else.
        assert!(place.run(&name, Some(1)).is_err_and(|e| e.is::<Stopped>()) || batches == 42);
        if !place.out(&name).join(store::MANIFEST).exists() {
            place.run(&name, None).unwrap();
        }
        assert_eq!(files_of(&place.out(&name)).keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
        assert!(files_of(&place.out(&name)) == whole, "{batches}");
    }
}

#[test]
fn work_lost_between_any_two_writes_is_done_again() {
    let place = Place::new();
    place.run("whole", None).unwrap();
    let whole = files_of(&place.out("whole"));
    let _ = place.run("s", Some(14)).unwrap_err();
    let out = place.out("s");
    // A bucket written but not recorded: its shards lie there already, one of them with other bytes.
    let stale = store::shard_path(&out, "mlp.2".parse().unwrap(), Split::Train, 3);
    fs::create_dir_all(stale.parent().unwrap()).unwrap();
    fs::write(&stale, "half a shard").unwrap();
    fs::write(stale.with_file_name(".partial-Ab12"), "half a shard").unwrap();
    // The spool and its record are gone, as after a crash that lost them.
    fs::remove_file(out.join(PARTIAL).join("record.json")).unwrap();
    fs::remove_file(out.join(PARTIAL).join("attn.0.spool")).unwrap();
    place.run("s", None).unwrap();
    assert!(files_of(&out) == whole);
}

#[test]
fn folders_that_are_not_ours_are_refused() {
    let mut place = Place::new();
    fs::create_dir(place.out("mine")).unwrap();
    fs::write(place.out("mine").join("thesis.tex"), "x").unwrap();
    assert!(place.run("mine", None).unwrap_err().to_string().contains("not empty"));
    let _ = place.run("s", Some(2)).unwrap_err();
    place.config.seed = 1;
    let error = place.run("s", None).unwrap_err().to_string();
    assert!(error.contains("other settings (seed)"), "{error}");
    assert!(finished(&place.config, &place.out("s")).unwrap_err().to_string().contains("seed"));
    place.config.seed = 0;
    assert!(finished(&place.config, &place.out("s")).unwrap().is_none());
    let lock = File::open(place.out("s").join(PARTIAL).join("lock")).unwrap();
    lock.lock().unwrap();
    assert!(place.run("s", None).unwrap_err().to_string().contains("another process"));
    drop(lock);
    place.run("s", None).unwrap();
    assert!(finished(&place.config, &place.out("s")).unwrap().is_some());
    place.config.tokens = Count(1000);
    assert!(finished(&place.config, &place.out("s")).unwrap_err().to_string().contains("tokens"));
}

#[test]
fn nothing_held_out_is_allowed_but_nothing_to_train_on_and_too_long_sequences_are_not() {
    let mut place = Place::new();
    place.config.held_out = Portion::Share(0.0);
    place.run("none", None).unwrap();
    let store = Store::open(&place.out("none")).unwrap();
    assert_eq!(
        (store.n_vectors(Split::HeldOut), store.tokens(Split::HeldOut).unwrap().n_sequences()),
        (0, 0)
    );
    place.config.sequence_length = 65;
    assert!(place.run("long", None).unwrap_err().to_string().contains("at most 64"));
    place.config.sequence_length = 16;
    place.config.drop_positions = (0..16).collect();
    assert!(place.run("empty", None).unwrap_err().to_string().contains("no training vector"));
}

#[test]
fn more_than_the_disk_holds_is_refused_before_the_model_runs() {
    let place = Place::new();
    let _ = place.run("s", Some(1)).unwrap_err();
    let mut partial = Partial::read(&place.out("s")).unwrap().unwrap();
    let plans = [vec![Bucket { sequences: 0..1, n_vectors: 1 << 44 }], Vec::new()];
    let error = space::check(&Output::folder(&place.out("s")), &partial, &plans).unwrap_err().to_string();
    assert!(error.contains("free"), "{error}");
    partial.halves[0].buckets = vec![Vec::new()];
    space::check(&Output::folder(&place.out("s")), &partial, &plans).unwrap();
}

/// A disk of its own in memory, for as long as the test takes. Mounting needs rights that not every machine gives.
struct Disk(PathBuf);

impl Disk {
    fn mount(folder: PathBuf) -> Option<Self> {
        fs::create_dir(&folder).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", "size=96m", "none"]).arg(&folder).output();
        mounted.is_ok_and(|done| done.status.success()).then_some(Self(folder))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_fills_on_the_way_is_said_and_the_harvest_goes_on_when_there_is_space() {
    let place = Place::new();
    place.run("whole", None).unwrap();
    let whole = files_of(&place.out("whole"));
    let Some(disk) = Disk::mount(place.out("disk")) else {
        eprintln!("not tested: no file system can be mounted here");
        return;
    };
    // In the first bucket, at its end, and among the held-out ones.
    for batches in [2, 11, 25, 38] {
        let (name, filler) = (format!("disk/s-{batches}"), disk.0.join("filler"));
        let error = format!("{:#}", place.run_filling(&name, Some(batches), Some(&filler)).unwrap_err());
        assert!(
            error.contains("the disk is full") && error.contains("run the same command again"),
            "{error}"
        );
        // Still full: refused before the model runs, and nothing is lost.
        let error = format!("{:#}", place.run(&name, None).unwrap_err());
        assert!(error.contains("free space") || error.contains("disk is full"), "{error}");
        fs::remove_file(&filler).unwrap();
        place.run(&name, None).unwrap();
        assert!(files_of(&place.out(&name)) == whole, "{batches}");
    }
}
