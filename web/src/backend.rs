//! Encoding with the best backend there is, and going on without it when it fails.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use shared::cpu::ScalarBackend;
use shared::pack::Text;
use shared::{Codes, CodesBuilder, Forward, Rows, Sae};

use crate::data::{self, Pack};
use crate::gpu::{Blocks, Gpu, GpuBackend, GpuError};
use crate::state::choice::{Choice, Kind, Probe, Wish};
use crate::state::encoded::Encoded;
use crate::state::load::Failure;

/// Rows the CPU encodes before the page may draw again.
const CPU_CHUNK: usize = 8;

/// An encoded text, and how it came about.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    /// Its latents.
    pub(crate) encoded: Encoded,
    /// The backend used and why.
    pub(crate) choice: Choice,
    /// Encoding, in milliseconds.
    pub(crate) encode_ms: f64,
    /// Fetching the encoder and readying the backend, in milliseconds; zero when it was ready.
    pub(crate) ready_ms: f64,
}

enum Engine {
    Gpu(GpuBackend, Arc<Sae>),
    Cpu(ScalarBackend),
}

struct Held {
    pack: String,
    choice: Choice,
    engine: Rc<Engine>,
}

thread_local! {
    /// The encoder used last; one at a time, because an encoder may be hundreds of megabytes.
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
    /// The device of this page, kept for all encoders.
    static DEVICE: RefCell<Option<Gpu>> = const { RefCell::new(None) };
}

/// Looks for an adapter, once at start.
pub(crate) async fn probe() -> Probe {
    match device().await {
        Ok(gpu) => Probe::Adapter { name: gpu.name().to_owned(), software: gpu.is_software() },
        Err(GpuError::NoAdapter(_)) => Probe::None("the browser offers no adapter".to_owned()),
        Err(error) => Probe::None(error.to_string()),
    }
}

/// The device of this page, or a new one after a loss.
pub(crate) async fn device() -> Result<Gpu, GpuError> {
    if let Some(gpu) = DEVICE.with_borrow(Clone::clone)
        && gpu.check().is_ok()
    {
        return Ok(gpu);
    }
    let gpu = Gpu::request().await?;
    DEVICE.set(Some(gpu.clone()));
    Ok(gpu)
}

/// Destroys the device, as a crash of the driver would; the browser tests use it.
pub(crate) fn lose_device() {
    DEVICE.with_borrow(|device| {
        if let Some(gpu) = device {
            gpu.destroy();
        }
    });
}

/// Encodes `text` with the dictionary of `pack`; `progress` is told the share done.
pub(crate) async fn encode(
    pack: &Pack,
    text: &Text,
    wish: Wish,
    probe: &Probe,
    progress: impl Fn(f64),
) -> Result<Outcome, Failure> {
    let d_in = pack.manifest.sae.d_in;
    let kept = text.x.chunks_exact(d_in).zip(&text.skip).filter(|(_, skip)| !**skip);
    let x: Vec<f32> = kept.flat_map(|(row, _)| row).copied().collect();
    let made = encode_rows(pack, &x, wish, probe, progress).await?;
    let wrong = || Failure::compute("Encoding the text", "the backend returned another number of rows");
    let encoded = Encoded::new(&made.codes, &text.skip).ok_or_else(wrong)?;
    let EncodedRows { choice, encode_ms, ready_ms, .. } = made;
    Ok(Outcome { encoded, choice, encode_ms, ready_ms })
}

/// Codes of some vectors, and how they came about, as in [`Outcome`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EncodedRows {
    /// A row each.
    pub(crate) codes: Codes,
    /// The backend used and why.
    pub(crate) choice: Choice,
    /// Encoding, in milliseconds.
    pub(crate) encode_ms: f64,
    /// Fetching the encoder and readying the backend.
    pub(crate) ready_ms: f64,
}

/// Encodes the vectors `x`, `[n, d_in]`, with the dictionary of `pack`; `progress` is told the share done.
pub(crate) async fn encode_rows(
    pack: &Pack,
    x: &[f32],
    wish: Wish,
    probe: &Probe,
    progress: impl Fn(f64),
) -> Result<EncodedRows, Failure> {
    let fail = |e: &dyn std::fmt::Display| Failure::compute("Encoding the text", e);
    let rows = Rows::new(x, pack.manifest.sae.d_in).map_err(|e| fail(&e))?;
    let started = now();
    let mut choice = Choice::make(wish, probe);
    let mut attempts = 0;
    loop {
        attempts += 1;
        let result = async {
            let (engine, held) = engine(pack, &choice).await?;
            let ready = now();
            let codes = run(&engine, rows, &progress).await?;
            Ok::<_, Trouble>((codes, held, ready))
        }
        .await;
        match result {
            Ok((codes, choice, ready)) => {
                return Ok(EncodedRows {
                    codes,
                    choice,
                    encode_ms: now() - ready,
                    ready_ms: ready - started,
                });
            }
            Err(Trouble::Final(failure)) => return Err(failure),
            // A device that went away is replaced once, then the CPU takes over.
            Err(Trouble::Gpu(GpuError::Lost(_) | GpuError::Refused(_))) if attempts == 1 => {
                HELD.set(None);
                DEVICE.set(None);
            }
            Err(Trouble::Gpu(error)) => choice = Choice::after_failure(&error.to_string()),
        }
    }
}

/// Something that went wrong: with the graphics device, which can be done without, or for good.
enum Trouble {
    Gpu(GpuError),
    Final(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Final(failure)
    }
}

/// The encoder of `pack` on the chosen backend: the one held, or a new one.
async fn engine(pack: &Pack, choice: &Choice) -> Result<(Rc<Engine>, Choice), Trouble> {
    let held = HELD.with_borrow(|held| {
        let held = held.as_ref().filter(|h| h.pack == pack.entry.name)?;
        // After a failure the CPU stays in use, and the page goes on saying why.
        (held.choice.kind == choice.kind).then(|| (held.engine.clone(), held.choice.clone()))
    });
    if let Some((engine, held)) = held {
        let choice = if choice.kind == Kind::Gpu { choice.clone() } else { held };
        return Ok((engine, choice));
    }
    let sae = match HELD.take() {
        Some(Held { pack: name, engine, .. }) if name == pack.entry.name => match &*engine {
            Engine::Gpu(_, sae) => sae.clone(),
            Engine::Cpu(backend) => Arc::new(backend.sae().clone()),
        },
        _ => {
            let encoder = data::encoder(pack).await?;
            let sae = encoder.without_decoder(&pack.manifest.sae);
            Arc::new(sae.map_err(|e| Failure::content("encoder.safetensors", e))?)
        }
    };
    let engine = match choice.kind {
        Kind::Gpu => {
            let gpu = device().await.map_err(Trouble::Gpu)?;
            let made = GpuBackend::new(gpu, sae.clone(), Blocks::default()).await;
            Engine::Gpu(made.map_err(Trouble::Gpu)?, sae)
        }
        Kind::Cpu => {
            Engine::Cpu(ScalarBackend::new(Arc::try_unwrap(sae).unwrap_or_else(|shared| (*shared).clone())))
        }
    };
    let engine = Rc::new(engine);
    HELD.set(Some(Held { pack: pack.entry.name.clone(), choice: choice.clone(), engine: engine.clone() }));
    Ok((engine, choice.clone()))
}

async fn run(engine: &Engine, rows: Rows<'_>, progress: &impl Fn(f64)) -> Result<Codes, Trouble> {
    match engine {
        Engine::Gpu(backend, _) => backend.encode(rows).await.map_err(Trouble::Gpu),
        Engine::Cpu(backend) => encode_on_cpu(backend, rows, progress)
            .await
            .map_err(|e| Trouble::Final(Failure::compute("Encoding the text", e))),
    }
}

/// Encodes some rows at a time and lets the page draw in between.
async fn encode_on_cpu(
    backend: &ScalarBackend,
    rows: Rows<'_>,
    progress: &impl Fn(f64),
) -> Result<Codes, shared::ShapeError> {
    let mut builder = CodesBuilder::new(backend.dims().n_latents);
    for first in (0..rows.n_rows()).step_by(CPU_CHUNK) {
        let end = rows.n_rows().min(first + CPU_CHUNK);
        let codes = backend.encode(rows.slice(first, end))?;
        for (latents, values) in codes.iter() {
            for (&latent, &value) in latents.iter().zip(values) {
                builder.push(latent, value);
            }
            builder.end_row()?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a progress bar")]
        progress(end as f64 / rows.n_rows() as f64);
        pause().await;
    }
    Ok(builder.finish())
}

/// Lets the browser draw and answer.
async fn pause() {
    let promise = js_sys::Promise::new(&mut |resolve, _| {
        if let Some(window) = web_sys::window() {
            // When no timer can be set the promise never resolves; a window always can.
            let _ = window.set_timeout_with_callback(&resolve);
        }
    });
    let _ = wasm_bindgen_futures::JsFuture::from(promise).await;
}

/// Milliseconds since the page was opened.
pub(crate) fn now() -> f64 {
    web_sys::window().and_then(|w| w.performance()).map_or(0.0, |p| p.now())
}
