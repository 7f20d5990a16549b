//! `stratascope selftest`.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Result, bail};
use shared::config::train::Products;

use crate::cuda::{self, CudaTrainer, Device};
use crate::selftest::cases::{Case, cases};
use crate::selftest::impostor::MISTAKES;
use crate::selftest::{OnDevice, OnProcessor, STEPS, Verdict, judge};
use crate::train::{Moments, Trainer};

/// Arguments of `selftest`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Twenty training steps of every variant are judged by a dense optimiser in double precision, tensor by tensor; on a card so are \
devices with one mistake each, which must be found out. The table says how far losses, and the array that is furthest off, are off.

Examples:
  stratascope selftest
  stratascope selftest --device cuda:0")]
pub(crate) struct Args {
    /// What is tested: cpu, or a card such as cuda:0.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: cuda::Choice,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let failures = match cuda::open(args.device)? {
        None => on_processor()?,
        Some(card) => on_card(&card)?,
    };
    if failures > 0 {
        bail!("{failures} failed");
    }
    Ok(())
}

fn on_processor() -> Result<usize> {
    let mut table = Table::new("the processor")?;
    for case in cases() {
        let mut learner = OnProcessor(Trainer::new(case.start(), case.momentum > 0.0), None);
        table.line(case.name, &judge(&case, &mut learner, STEPS))?;
    }
    Ok(table.failures)
}

fn on_card(card: &Arc<dyn Device + Send + Sync>) -> Result<usize> {
    let mut table = Table::new(&card.name())?;
    let run = |device: Arc<dyn Device + Send + Sync>, case: &Case| {
        let first = case.start();
        let moments = Moments::new(&first, case.momentum > 0.0);
        let trainer = CudaTrainer::new(device, &first, &moments, 0, Products::F32)?;
        judge(case, &mut OnDevice(trainer, None), STEPS)
    };
    let cases = cases();
    for case in &cases {
        table.line(case.name, &run(Arc::clone(card), case))?;
    }
    for mistake in MISTAKES {
        let Some(case) = cases.iter().find(|case| case.name == mistake.case) else { continue };
        table.impostor(mistake.name, &run(Arc::new(mistake.made_by(Arc::clone(card))), case))?;
    }
    Ok(table.failures)
}

/// What is printed.
struct Table {
    failures: usize,
}

impl Table {
    fn new(device: &str) -> Result<Self> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{device}\n{:<52} {:>6} {:>10} {:>10}  furthest off", "variant", "", "loss", "drift")?;
        Ok(Self { failures: 0 })
    }

    fn line(&mut self, name: &str, found: &Result<Verdict>) -> Result<()> {
        let mut out = std::io::stdout().lock();
        match found {
            Ok(verdict) => {
                let (array, drift) = verdict.worst();
                writeln!(
                    out,
                    "{name:<52} {:>6} {:>10.1e} {drift:>10.1e}  {array}",
                    "ok", verdict.loss_error
                )?;
            }
            Err(error) => {
                self.failures += 1;
                writeln!(out, "{name:<52} {:>6} {error:#}", "FAILED")?;
            }
        }
        Ok(())
    }

    fn impostor(&mut self, name: &str, found: &Result<Verdict>) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let name = format!("impostor: {name}");
        match found {
            Err(error) => writeln!(out, "{name:<52} {:>6} {error:#}", "ok")?,
            Ok(_) => {
                self.failures += 1;
                writeln!(out, "{name:<52} {:>6} was not found out", "FAILED")?;
            }
        }
        Ok(())
    }
}
