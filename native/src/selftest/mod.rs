//! Judging a training step: twenty steps of every variant against the dense f64 optimiser, tensor by tensor.
//!
//! The processor's step and a card's are judged by the same; so are impostors of a card's, which must be found out
//! ([`impostor`]). [`table`] adds the conformance suite, which judges encoding and decoding, and prints how all of it went.

pub mod cases;
pub mod feed;
pub mod impostor;
pub mod table;
pub mod textbook;

use anyhow::{Context, Result, ensure};
use shared::Rows;
use shared::loss::{Latents as Reference, Losses, Objective};

use crate::cuda::{CudaForward, CudaTrainer, Resident};
use crate::train::{Forward, Params, Settings, Trainer};
use cases::{Case, D, N_LATENTS, N_ROWS, Noise};
use textbook::{Textbook, drift};

/// Steps of a case.
pub const STEPS: usize = 20;
/// Batches whose decisions are nearer than this are drawn again: f32 may rightly decide otherwise.
const MARGIN: f64 = 1e-6;
/// How far a loss may be off, relatively.
const LOSS_TOLERANCE: f64 = 2e-5;
/// How far parameters may be off, as a share of how far they moved.
const DRIFT_TOLERANCE: f64 = 3e-4;
/// Active pairs that a case must see to mean something.
const ACTIVE: usize = 2000;

/// What takes training steps.
pub trait Learner {
    /// A forward pass: the losses, the latents that fired, ascending, and the number of active pairs.
    ///
    /// # Errors
    /// The learner's own.
    fn forward(
        &mut self,
        x: Rows<'_>,
        y: Rows<'_>,
        objective: &Objective,
    ) -> Result<(Losses, Vec<u32>, usize)>;
    /// The update that belongs to it.
    ///
    /// # Errors
    /// The learner's own.
    fn update(&mut self, settings: &Settings<'_>) -> Result<()>;
    /// The parameters as they stand.
    ///
    /// # Errors
    /// The learner's own.
    fn params(&self) -> Result<Params>;
}

/// The processor's step.
#[derive(Debug)]
pub struct OnProcessor(pub Trainer, pub Option<Forward>);

impl Learner for OnProcessor {
    fn forward(
        &mut self,
        x: Rows<'_>,
        y: Rows<'_>,
        objective: &Objective,
    ) -> Result<(Losses, Vec<u32>, usize)> {
        let forward = self.0.forward(x, y, objective)?;
        let seen = (forward.losses(), forward.fired(&self.0.params), forward.n_active());
        self.1 = Some(forward);
        Ok(seen)
    }

    fn update(&mut self, settings: &Settings<'_>) -> Result<()> {
        self.0.update(&self.1.take().context("no forward pass")?, settings)
    }

    fn params(&self) -> Result<Params> {
        Ok(self.0.params.clone())
    }
}

/// The step of a device with kernels.
#[derive(Debug)]
pub struct OnDevice {
    trainer: CudaTrainer,
    forward: Option<CudaForward>,
    /// Whether the last step took the dense route.
    pub dense: bool,
}

impl OnDevice {
    /// A trainer before its first step.
    #[must_use]
    pub fn new(trainer: CudaTrainer) -> Self {
        Self { trainer, forward: None, dense: false }
    }
}

impl Learner for OnDevice {
    fn forward(
        &mut self,
        x: Rows<'_>,
        y: Rows<'_>,
        objective: &Objective,
    ) -> Result<(Losses, Vec<u32>, usize)> {
        let batch = Resident::of(self.trainer.device(), x, y)?;
        let forward = self.trainer.forward(&batch, objective)?;
        let seen = (forward.losses, forward.fired.clone(), forward.n_active);
        self.dense = forward.dense;
        self.forward = Some(forward);
        Ok(seen)
    }

    fn update(&mut self, settings: &Settings<'_>) -> Result<()> {
        self.trainer.update(&self.forward.take().context("no forward pass")?, settings)
    }

    fn params(&self) -> Result<Params> {
        Ok(self.trainer.download()?.0)
    }
}

/// How a learner did on a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The name of the case.
    pub name: &'static str,
    /// The largest relative error of a loss.
    pub loss_error: f64,
    /// Of each array: how far it ended from where it should have, as a share of how far it should have moved.
    pub drifts: Vec<(&'static str, f64)>,
}

impl Verdict {
    /// The array that is furthest off.
    #[must_use]
    pub fn worst(&self) -> (&'static str, f64) {
        self.drifts.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("nothing", 0.0))
    }
}

/// Judges `learner`, which has the parameters of [`Case::start`], by `steps` steps of `case`.
///
/// # Errors
/// If another latent is active than should be, a loss or a parameter is off by more than rounding, or the learner fails.
pub fn judge(case: &Case, learner: &mut dyn Learner, steps: usize) -> Result<Verdict> {
    let (objective, first) = (case.objective(N_ROWS), case.start());
    let settings = case.settings(&objective);
    let (mut textbook, mut noise) = (Textbook::new(&first), Noise(17));
    let (mut loss_error, mut active) = (0.0f64, 0usize);
    for step in 0..steps {
        let (x, y) = loop {
            let x = noise.vector(N_ROWS * D, 0.35);
            let y = if case.d_out == D { x.clone() } else { noise.vector(N_ROWS * case.d_out, 0.35) };
            let rows = (Rows::new(&x, D)?, Rows::new(&y, case.d_out)?);
            if textbook.margin(rows.0, rows.1, &objective)? > MARGIN {
                break (x, y);
            }
        };
        let (x, y) = (Rows::new(&x, D)?, Rows::new(&y, case.d_out)?);
        let pass = textbook.sae.forward(x, y, &objective)?;
        let (losses, fired, n_active) = learner.forward(x, y, &objective)?;
        let l0 = pass.losses.l0;
        ensure!(losses.l0 == l0, "step {step}: L0 is {}, and should be {l0}", losses.l0);
        let fires = |i: &u32| pass.f.iter().skip(*i as usize).step_by(N_LATENTS).any(|f| *f > 0.0);
        #[expect(clippy::cast_possible_truncation, reason = "a few hundred latents")]
        let wanted: Vec<u32> = (0..N_LATENTS as u32).filter(fires).collect();
        ensure!(fired == wanted, "step {step}: other latents fired than should have");
        active += n_active;
        learner.update(&settings)?;
        let wanted = textbook.step(x, y, &settings)?;
        loss_error = loss_error.max((losses.total() / wanted - 1.0).abs());
        ensure!(loss_error < LOSS_TOLERANCE, "step {step}: the loss is off by {loss_error:e}");
    }
    ensure!(active > ACTIVE * steps / STEPS, "only {active} active pairs: the case tests nothing");
    let params = learner.params()?;
    let drifts = drifts(case, &params, &textbook, &first)?;
    for (name, drift) in &drifts {
        ensure!(*drift < DRIFT_TOLERANCE, "{name} is off by {drift:e} of how far it moved");
    }
    if case.objective.sparsity.unit_directions() {
        let mut squares =
            params.tensors.w_dec.chunks_exact(case.d_out).map(|d| d.iter().map(|v| v * v).sum::<f32>());
        ensure!(squares.all(|square| (square.sqrt() - 1.0).abs() < 1e-6), "directions are not of length 1");
    }
    Ok(Verdict { name: case.name, loss_error, drifts })
}

fn drifts(
    case: &Case,
    params: &Params,
    textbook: &Textbook,
    first: &Params,
) -> Result<Vec<(&'static str, f64)>> {
    let (p, q, f) = (&params.tensors, &textbook.sae, &first.tensors);
    let mut drifts = vec![
        ("w_enc", drift(&p.w_enc, &q.w_enc, &f.w_enc)?),
        ("w_dec", drift(&p.w_dec, &q.w_dec, &f.w_dec)?),
        ("b_dec", drift(&p.b_dec, &q.b_dec, &f.b_dec)?),
    ];
    if case.encoder_bias {
        drifts.push(("b_enc", drift(&p.b_enc, &q.b_enc, &f.b_enc)?));
    } else {
        ensure!(p.b_enc == f.b_enc, "the encoder bias moved, which is not trained");
    }
    match &q.latents {
        Reference::JumpRelu { threshold, .. } => {
            drifts.push(("threshold", drift(&p.own[0], threshold, &f.own[0])?));
        }
        Reference::Gated { r_mag, b_mag } => drifts.extend([
            ("r_mag", drift(&p.own[0], r_mag, &f.own[0])?),
            ("b_mag", drift(&p.own[1], b_mag, &f.own[1])?),
        ]),
        _ => {}
    }
    if let Some(skip) = &q.w_skip {
        drifts.push(("w_skip", drift(&p.w_skip, skip, &f.w_skip)?));
    }
    Ok(drifts)
}
