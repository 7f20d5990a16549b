//! Who takes a run's steps: the processor, or a card.
//!
//! The host's parameters and moments are what is saved, released and resampled. While a card trains there are none on the host, but
//! for those that the card was asked for ([`Engine::fetch`]).

use std::cell::OnceCell;
use std::sync::Arc;

use anyhow::{Context, Result};
use shared::Rows;
use shared::config::train::TrainConfig;
use shared::loss::{Losses, Objective, row_moments};

use super::forward::Forward;
use super::order::Pairs;
use super::params::{Moments, Tensors};
use super::resample::Rest;
use super::step::{Settings, Trainer};
use crate::cuda::{CudaForward, CudaTrainer, Device, Resident, route};

/// A device that several runs may share.
pub type SharedDevice = Arc<dyn Device + Send + Sync>;

/// A batch: what the host knows of it, and its rows, on the host or on a device.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    pub(super) pairs: &'a Pairs,
    resident: Option<Arc<Resident>>,
    moments: OnceCell<Vec<[f64; 2]>>,
}

impl<'a> Batch<'a> {
    /// A batch whose rows are `resident`, or else those of `pairs`.
    pub(super) fn new(pairs: &'a Pairs, resident: Option<Arc<Resident>>) -> Self {
        Self { pairs, resident, moments: OnceCell::new() }
    }

    /// Its number of rows.
    pub(super) fn n_rows(&self) -> usize {
        self.pairs.inputs.len()
    }

    /// The sum of every target, of `width` values, and that of its squares; taken once for all that ask.
    pub(super) fn moments(&self, width: usize) -> Result<&[[f64; 2]]> {
        if let Some(known) = self.moments.get() {
            return Ok(known);
        }
        let found = match &self.resident {
            Some(resident) => resident.moments()?,
            None => self.pairs.targets().chunks_exact(width).map(row_moments).collect(),
        };
        Ok(self.moments.get_or_init(|| found))
    }
}

/// Takes steps.
#[derive(Debug)]
pub(super) enum Engine {
    /// The host's trainer itself.
    Processor,
    /// A device, with a copy of its own.
    Device(Box<CudaTrainer>),
}

/// A forward pass, whoever took it.
#[derive(Debug)]
pub(super) enum Pass {
    Processor(Box<Forward>),
    Device(CudaForward),
}

impl Engine {
    /// The engine for `trainer` on `device`, or on the processor.
    pub(super) fn new(
        trainer: &mut Trainer,
        device: Option<&SharedDevice>,
        config: &TrainConfig,
    ) -> Result<Self> {
        let Some(device) = device else { return Ok(Self::Processor) };
        let device = Arc::clone(device);
        let widths = [trainer.params.d_in, trainer.params.d_out];
        let options = route::options(config, widths, &device)?;
        let on_device = CudaTrainer::new(device, &trainer.params, &trainer.moments, trainer.step, options)?;
        forget(trainer);
        Ok(Self::Device(Box::new(on_device)))
    }

    /// A forward pass over a batch of these widths; `powers` are those that the pass takes means of, where a device does not keep everything.
    pub(super) fn forward(
        &mut self,
        trainer: &Trainer,
        batch: &Batch<'_>,
        [d_in, d_out]: [usize; 2],
        objective: &Objective,
        powers: [f64; 2],
    ) -> Result<Pass> {
        match self {
            Self::Processor => {
                let (x, y) = (Rows::new(&batch.pairs.x, d_in)?, Rows::new(batch.pairs.targets(), d_out)?);
                Ok(Pass::Processor(Box::new(trainer.forward(x, y, objective)?)))
            }
            Self::Device(device) => {
                device.powers = powers;
                let resident = batch.resident.as_ref().context("a batch that is not on the device")?;
                Ok(Pass::Device(device.forward(resident, objective)?))
            }
        }
    }

    /// Takes the step of a pass.
    pub(super) fn update(
        &mut self,
        trainer: &mut Trainer,
        pass: &Pass,
        settings: &Settings<'_>,
    ) -> Result<()> {
        match (self, pass) {
            (Self::Device(device), Pass::Device(forward)) => {
                device.update(forward, settings)?;
                trainer.step = device.step;
                Ok(())
            }
            (_, Pass::Processor(forward)) => trainer.update(forward, settings),
            (Self::Processor, Pass::Device(_)) => {
                anyhow::bail!("a pass of a device cannot be learned from here")
            }
        }
    }

    /// Brings the host's parameters and moments up to date.
    pub(super) fn fetch(&self, trainer: &mut Trainer) -> Result<()> {
        if let Self::Device(device) = self {
            (trainer.params, trainer.moments) = device.download()?;
            trainer.step = device.step;
        }
        Ok(())
    }

    /// The parameters and moments of a device, for somebody to keep; `None` where they are the host's.
    pub(super) fn copy(&self) -> Result<Option<Trainer>> {
        let Self::Device(device) = self else { return Ok(None) };
        let (params, moments) = device.download()?;
        Ok(Some(Trainer::resume(params, moments, device.step)))
    }

    /// Goes on from the host's parameters and moments, which something else has changed.
    pub(super) fn replace(&mut self, trainer: &mut Trainer) -> Result<()> {
        if let Self::Device(device) = self {
            device.upload(&trainer.params, &trainer.moments, trainer.step)?;
            forget(trainer);
        }
        Ok(())
    }

    /// What the rows of a pass were read as, and what they lack.
    pub(super) fn rest(&self, pass: &Pass) -> Result<Rest> {
        match (self, pass) {
            (Self::Device(device), _) => {
                let (inputs, residuals) = device.rest()?;
                Ok(Rest { inputs, residuals })
            }
            (Self::Processor, Pass::Processor(forward)) => Ok(Rest::of(forward)),
            (Self::Processor, Pass::Device(_)) => anyhow::bail!("a pass of a device is not here"),
        }
    }
}

/// Lets go of what a device has now.
fn forget(trainer: &mut Trainer) {
    trainer.params.tensors = Tensors::zeros(0, 0, 0, false);
    trainer.moments = Moments::new(&trainer.params, false);
}

impl Pass {
    pub(super) fn losses(&self) -> Losses {
        match self {
            Self::Processor(forward) => forward.losses(),
            Self::Device(forward) => forward.losses,
        }
    }

    pub(super) fn n_active(&self) -> usize {
        match self {
            Self::Processor(forward) => forward.n_active(),
            Self::Device(forward) => forward.n_active,
        }
    }

    /// The latents that fired, ascending.
    pub(super) fn fired(&self, trainer: &Trainer) -> Vec<u32> {
        match self {
            Self::Processor(forward) => forward.fired(&trainer.params),
            Self::Device(forward) => forward.fired.clone(),
        }
    }

    /// Means of the two powers of what a norm penalty counts.
    pub(super) fn mean_powers(&self, trainer: &Trainer, powers: [f64; 2]) -> [f64; 2] {
        match self {
            Self::Processor(forward) => powers.map(|p| forward.mean_power(&trainer.params, p)),
            Self::Device(forward) => forward.mean_powers,
        }
    }

    /// Seconds of the encoder product, where they are known.
    pub(super) fn encoder_seconds(&self) -> f64 {
        match self {
            Self::Processor(forward) => forward.effort().seconds,
            Self::Device(_) => 0.0,
        }
    }
}
