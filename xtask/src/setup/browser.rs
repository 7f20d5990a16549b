//! What the tests look through: a Chromium-family browser, and a Vulkan driver that needs no GPU.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::system::ensure_packages;
use crate::places::on_path;
use crate::report::Report;
use crate::run::Program;

/// The environment variable that names the browser to test in.
pub(crate) const BROWSER_VARIABLE: &str = "CHROMIUM";

/// A browser of the Chromium family: named by `CHROMIUM`, found, or Debian's.
pub(crate) fn ensure_chromium(report: &mut Report) -> Result<PathBuf> {
    let mut found = chromium();
    let present = found.clone();
    report.ensure(
        "Chromium",
        "the browser tests run in it, without a window",
        || Ok(present.map(|path| path.display().to_string())),
        || {
            let elsewhere = format!("install Chromium or Chrome (or name one in {BROWSER_VARIABLE})");
            ensure_packages(&["chromium"], "Chromium", &elsewhere)?;
            found = chromium();
            let path = found.as_ref().with_context(|| {
                format!("the system's chromium package gave no browser that runs, so {elsewhere} and run the same command again")
            })?;
            Ok(path.display().to_string())
        },
    )?;
    found.context("no browser was found")
}

fn chromium() -> Option<PathBuf> {
    let named = env::var_os(BROWSER_VARIABLE).map(PathBuf::from);
    let on_path = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
        .into_iter()
        .filter_map(on_path);
    let applications = [
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
    ]
    .into_iter()
    .map(PathBuf::from)
    .filter(|p| p.is_file());
    // Some distributions ship a `chromium` that only says where to get one: it must answer.
    let runs = |path: &PathBuf| Program::new(path).arg("--version").capture().is_ok();
    named.into_iter().chain(on_path).chain(applications).find(runs)
}

/// A Vulkan driver: any that is installed, else Mesa's software one.
pub(crate) fn ensure_vulkan(report: &mut Report) -> Result<()> {
    report.ensure(
        "Vulkan driver",
        "the shader tests run on it; Mesa's needs no GPU",
        || Ok(vulkan_driver()),
        || {
            ensure_packages(
                &["mesa-vulkan-drivers"],
                "a Vulkan driver",
                "install one (Mesa's lavapipe runs without a GPU; MoltenVK on a Mac)",
            )?;
            vulkan_driver().context("the installed package brought no Vulkan driver, so install one by hand and run the same command again")
        },
    )
}

fn vulkan_driver() -> Option<String> {
    if cfg!(windows) {
        return Some("the system's".to_owned());
    }
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].into_iter().find_map(|name| env::var(name).ok());
    if named.is_some() {
        return named;
    }
    let data = env::var_os("XDG_DATA_HOME").map(PathBuf::from).into_iter();
    let folders = ["/usr/share", "/usr/local/share", "/etc", "/opt/homebrew/share"]
        .into_iter()
        .map(PathBuf::from)
        .chain(data);
    let mut drivers: Vec<PathBuf> = folders
        .filter_map(|folder| fs::read_dir(folder.join("vulkan").join("icd.d")).ok())
        .flat_map(|entries| entries.filter_map(Result::ok).map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    // The software driver first: it is the one that works on every machine.
    drivers.sort_by_key(|path| !path.to_string_lossy().contains("lvp"));
    drivers.first().map(|path| path.display().to_string())
}
