//! What the user sees of a command: one line a step, with its time, and a closing summary.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Prints steps as they happen and remembers their times.
#[derive(Debug)]
pub(crate) struct Report {
    started: Instant,
    steps: Vec<(String, Outcome, Duration)>,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing to do.
    Already,
    /// Done now.
    Done,
    /// Left out on request or for want of an optional tool.
    Skipped,
    /// Failed; the summary says so again.
    Failed,
}

impl Outcome {
    fn mark(self) -> &'static str {
        match self {
            Self::Already => "ready",
            Self::Done => "done",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
        }
    }
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), steps: Vec::new() }
    }

    /// Prints a heading.
    pub(crate) fn heading(&self, text: &str) {
        eprintln!("\n== {text}");
    }

    /// One step: `check` says what is already there (with a word on it), else `make` does it and says what it did.
    pub(crate) fn ensure(
        &mut self,
        name: &str,
        why: &str,
        check: impl FnOnce() -> Result<Option<String>>,
        make: impl FnOnce() -> Result<String>,
    ) -> Result<()> {
        let started = Instant::now();
        if let Some(detail) = check()? {
            self.close(name, Outcome::Already, &detail, started);
            return Ok(());
        }
        eprintln!("  {:<8} {name}: {why}", "…");
        match make() {
            Ok(detail) => {
                self.close(name, Outcome::Done, &detail, started);
                Ok(())
            }
            Err(error) => {
                self.steps.push((name.to_owned(), Outcome::Failed, started.elapsed()));
                Err(error)
            }
        }
    }

    /// One step that is always done.
    pub(crate) fn step(
        &mut self,
        name: &str,
        why: &str,
        make: impl FnOnce() -> Result<String>,
    ) -> Result<()> {
        self.ensure(name, why, || Ok(None), make)
    }

    /// Notes a step that is left out, and why.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.close(name, Outcome::Skipped, why, Instant::now());
    }

    fn close(&mut self, name: &str, outcome: Outcome, detail: &str, started: Instant) {
        let elapsed = started.elapsed();
        eprintln!("  {:<8} {name}: {detail} ({})", outcome.mark(), seconds(elapsed));
        self.steps.push((name.to_owned(), outcome, elapsed));
    }

    /// The steps that took time or did not happen, one a line, and the whole time.
    pub(crate) fn summary(&self) -> String {
        let width = self.steps.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, outcome, elapsed) in
            self.steps.iter().filter(|(_, outcome, _)| *outcome != Outcome::Already)
        {
            let _ = writeln!(text, "  {:<8} {name:<width$}  {:>9}", outcome.mark(), seconds(*elapsed));
        }
        let _ = write!(text, "  {:<8} {:<width$}  {:>9}", "", "in all", seconds(self.started.elapsed()));
        text
    }
}

/// `0.4 s`, `12.3 s`, `7 min 03 s`.
pub(crate) fn seconds(elapsed: Duration) -> String {
    let whole = elapsed.as_secs();
    if whole < 60 {
        format!("{:.1} s", elapsed.as_secs_f64())
    } else {
        format!("{} min {:02} s", whole / 60, whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn what_is_ready_is_not_made_again_and_a_failure_is_in_the_summary() {
        let mut report = Report::new();
        report.ensure("a", "why", || Ok(Some("there".into())), || bail!("must not run")).unwrap();
        report.step("b", "why", || Ok("made".into())).unwrap();
        assert!(report.step("c", "why", || bail!("broken")).is_err());
        let summary = report.summary();
        assert!(
            summary.contains("done     b") && summary.contains("FAILED   c") && !summary.contains("ready")
        );
    }

    #[test]
    fn times_read_well() {
        assert_eq!(seconds(Duration::from_millis(400)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(423)), "7 min 03 s");
    }
}
