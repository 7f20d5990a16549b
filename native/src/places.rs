//! Folders of the user that outlive one run: what may be thrown away and made again.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The environment variable that moves the cache.
pub const CACHE_VARIABLE: &str = "STRATASCOPE_CACHE";

/// A variable of the environment that holds a path; an empty one counts as unset.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder of everything this program keeps for later runs; it need not exist yet.
///
/// # Errors
/// If the machine knows no home folder and `STRATASCOPE_CACHE` is not set.
pub fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = variable(CACHE_VARIABLE) {
        return std::path::absolute(&folder)
            .with_context(|| format!("{CACHE_VARIABLE} is not a usable path"));
    }
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library").join("Caches"))
    } else {
        generic_cache()
    };
    let base =
        base.with_context(|| format!("no home folder is known here: set {CACHE_VARIABLE} to a folder"))?;
    Ok(base.join("stratascope"))
}

/// `XDG_CACHE_HOME`, else `~/.cache`.
pub(crate) fn generic_cache() -> Option<PathBuf> {
    let home = || variable("HOME").or_else(|| variable("USERPROFILE"));
    variable("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| Some(home()?.join(".cache")))
}
