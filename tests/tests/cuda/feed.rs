//! Batches that a device gathers: the host's own bits, in the host's own order, wherever the vectors lie.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use half::{bf16, f16};
use native::cuda::feed::{Feed, Gathering, Placement, TapAt};
use native::cuda::{Argument, CudaTrainer, Kernel, Resident};
use native::harvest::{self, Inputs};
use native::model;
use native::selftest::cases::{D, N_LATENTS, Noise, cases};
use native::stop::StopFlag;
use native::train::normalise::Scaling;
use native::train::order::{Batches, Pairs, Position};
use native::train::shards::Shards;
use native::train::{
    ActivationSource, Job, Moments, SharedDevice, SourceTap, Statistics, StoreTaps, Vectors, Wiring,
    run_all_on,
};
use serde_json::Value;
use shared::Rows;
use shared::config::harvest::StoreDtype;
use shared::config::train::{Normalise, Products};
use shared::config::{expand, resolve};
use shared::format::SaeMetadata;
use shared::loss::row_moments;

use crate::emulator::Emulator;
use crate::support::prepare;
use crate::traffic::Counting;

/// Shards of these rows at three taps, the third of another width; some rows are very long.
struct Made {
    taps: [SourceTap; 3],
    element: StoreDtype,
    provenance: Value,
}

const ROWS: [usize; 3] = [40, 23, 31];

impl Made {
    fn source(widths: [usize; 2], element: StoreDtype) -> Arc<dyn ActivationSource> {
        let tap = |width| SourceTap { point: None, width };
        let taps = [tap(widths[0]), tap(widths[0]), tap(widths[1])];
        Arc::new(Self { taps, element, provenance: Value::Null })
    }

    fn rows(&self, shard: usize, tap: usize) -> Vectors {
        let width = self.taps[tap].width;
        let mut values = Noise((10 * shard + tap) as u64 + 1).vector(ROWS[shard] * width, 0.7);
        values.chunks_exact_mut(width).step_by(7).for_each(|row| row.iter_mut().for_each(|v| *v *= 50.0));
        // Standardising a constant row divides nothing by nothing.
        values[width..2 * width].fill(0.0);
        let exact = |v: f32| match self.element {
            StoreDtype::F32 => v,
            StoreDtype::Bf16 => bf16::from_f32(v).to_f32(),
            StoreDtype::F16 => f16::from_f32(v).to_f32(),
        };
        Arc::new(values.into_iter().map(exact).collect())
    }
}

impl ActivationSource for Made {
    fn taps(&self) -> &[SourceTap] {
        &self.taps
    }
    fn n_vectors(&self) -> u64 {
        ROWS.iter().sum::<usize>() as u64
    }
    fn n_shards(&self) -> usize {
        ROWS.len()
    }
    fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
        Ok(taps.iter().map(|&tap| self.rows(shard, tap)).collect())
    }
    fn element(&self) -> StoreDtype {
        self.element
    }
    fn statistics(&self, tap: usize) -> Result<Statistics> {
        Statistics::of(&self.rows(0, tap), self.taps[tap].width, |_| true)
    }
    fn held_out(&self, _: &[usize], _: usize) -> Result<Vec<Vec<f32>>> {
        Ok(Vec::new())
    }
    fn provenance(&self) -> &Value {
        &self.provenance
    }
    fn metadata(&self) -> SaeMetadata {
        SaeMetadata::default()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Batches of `sizes` from `position` on, by the host and by a device with shards at `placement`: the same.
fn same(
    device: &SharedDevice,
    source: &Arc<dyn ActivationSource>,
    (wiring, scaling): (&Wiring, &Scaling),
    (placement, position): (Placement, Position),
    sizes: &[usize],
) -> Position {
    let feed = Arc::new(Feed::new(device, placement));
    let all = std::slice::from_ref(wiring);
    let mut on_host = Shards::new(source, all, 3);
    let mut there = Shards::new(source, all, 3).fed_to(feed, scaling.rows);
    let batches = || Batches::new(wiring.clone(), scaling.clone(), position, 1000);
    let (mut host, mut device) = (batches(), batches());
    let (mut rows, mut known) = (Pairs::default(), Pairs::default());
    for &n in sizes {
        assert!(host.fill(&mut on_host, n, &mut rows).unwrap().is_none());
        let resident = device.fill(&mut there, n, &mut known).unwrap().unwrap();
        there.forget_before(device.position());
        on_host.forget_before(host.position());
        assert!(known.x.is_empty() && known.y.is_empty(), "rows that the host does not need");
        assert_eq!((&known.inputs, &known.undo), (&rows.inputs, &rows.undo));
        assert_eq!(bits(&resident.rows().unwrap()), bits(&rows.x));
        assert_eq!(bits(&resident.targets().unwrap()), bits(rows.targets()));
        let d_out = scaling.widths()[1];
        let moments: Vec<[f64; 2]> = rows.targets().chunks_exact(d_out).map(row_moments).collect();
        assert_eq!(resident.moments().unwrap(), moments);
        assert_eq!(device.position(), host.position());
    }
    host.position()
}

#[test]
fn gathered_batches_have_the_hosts_bits() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = Arc::new(Emulator::new(folder.path()));
    let device: SharedDevice = emulator.clone();
    let plain = Wiring { inputs: vec![0], target: None };
    let layers = Wiring { inputs: vec![0, 1], target: None };
    let transcoder = Wiring { inputs: vec![1], target: Some(2) };
    // Widths that four values at a time fit, and others.
    for widths in [[8, 12], [7, 9]] {
        for element in [StoreDtype::F32, StoreDtype::Bf16, StoreDtype::F16] {
            let source = Made::source(widths, element);
            for (wiring, normalise) in [
                (&plain, Normalise::Scalar),
                (&layers, Normalise::Standardise),
                (&layers, Normalise::Scalar),
                (&transcoder, Normalise::Scalar),
            ] {
                let scaling = Scaling::measure(&*source, wiring, 10.0, normalise).unwrap();
                assert!(scaling.inputs[0].limit.is_finite());
                for placement in [Placement::Device, Placement::Host] {
                    let run = |position, sizes: &[usize]| {
                        same(&device, &source, (wiring, &scaling), (placement, position), sizes)
                    };
                    // Within a shard, over its end, and over more than one.
                    let end = run(Position::default(), &[5, 19, 70, 11]);
                    run(end, &[33]);
                }
            }
        }
    }
    assert_eq!(emulator.in_use(), 0);
}

/// Every number of 16 bits is read as what it is, and rows are scaled as the host scales them: what a card is judged by too.
#[test]
fn the_judge_of_a_card_is_content() {
    let folder = tempfile::tempdir().unwrap();
    let emulator = Arc::new(Emulator::new(folder.path()));
    let device: SharedDevice = emulator.clone();
    let compared = native::selftest::feed::judge(&device).unwrap();
    assert!(compared > 24 * 65_000, "{compared}");
    assert_eq!(emulator.in_use(), 0);
    let feed = Feed::new(&device, Placement::Device);
    let gathering = |examples: &[u32]| {
        Gathering::new(&feed, (&[TapAt::new(0, 0, 1.0)], None), (4, [8, 8]), (StoreDtype::F32, 0.0), examples)
    };
    let (all, batch) = (gathering(&[0, 3, 1]).unwrap(), feed.batch(3, [8, 8], false).unwrap());
    assert!(all.gather(&batch, 1, 0, 3).is_err() && all.gather(&batch, 0, 1, 3).is_err());
    assert!(gathering(&[4]).is_err());
}

/// Devices with one mistake each in feeding are found out.
#[test]
fn no_impostor_feeds() {
    let folder = tempfile::tempdir().unwrap();
    fn set(arguments: &mut [Argument<'_>], at: usize, value: Argument<'static>) {
        arguments[at] = value;
    }
    let mistakes: [(&str, fn(Kernel, &mut [Argument<'_>])); 4] = [
        ("bf16 is taken for f16", |kernel, arguments| {
            if kernel == Kernel::Gather && arguments[5] == Argument::U32(1) {
                set(arguments, 5, Argument::U32(2));
            }
        }),
        ("nothing is added to a row's scale", |kernel, arguments| {
            if kernel == Kernel::Gather {
                set(arguments, 6, Argument::F32(0.0));
            }
        }),
        ("rows begin a value late", |kernel, arguments| {
            if let (Kernel::Gather, Argument::U32(width)) = (kernel, arguments[4]) {
                set(arguments, 4, Argument::U32(width - 1));
            }
        }),
        ("sums lack a value", |kernel, arguments| {
            if let (Kernel::RowMoments, Argument::U32(width)) = (kernel, arguments[3]) {
                set(arguments, 3, Argument::U32(width - 1));
            }
        }),
    ];
    let judged = |change, waits_for_copies| {
        let device = Counting { change, waits_for_copies, ..Counting::new(Emulator::new(folder.path())) };
        let device: SharedDevice = Arc::new(device);
        native::selftest::feed::judge(&device)
    };
    for (mistake, change) in mistakes {
        assert!(judged(change, true).is_err(), "{mistake}, and nobody notices");
    }
    assert!(judged(|_, _| (), false).is_err(), "copies are not waited for, and nobody notices");
}

/// Values that a type does not hold are not taken for what they are not.
#[test]
fn vectors_of_another_type_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let device: SharedDevice = Arc::new(Emulator::new(folder.path()));
    struct Lies(Arc<dyn ActivationSource>);
    impl ActivationSource for Lies {
        fn taps(&self) -> &[SourceTap] {
            self.0.taps()
        }
        fn n_vectors(&self) -> u64 {
            self.0.n_vectors()
        }
        fn n_shards(&self) -> usize {
            self.0.n_shards()
        }
        fn read(&self, shard: usize, taps: &[usize]) -> Result<Vec<Vectors>> {
            self.0.read(shard, taps)
        }
        fn element(&self) -> StoreDtype {
            StoreDtype::Bf16
        }
        fn statistics(&self, tap: usize) -> Result<Statistics> {
            self.0.statistics(tap)
        }
        fn held_out(&self, taps: &[usize], limit: usize) -> Result<Vec<Vec<f32>>> {
            self.0.held_out(taps, limit)
        }
        fn provenance(&self) -> &Value {
            self.0.provenance()
        }
        fn metadata(&self) -> SaeMetadata {
            self.0.metadata()
        }
    }
    let source: Arc<dyn ActivationSource> = Arc::new(Lies(Made::source([8, 8], StoreDtype::F32)));
    let wiring = Wiring { inputs: vec![0], target: None };
    let scaling = Scaling::measure(&*source, &wiring, 10.0, Normalise::Scalar).unwrap();
    let feed = Arc::new(Feed::new(&device, Placement::Device));
    let mut shards = Shards::new(&source, std::slice::from_ref(&wiring), 3).fed_to(feed, scaling.rows);
    let mut batches = Batches::new(wiring, scaling, Position::default(), 10);
    let error = batches.fill(&mut shards, 5, &mut Pairs::default()).unwrap_err();
    assert!(format!("{error:#}").contains("BF16"), "{error:#}");
}

/// Steps on gathered batches end in the same bits as steps on uploaded ones.
#[test]
fn training_on_either_batch_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let device: SharedDevice = Arc::new(Emulator::new(folder.path()));
    let source = Made::source([D, D], StoreDtype::Bf16);
    let wiring = Wiring { inputs: vec![0], target: None };
    let scaling = Scaling::measure(&*source, &wiring, 10.0, Normalise::Scalar).unwrap();
    let cases = cases();
    let case = cases.iter().find(|case| case.name == "jumprelu").unwrap();
    let start = case.start();
    assert_eq!((start.d_in, start.n_latents()), (D, N_LATENTS));
    let moments = Moments::new(&start, false);
    let trainer = || CudaTrainer::new(device.clone(), &start, &moments, 0, Products::F32).unwrap();
    let (mut uploaded, mut gathered) = (trainer(), trainer());
    let feed = Arc::new(Feed::new(&device, Placement::Device));
    let all = std::slice::from_ref(&wiring);
    let (mut on_host, mut there) =
        (Shards::new(&source, all, 3), Shards::new(&source, all, 3).fed_to(feed, scaling.rows));
    let batches = || Batches::new(wiring.clone(), scaling.clone(), Position::default(), 200);
    let (mut host_batches, mut batches) = (batches(), batches());
    let (mut rows, mut known) = (Pairs::default(), Pairs::default());
    let objective = case.objective(24);
    for _ in 0..6 {
        host_batches.fill(&mut on_host, 24, &mut rows).unwrap();
        let x = Rows::new(&rows.x, D).unwrap();
        let resident = batches.fill(&mut there, 24, &mut known).unwrap().unwrap();
        for (trainer, batch) in
            [(&mut uploaded, Resident::of(&device, x, x).unwrap()), (&mut gathered, resident)]
        {
            let forward = trainer.forward(&batch, &objective).unwrap();
            trainer.update(&forward, &case.settings(&objective)).unwrap();
        }
    }
    assert!(uploaded.download().unwrap() == gathered.download().unwrap(), "other bits");
    assert!(gathered.download().unwrap().0 != start, "nothing was learned");
}

const KEYS: &str = "\
width = 32
steps = 12
route = 'sparse'
batch = 96
log_every = 4
checkpoint_every = 5
lr = 0.003
dead_window = 2000
[[sae]]
name = 'plain'
tap = 'resid.1'
target_l0 = 4.0
[[sae]]
name = 'across'
tap = 'attn.0'
target = 'resid.1'
target_l0 = 4.0
[[sae]]
name = 'published'
layers = [1, 0]
normalise = 'standardise'
loss = 'fvu'
activation = 'topk'
k = 4
aux_k = 8
aux_form = 'mlsae'
encoder_bias = false
";

/// A store, read as it is stored, on devices with room for its shards and without; and the processor, for what is learned.
#[test]
fn runs_on_a_store_end_in_the_same_bits_wherever_shards_lie() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = prepare(folder.path());
    settings.taps = ["resid.0", "resid.1", "attn.0"].map(str::to_owned).to_vec();
    settings.dtype = StoreDtype::Bf16;
    let store = folder.path().join("store");
    let loaded = model::load(settings.model.as_ref()).unwrap();
    let go = StopFlag::default();
    harvest::run(&settings, &store, &Inputs::of(&loaded, &settings).unwrap(), &go).unwrap();
    let source: Arc<dyn ActivationSource> = Arc::new(StoreTaps::open(&store).unwrap());
    assert_eq!((source.element(), source.largest_shard()), (StoreDtype::Bf16, 700));
    let jobs = |out: &Path| -> Vec<Job> {
        let job = |(name, text): (Option<String>, String)| {
            let name = name.unwrap();
            Job { out: out.join(&name), name, config: resolve(&text, &[]).unwrap() }
        };
        expand(KEYS, "sae").unwrap().into_iter().map(job).collect()
    };
    let run = |name: &str, device: Option<&SharedDevice>| {
        let jobs = jobs(&folder.path().join(name));
        let done = run_all_on(&source, &jobs, device, &go).unwrap();
        let done: Vec<_> = done.into_iter().map(Result::unwrap).collect();
        let weights = jobs.iter().map(|job| std::fs::read(job.out.join("sae_weights.safetensors")).unwrap());
        (done, weights.collect::<Vec<_>>())
    };
    let room = native::train::room::Room::of(&jobs(folder.path()), &*source);
    let little = room.least() + room.trainers / 10 + room.shards;
    assert_eq!((room.placement(little), room.placement(little - 1)), (Placement::Device, Placement::Host));
    let on = |room: usize| -> SharedDevice { Arc::new(Emulator::with_room(folder.path(), room)) };
    let (_, processor) = run("processor", None);
    let (there, with_room) = run("there", Some(&on(1 << 40)));
    let (_, without) = run("without", Some(&on(little as usize - 1)));
    assert!(with_room == without, "other bits where shards lie elsewhere");
    assert!(with_room != processor, "no device was used");
    let (host, _) = run("processor", None);
    for (host, there) in host.iter().zip(&there) {
        assert!((there.fvu - host.fvu).abs() < 0.02 * host.fvu, "{there:?} {host:?}");
    }
}
