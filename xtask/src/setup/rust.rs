//! The wasm target of the compiler, and the tools that cargo installs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::places::{Places, executable, on_path, remove_folder, replace_folder};
use crate::report::Report;
use crate::run::Program;

const TARGET: &str = "wasm32-unknown-unknown";

/// The standard library for wasm: already in the sysroot, or through rustup.
pub(crate) fn ensure_wasm_target(report: &mut Report) -> Result<()> {
    report.ensure(
        &format!("{TARGET} target"),
        "the standard library the page is compiled against, from rustup",
        || Ok(has_target()?.then(|| "in the compiler's sysroot".to_owned())),
        || {
            let go_on = format!(
                "install the {TARGET} target of this compiler by hand and run the same command again"
            );
            if on_path("rustup").is_none() {
                bail!("the compiler lacks the {TARGET} target and there is no rustup to add it, so {go_on}");
            }
            let added = Program::new("rustup").args(["target", "add", TARGET]).run();
            added.with_context(|| format!("rustup could not add the {TARGET} target, so {go_on}"))?;
            if !has_target()? {
                bail!("rustup added the {TARGET} target to another toolchain than cargo uses, so {go_on}");
            }
            Ok("added".to_owned())
        },
    )
}

fn has_target() -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = Program::new(rustc)
        .args(["--print", "sysroot"])
        .capture()
        .context("there is no working rustc, so install Rust with rustup and run the same command again")?;
    let folder = Path::new(sysroot.trim()).join("lib").join("rustlib").join(TARGET).join("lib");
    let Ok(entries) = fs::read_dir(folder) else { return Ok(false) };
    Ok(entries.filter_map(Result::ok).any(|e| e.file_name().to_string_lossy().starts_with("libstd-")))
}

/// A program that `cargo install` builds, fixed to one version.
#[derive(Debug)]
pub(crate) struct Tool {
    package: &'static str,
    binary: &'static str,
    version: String,
    /// Whether to build with the dependency versions its author locked.
    locked: bool,
    why: &'static str,
}

impl Tool {
    /// Trunk, which builds the page.
    pub(crate) fn trunk(version: &str) -> Self {
        let why = "builds the page; compiling it takes about ten processor-minutes, once";
        Self { package: "trunk", binary: "trunk", version: version.to_owned(), locked: true, why }
    }

    /// The wasm-bindgen program, which must be of exactly the library's version.
    pub(crate) fn wasm_bindgen(version: &str) -> Self {
        let why = "writes the page's JavaScript side; compiling it takes about four processor-minutes, once";
        // Not locked: its lock file names a dependency version that registries no longer carry.
        Self {
            package: "wasm-bindgen-cli",
            binary: "wasm-bindgen",
            version: version.to_owned(),
            locked: false,
            why,
        }
    }

    /// Whether this program runs and is of the right version (`trunk 0.21.14`, `wasm-bindgen 0.2.130 (…)`).
    fn is_at(&self, program: &Path) -> bool {
        let printed = Program::new(program).arg("--version").capture();
        printed.is_ok_and(|text| text.split_whitespace().nth(1) == Some(self.version.as_str()))
    }
}

/// Makes sure of a tool and returns the folder it is in: one of `PATH`, or the cache's.
pub(crate) fn ensure_tool(places: &Places, report: &mut Report, tool: &Tool) -> Result<PathBuf> {
    let root = places.tool(tool.package, &tool.version);
    let cached = root.join("bin").join(executable(tool.binary));
    let present = [Some(cached.clone()), on_path(tool.binary)].into_iter().flatten().find(|p| tool.is_at(p));
    let folder = present.as_ref().unwrap_or(&cached).parent().map(Path::to_owned);
    report.ensure(
        &format!("{} {}", tool.package, tool.version),
        tool.why,
        || Ok(present.map(|path| path.display().to_string())),
        || {
            install(places, tool, &root).with_context(|| {
                format!(
                    "could not install {} {}, so check that cargo can reach its registry (the lines above say what \
                     went wrong) and run the same command again",
                    tool.package, tool.version
                )
            })?;
            if !tool.is_at(&cached) {
                bail!("{} was installed but does not run, so remove {} and try again", cached.display(), root.display());
            }
            Ok(cached.display().to_string())
        },
    )?;
    folder.with_context(|| format!("{} has no folder", cached.display()))
}

/// Builds in the cache, away from this workspace: its flags, its lock file and its build folder must not mix in.
fn install(places: &Places, tool: &Tool, root: &Path) -> Result<()> {
    let build = places.cache.join("build").join(format!("{}-{}", tool.package, tool.version));
    fs::create_dir_all(&build).with_context(|| format!("cannot create {}", build.display()))?;
    replace_folder(root, |work| {
        let locked = if tool.locked { &["--locked"][..] } else { &[] };
        Program::cargo()
            .without_build_settings()
            .args(["install", tool.package, "--version", &tool.version])
            .args(locked)
            .arg("--root")
            .arg(work)
            // The list of installed programs is cargo's own affair and of no use in a folder that holds one.
            .arg("--no-track")
            .env("CARGO_TARGET_DIR", &build)
            .current_dir(&places.cache)
            .run()
    })?;
    // An interrupted build keeps this folder and goes on from it; a finished one has no use for it.
    remove_folder(&build)
}
