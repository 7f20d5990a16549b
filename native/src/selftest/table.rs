//! The table of `stratascope selftest`: training steps and encoding of the processor or of a device, and impostors, which must fail.

use std::convert::Infallible;
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Result, ensure};
use conformance::impostor::{Fault, Impostor};
use conformance::suite::{self, Check, Report};
use shared::config::train::Products;

use super::cases::{Case, N_ROWS, cases};
use super::impostor::{ENCODING, MISTAKES};
use super::{OnDevice, OnProcessor, Verdict, feed, judge};
use crate::cpu::CpuBackend;
use crate::cuda::trainer::has_dense_route;
use crate::cuda::{CudaBackend, CudaOptions, CudaTrainer, Device};
use crate::train::{Moments, Trainer};

/// What is behind the name of a case whose steps take the dense route.
pub const DENSE: &str = ", dense";

type Shared = Arc<dyn Device + Send + Sync>;

/// Judges the processor by `steps` steps of every case, and by the conformance suite; returns how many lines failed.
///
/// # Errors
/// If `out` cannot be written.
pub fn on_processor(out: &mut dyn Write, steps: usize) -> Result<usize> {
    let mut table = Table::new(out, "the processor")?;
    for case in cases() {
        let mut learner = OnProcessor(Trainer::new(case.start(), case.momentum > 0.0), None);
        table.verdict(case.name, &judge(&case, &mut learner, steps))?;
    }
    let report = pollster::block_on(suite::run(async |sae| Ok::<_, Infallible>(CpuBackend::new(sae))));
    table.report(&report)?;
    table.faults()?;
    Ok(table.failures)
}

/// Judges a device, and devices with one mistake each; otherwise as [`on_processor`].
///
/// # Errors
/// If `out` cannot be written.
pub fn on_device(out: &mut dyn Write, device: &Shared, steps: usize) -> Result<usize> {
    let mut table = Table::new(out, &device.name())?;
    table.training(device, steps)?;
    table.feeding(device)?;
    table.report(&conforms(device))?;
    table.encoding_mistakes(device)?;
    table.faults()?;
    Ok(table.failures)
}

/// Judges `steps` steps of a case on one of its routes.
fn train(device: &Shared, case: &Case, dense: bool, steps: usize) -> Result<Verdict> {
    let first = case.start();
    let moments = Moments::new(&first, case.momentum > 0.0);
    let dense_from = if dense { 0.0 } else { f64::INFINITY };
    let options = CudaOptions { dense_from, ..Products::F32.into() };
    let trainer = CudaTrainer::new(Arc::clone(device), &first, &moments, 0, options)?;
    let mut learner = OnDevice::new(trainer);
    let verdict = judge(case, &mut learner, steps)?;
    ensure!(learner.dense == dense, "steps took another route than was asked for");
    Ok(verdict)
}

/// The conformance suite on a device.
#[must_use]
pub fn conforms(device: &Shared) -> Report {
    pollster::block_on(suite::run(async |sae| CudaBackend::new(Arc::clone(device), sae)))
}

fn reason(check: &Check) -> String {
    format!("{}: {}", check.name, check.outcome.as_ref().err().map_or("", String::as_str))
}

/// What is printed.
pub struct Table<'a> {
    out: &'a mut dyn Write,
    /// Lines that failed.
    pub failures: usize,
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("failures", &self.failures).finish_non_exhaustive()
    }
}

impl<'a> Table<'a> {
    /// A table of what `device` does.
    ///
    /// # Errors
    /// If `out` cannot be written, as everything that adds to it.
    pub fn new(out: &'a mut dyn Write, device: &str) -> Result<Self> {
        let mut table = Self { out, failures: 0 };
        writeln!(table.out, "{device}")?;
        table.line("twenty steps of", "", "", &format!("{:>10} {:>10}  furthest off", "loss", "drift"))?;
        Ok(table)
    }

    fn line(&mut self, what: &str, name: &str, outcome: &str, rest: &str) -> Result<()> {
        let name = format!("{what}{name}");
        Ok(writeln!(self.out, "{name:<66} {outcome:>6} {rest}")?)
    }

    fn fails(&mut self, what: &str, name: &str, reason: &str) -> Result<()> {
        self.failures += 1;
        self.line(what, name, "FAILED", reason)
    }

    /// How twenty steps of a case went.
    fn verdict(&mut self, name: &str, found: &Result<Verdict>) -> Result<()> {
        match found {
            Ok(verdict) => {
                let (array, drift) = verdict.worst();
                let rest = format!("{:>10.1e} {drift:>10.1e}  {array}", verdict.loss_error);
                self.line("", name, "ok", &rest)
            }
            Err(error) => self.fails("", name, &format!("{error:#}")),
        }
    }

    /// An impostor, and why it was found out.
    fn impostor(&mut self, name: &str, found: Option<String>) -> Result<()> {
        match found {
            Some(reason) => self.line("impostor: ", name, "ok", &reason),
            None => self.fails("impostor: ", name, "was not found out"),
        }
    }

    /// `steps` steps of every case on either route, and impostors.
    ///
    /// # Errors
    /// If the table cannot be written.
    pub fn training(&mut self, device: &Shared, steps: usize) -> Result<()> {
        let cases = cases();
        let routes = |case: &Case| {
            let dense = has_dense_route(&case.start(), &case.objective(N_ROWS));
            [(false, ""), (true, DENSE)].into_iter().take(1 + usize::from(dense))
        };
        for case in &cases {
            for (dense, suffix) in routes(case) {
                self.verdict(&format!("{}{suffix}", case.name), &train(device, case, dense, steps))?;
            }
        }
        for mistake in MISTAKES {
            let Some(case) = cases.iter().find(|case| case.name == mistake.case) else { continue };
            let device: Shared = Arc::new(mistake.made_by(Arc::clone(device)));
            for (dense, suffix) in routes(case) {
                let found = train(&device, case, dense, steps).err();
                let name = format!("{}{suffix}", mistake.name);
                self.impostor(&name, found.map(|error| format!("{error:#}")))?;
            }
        }
        Ok(())
    }

    /// What batches are gathered from, and what is read back.
    fn feeding(&mut self, device: &Shared) -> Result<()> {
        match feed::judge(device) {
            Ok(compared) => self.line("feeding", "", "ok", &format!("{compared:>10} values")),
            Err(error) => self.fails("feeding", "", &format!("{error:#}")),
        }
    }

    /// Devices with one mistake each in encoding.
    fn encoding_mistakes(&mut self, device: &Shared) -> Result<()> {
        for mistake in ENCODING {
            let report = conforms(&(Arc::new(mistake.made_by(Arc::clone(device))) as Shared));
            let found = report.failures().find(|check| check.name.contains(mistake.case)).map(reason);
            self.impostor(mistake.name, found)?;
        }
        Ok(())
    }

    /// What the conformance suite found, a line for each kind of check.
    ///
    /// # Errors
    /// If the table cannot be written.
    pub fn report(&mut self, report: &Report) -> Result<()> {
        self.line("conformance", "", "", &format!("{:>10} {:>10}", "checks", "tolerance"))?;
        let kind = |check: &Check| check.name.rsplit(": ").next().unwrap_or_default().to_owned();
        let mut kinds: Vec<String> = report.checks.iter().map(kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        if kinds.is_empty() {
            return self.fails("", "conformance", "nothing was checked");
        }
        for name in kinds {
            let checks: Vec<&Check> = report.checks.iter().filter(|check| kind(check) == name).collect();
            let share = |check: &&Check| check.outcome.as_ref().map_or(0.0, |agreement| agreement.share);
            let worst = checks.iter().map(share).fold(0.0, f64::max);
            if checks.iter().all(|check| check.outcome.is_ok()) {
                self.line("", &name, "ok", &format!("{:>10} {worst:>10.3}", checks.len()))?;
            }
        }
        for check in report.failures() {
            self.fails("", "", &reason(check))?;
        }
        Ok(())
    }

    /// The suite's own impostors: backends with one fault each, which say whether the suite judges anything.
    fn faults(&mut self) -> Result<()> {
        for fault in Fault::ALL {
            let report = pollster::block_on(suite::run(async |sae| Impostor::new(sae, fault)));
            self.impostor(&format!("{fault:?}"), report.failures().next().map(reason))?;
        }
        Ok(())
    }
}
