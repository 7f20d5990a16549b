//! Brings what a fresh machine lacks: the wasm target, the web tools, and for tests a browser and a software GPU driver.
//!
//! Every step first looks whether it is done already. Tools go into the cache; the rest of the machine is only touched
//! through rustup and, when root on a Debian-like system, through its package manager.

mod browser;
mod npm;
mod python;
mod rust;
mod system;

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;

use crate::lock::Lock;
use crate::places::Places;
use crate::report::Report;

pub(crate) use npm::require_npm;
pub(crate) use python::{unpack, with_pip};

/// Trunk builds the page; later versions need a newer compiler than `rust-toolchain.toml` names.
const TRUNK: &str = "0.21.14";
/// The npm package with a `wasm-opt` that understands what this compiler writes.
const BINARYEN: &str = "132.0.0";

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to set up for.
    #[arg(long = "for", value_enum, default_value = "test")]
    pub(crate) purpose: Purpose,
}

/// What the machine is set up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// The demo: the wasm target, Trunk, wasm-bindgen and wasm-opt.
    Demo,
    /// The tests: all of the demo's tools, and Chromium, a Vulkan driver, the packages of the browser tests, a C++ compiler and NVRTC.
    Test,
    /// The tests without the browser ones.
    TestWithoutBrowser,
}

/// The tools a finished set-up leaves behind.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// Folders to put before the others of `PATH` when building the page.
    pub(crate) path: Vec<PathBuf>,
    /// The folder of NVIDIA's run-time compiler, for tests, where it exists.
    pub(crate) nvrtc: Option<PathBuf>,
    /// The browser, for [`Purpose::Test`].
    pub(crate) chromium: Option<PathBuf>,
}

/// Sets the machine up, printing one line a step.
pub(crate) fn run(places: &Places, purpose: Purpose, report: &mut Report) -> Result<Tools> {
    report.heading("Set-up");
    let _lock = Lock::take(&places.cache)?;
    // What may end in a sentence for the user comes before what takes minutes.
    rust::ensure_wasm_target(report)?;
    npm::ensure_node(report)?;
    let (mut chromium, mut nvrtc) = (None, None);
    if purpose != Purpose::Demo {
        python::ensure_cpp(report)?;
        nvrtc = python::ensure_nvrtc(places, report)?;
        browser::ensure_vulkan(report)?;
    }
    if purpose == Purpose::Test {
        chromium = Some(browser::ensure_chromium(report)?);
        npm::ensure_browser_tests(places, report)?;
    }
    let path = vec![
        rust::ensure_tool(places, report, &rust::Tool::trunk(TRUNK))?,
        rust::ensure_tool(
            places,
            report,
            &rust::Tool::wasm_bindgen(&places.locked_version("wasm-bindgen")?),
        )?,
        npm::ensure_wasm_opt(places, report, BINARYEN)?,
    ];
    Ok(Tools { path, nvrtc, chromium })
}
