//! Node, and what comes through npm: wasm-opt and the packages of the browser tests.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::system::ensure_packages;
use crate::digest;
use crate::places::{Places, on_path, replace_folder};
use crate::report::Report;
use crate::run::Program;

/// The oldest Node whose language the scripts use.
const NODE_MAJOR: u32 = 18;

/// Node and npm: there already, or Debian's.
pub(crate) fn ensure_node(report: &mut Report) -> Result<()> {
    report.ensure(
        "Node",
        "runs wasm-opt and the browser tests, and npm fetches them",
        || Ok(node_version().filter(|_| on_path("npm").is_some())),
        || {
            ensure_packages(
                &["nodejs", "npm"],
                "Node with npm",
                &format!("install Node {NODE_MAJOR} or later"),
            )?;
            node_version().context(
                "the system's Node is too old, so install Node 18 or later and run the same command again",
            )
        },
    )
}

fn node_version() -> Option<String> {
    let printed = Program::new(on_path("node")?).arg("--version").capture().ok()?;
    let version = printed.trim().trim_start_matches('v');
    let major: u32 = version.split('.').next()?.parse().ok()?;
    (major >= NODE_MAJOR).then(|| version.to_owned())
}

/// The path of npm, or a sentence.
pub(crate) fn require_npm() -> Result<PathBuf> {
    on_path("npm").context("npm is not on PATH, so install Node with npm and run the same command again")
}

/// `wasm-opt` from the npm package `binaryen`; returns the folder to put on `PATH`.
pub(crate) fn ensure_wasm_opt(places: &Places, report: &mut Report, version: &str) -> Result<PathBuf> {
    let root = places.tool("binaryen", version);
    let bin = root.join("node_modules").join(".bin");
    let major = version.split('.').next().unwrap_or(version).to_owned();
    let present =
        [on_path("wasm-opt"), in_folder(&bin)].into_iter().flatten().find(|p| is_wasm_opt(p, &major));
    let folder = present.as_deref().and_then(Path::parent).map_or_else(|| bin.clone(), Path::to_owned);
    report.ensure(
        &format!("wasm-opt {major}"),
        "makes the page's code about a quarter smaller; the npm package `binaryen`",
        || Ok(present.map(|path| path.display().to_string())),
        || {
            let installed = replace_folder(&root, |work| {
                Program::new(require_npm()?)
                    .args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--prefix"])
                    .arg(work)
                    .arg(format!("binaryen@{version}"))
                    .current_dir(&places.cache)
                    .run()
            });
            installed.with_context(|| {
                format!("npm could not install binaryen {version}, so check that npm reaches its registry and run the same command again")
            })?;
            if !in_folder(&bin).is_some_and(|p| is_wasm_opt(&p, &major)) {
                bail!("the installed wasm-opt does not run, so remove {} and run the same command again", root.display());
            }
            Ok(bin.display().to_string())
        },
    )?;
    Ok(folder)
}

fn in_folder(bin: &Path) -> Option<PathBuf> {
    [bin.join("wasm-opt"), bin.join("wasm-opt.cmd")].into_iter().find(|p| p.exists())
}

/// `wasm-opt version 132 (version_132)`.
fn is_wasm_opt(program: &Path, major: &str) -> bool {
    let printed = Program::new(program).arg("--version").capture();
    printed.is_ok_and(|text| text.split_whitespace().nth(2) == Some(major))
}

/// The packages of `tests/browser`, exactly as its lock file names them.
pub(crate) fn ensure_browser_tests(places: &Places, report: &mut Report) -> Result<()> {
    let folder = places.root.join("tests").join("browser");
    let lock = folder.join("package-lock.json");
    let digest = digest::of_file(&lock)?;
    // Written last: a folder of packages without it is a leftover of an interrupted installation.
    let stamp = folder.join("node_modules").join(".stratascope-lock");
    report.ensure(
        "packages of the browser tests",
        "the browser driver and the accessibility checker, as locked in tests/browser",
        || Ok(fs::read_to_string(&stamp).is_ok_and(|text| text == digest).then(|| "as locked".to_owned())),
        || {
            Program::new(require_npm()?)
                .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
                .current_dir(&folder)
                .run()
                .context("npm could not install the packages of tests/browser, so check that npm reaches its registry and run the same command again")?;
            fs::write(&stamp, &digest).with_context(|| format!("cannot write {}", stamp.display()))?;
            Ok("installed in tests/browser/node_modules".to_owned())
        },
    )
}
