//! The log of a run: one JSON object a line, cut back on resuming to what the checkpoint knows.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use shared::config::train::TrainConfig;

use super::events::Events;
use super::speed::Speed;
use crate::files::write_bytes;

/// A line of the log: means over the steps since the line before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps taken.
    pub step: u64,
    /// Vectors trained on.
    pub tokens: u64,
    /// The objective.
    pub loss: f64,
    /// Mean `‖x − x̂‖²` of the normalised data.
    pub mse: f64,
    /// Mean active latents a vector.
    pub l0: f64,
    /// `mse` over the variance of the training data.
    pub fvu: f64,
    /// Share of latents that did not fire within the dead window.
    pub dead: f64,
    /// The λ that acted on the thresholds (with a target, the derivative of its term in L0).
    pub lambda: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Batches not learned from so far.
    pub skipped: u64,
    /// Training speed; not part of what resuming reproduces.
    pub tokens_per_s: f64,
    /// Share of the time spent waiting for data; not part of what resuming reproduces either.
    pub waiting: f64,
    /// Where the time went; nor is this.
    #[serde(flatten)]
    pub speed: Speed,
}

/// Appends lines to a file.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    events: Option<Events>,
}

impl Log {
    /// Opens the log at `path`, and beside it TensorBoard's where `config` asks for it, keeping the lines up to `step`.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: &Path, step: u64, config: &TrainConfig) -> Result<Self> {
        let mut kept = Vec::new();
        if path.exists() {
            let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            for line in BufReader::new(file).lines() {
                let line = line.with_context(|| format!("cannot read {}", path.display()))?;
                match serde_json::from_str::<Line>(&line) {
                    Ok(parsed) if parsed.step <= step => kept.push(line + "\n"),
                    // Later than the checkpoint, or cut off when the process died: it is written again.
                    _ => break,
                }
            }
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        write_bytes(path, kept.concat().as_bytes())?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let events = config.tensorboard.then(|| Events::open(folder, step, config)).transpose()?;
        let file = OpenOptions::new().append(true).open(path);
        Ok(Self {
            file: file.with_context(|| format!("cannot write {}", path.display()))?,
            path: path.to_owned(),
            events,
        })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let text = serde_json::to_string(line)? + "\n";
        self.file
            .write_all(text.as_bytes())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.events.as_mut().map_or(Ok(()), |events| events.write(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_keeps_the_lines_up_to_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let line = |step: u64| Line {
            step,
            tokens: step * 8,
            loss: 0.5,
            mse: 0.25,
            l0: 3.0,
            fvu: 0.5,
            dead: 0.0,
            lambda: 0.0,
            lr: 1e-3,
            skipped: 0,
            tokens_per_s: 1.0,
            waiting: 0.0,
            speed: Speed { mfu: Some(0.25), ..Speed::default() },
        };
        let (config, quiet) =
            (TrainConfig { tensorboard: true, ..TrainConfig::default() }, TrainConfig::default());
        let mut log = Log::open(&path, 0, &quiet).unwrap();
        let events = folder.path().join(crate::train::events::FILE);
        assert!(!events.exists());
        for step in [10, 20, 30] {
            log.write(&line(step)).unwrap();
        }
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 4").unwrap();
        let mut log = Log::open(&path, 20, &config).unwrap();
        let empty = fs::metadata(&events).unwrap().len();
        log.write(&line(30)).unwrap();
        assert!(fs::metadata(&events).unwrap().len() > empty);
        let text = fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> = text.lines().map(|l| serde_json::from_str::<Line>(l).unwrap().step).collect();
        assert_eq!(steps, [10, 20, 30]);
        let last = text.lines().last().unwrap();
        assert_eq!(serde_json::from_str::<Line>(last).unwrap(), line(30));
        assert!(last.contains("\"mfu\":0.25"), "{last}");
    }
}
