//! Whether a stage of the demo is finished, may go on, or must start over.
//!
//! A stage's key is a digest of everything it depends on: the keys of the stages before it, its inputs, its options and
//! the project's version. The key is written to `KEY.started` before the stage and to `KEY.done` after it. The program's
//! own code is not part of the key: a stage is minutes of work, and whoever changes the code says `--from STAGE`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::digest;
use crate::places::remove_folder;
use crate::report::Report;
use crate::run::Program;

/// The stages of one run, in order.
pub(crate) struct Stages<'a> {
    folder: PathBuf,
    report: &'a mut Report,
    /// The key of the stage before.
    key: String,
}

impl<'a> Stages<'a> {
    /// Stages that keep their notes in `work/stages`.
    pub(crate) fn new(work: &Path, report: &'a mut Report) -> Self {
        Self { folder: work.join("stages"), report, key: env!("CARGO_PKG_VERSION").to_owned() }
    }

    /// Runs `program` unless a run with the same key is finished and `out` is there.
    ///
    /// An unfinished run with the same key goes on in `out`; any other `out` is removed first, as it is with `redo`.
    pub(crate) fn run(
        &mut self,
        name: &str,
        why: &str,
        out: &Path,
        redo: bool,
        inputs: &[&str],
        program: Program,
    ) -> Result<()> {
        self.key =
            digest::of_bytes(format!("{}\n{name}\n{program}\n{}", self.key, inputs.join("\n")).as_bytes());
        let notes = Notes { folder: &self.folder, name, key: &self.key };
        self.report.ensure(
            name,
            why,
            || {
                Ok((!redo && notes.is_done() && out.exists())
                    .then(|| format!("finished earlier; `--from {name}` does it again")))
            },
            || {
                if redo || !notes.is_started() {
                    remove_folder(out)?;
                }
                notes.start()?;
                program.run().with_context(|| {
                    format!("the stage `{name}` did not finish, so see its message above")
                })?;
                notes.finish()?;
                Ok(out.display().to_string())
            },
        )
    }
}

/// The two files that say how far a stage is.
struct Notes<'a> {
    folder: &'a Path,
    name: &'a str,
    key: &'a str,
}

impl Notes<'_> {
    fn path(&self, suffix: &str) -> PathBuf {
        self.folder.join(format!("{}.{suffix}", self.name))
    }

    fn holds(&self, suffix: &str) -> bool {
        fs::read_to_string(self.path(suffix)).is_ok_and(|text| text == self.key)
    }

    fn is_started(&self) -> bool {
        self.holds("started")
    }

    fn is_done(&self) -> bool {
        self.is_started() && self.holds("done")
    }

    fn write(&self, suffix: &str) -> Result<()> {
        let path = self.path(suffix);
        fs::create_dir_all(self.folder)
            .and_then(|()| fs::write(&path, self.key))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn start(&self) -> Result<()> {
        match fs::remove_file(self.path("done")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", self.path("done").display()));
            }
            _ => {}
        }
        self.write("started")
    }

    fn finish(&self) -> Result<()> {
        self.write("done")
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    /// Runs two stages; the second appends a line to its file, so that its runs can be counted.
    fn two(work: &Path, input: &str, redo: bool, second: &str) -> Result<()> {
        let mut report = Report::new();
        let mut stages = Stages::new(work, &mut report);
        let out = work.join("a");
        stages.run("first", "", &out, false, &[input], Program::new("mkdir").arg("-p").arg(&out))?;
        let out = work.join("b");
        let script = format!("mkdir -p {0} && echo x >> {0}/runs && {second}", out.display());
        // The script is the same in every run of a test; what differs is told by a file.
        stages.run("second", "", &out, redo, &[], Program::new("sh").args(["-c", &script]))
    }

    fn runs(work: &Path) -> usize {
        fs::read_to_string(work.join("b/runs")).unwrap().lines().count()
    }

    #[test]
    fn finished_stages_are_skipped_until_something_before_them_changes() {
        let work = tempfile::tempdir().unwrap();
        let work = work.path();
        two(work, "x", false, "true").unwrap();
        fs::write(work.join("b/mark"), "").unwrap();
        two(work, "x", false, "true").unwrap();
        assert!(runs(work) == 1 && work.join("b/mark").exists());
        two(work, "y", false, "true").unwrap();
        assert!(!work.join("b/mark").exists(), "another input upstream starts it over");
        fs::write(work.join("b/mark"), "").unwrap();
        two(work, "y", true, "true").unwrap();
        assert!(!work.join("b/mark").exists(), "asked for again, it starts over");
        fs::remove_dir_all(work.join("b")).unwrap();
        two(work, "y", false, "true").unwrap();
        assert_eq!(runs(work), 1, "a lost result is made again");
    }

    #[test]
    fn an_unfinished_stage_goes_on_where_it_was() {
        let work = tempfile::tempdir().unwrap();
        let work = work.path();
        let script = format!("test -e {}", work.join("ready").display());
        assert!(two(work, "x", false, &script).is_err());
        assert!(two(work, "x", false, &script).is_err());
        assert_eq!(runs(work), 2, "its folder was kept");
        fs::write(work.join("ready"), "").unwrap();
        two(work, "x", false, &script).unwrap();
        two(work, "x", false, &script).unwrap();
        assert_eq!(runs(work), 3);
    }
}
