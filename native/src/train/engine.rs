//! Who takes a run's steps: the processor, or a card.
//!
//! The host's parameters and moments are what is saved, released and resampled. While a card trains, they are those of the last time
//! that the card was asked ([`Engine::fetch`]).

use std::cell::OnceCell;
use std::sync::Arc;

use anyhow::Result;
use shared::Rows;
use shared::config::train::Products;
use shared::loss::{Losses, Objective};

use super::forward::Forward;
use super::order::Pairs;
use super::resample::Rest;
use super::step::{Settings, Trainer};
use crate::cuda::{CudaForward, CudaTrainer, Device, Resident};

/// A device that several runs may share.
pub type SharedDevice = Arc<dyn Device + Send + Sync>;

/// A batch, and where it lies on a device once a run has asked for that.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    pub(super) pairs: &'a Pairs,
    resident: OnceCell<Arc<Resident>>,
}

impl<'a> Batch<'a> {
    /// A batch on the host.
    pub(super) fn new(pairs: &'a Pairs) -> Self {
        Self { pairs, resident: OnceCell::new() }
    }

    /// The batch on `device`: uploaded by the first who asks.
    fn on(&self, device: &SharedDevice, (x, y): (Rows<'_>, Rows<'_>)) -> Result<&Arc<Resident>> {
        if let Some(resident) = self.resident.get() {
            return Ok(resident);
        }
        let resident = Resident::of(device, x, y)?;
        Ok(self.resident.get_or_init(|| resident))
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
    pub(super) fn new(trainer: &Trainer, device: Option<&SharedDevice>, products: Products) -> Result<Self> {
        let Some(device) = device else { return Ok(Self::Processor) };
        let device = Arc::clone(device);
        let on_device = CudaTrainer::new(device, &trainer.params, &trainer.moments, trainer.step, products)?;
        Ok(Self::Device(Box::new(on_device)))
    }

    /// A forward pass; `powers` are those that the pass takes means of, where a device does not keep everything.
    pub(super) fn forward(
        &mut self,
        trainer: &Trainer,
        batch: &Batch<'_>,
        (x, y): (Rows<'_>, Rows<'_>),
        objective: &Objective,
        powers: [f64; 2],
    ) -> Result<Pass> {
        match self {
            Self::Processor => Ok(Pass::Processor(Box::new(trainer.forward(x, y, objective)?))),
            Self::Device(device) => {
                device.powers = powers;
                let resident = batch.on(device.device(), (x, y))?;
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

    /// Goes on from the host's parameters and moments, which something else has changed.
    pub(super) fn replace(&mut self, trainer: &Trainer) -> Result<()> {
        match self {
            Self::Processor => Ok(()),
            Self::Device(device) => device.upload(&trainer.params, &trainer.moments, trainer.step),
        }
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
