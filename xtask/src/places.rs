//! Where things are: the workspace, its build folder, and the per-user cache.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run::Program;

/// The environment variable that moves the cache.
pub(crate) const CACHE_VARIABLE: &str = "STRATASCOPE_CACHE";

/// The folders every command works with; all absolute.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// The workspace root: the folder of the top `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's build folder, wherever the user's configuration puts it.
    pub(crate) target: PathBuf,
    /// Tools, models and texts, keyed by name and version.
    pub(crate) cache: PathBuf,
}

impl Places {
    /// Asks cargo for the workspace and the environment for the cache.
    pub(crate) fn find() -> Result<Self> {
        let here = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let metadata = Program::cargo()
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(&here)
            .capture()
            .context("cargo metadata failed, so run this inside the Stratascope checkout")?;
        let metadata: serde_json::Value =
            serde_json::from_str(&metadata).context("cargo metadata did not print JSON")?;
        let folder = |key: &str| {
            let text = metadata.get(key).and_then(|v| v.as_str());
            text.map(PathBuf::from).with_context(|| format!("cargo metadata names no {key}"))
        };
        Ok(Self {
            root: folder("workspace_root")?,
            target: folder("target_directory")?,
            cache: cache_folder()?,
        })
    }

    /// `tools/NAME-VERSION` in the cache.
    pub(crate) fn tool(&self, name: &str, version: &str) -> PathBuf {
        self.cache.join("tools").join(format!("{name}-{version}"))
    }

    /// The native binary of a cargo profile folder (`debug` or `release`).
    pub(crate) fn binary(&self, profile: &str) -> PathBuf {
        self.target.join(profile).join(executable("stratascope"))
    }

    /// The version Cargo.lock fixes for a crate.
    pub(crate) fn locked_version(&self, name: &str) -> Result<String> {
        let path = self.root.join("Cargo.lock");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}, so restore it from version control", path.display()))?;
        locked_version(&text, name)
    }
}

fn locked_version(lock: &str, name: &str) -> Result<String> {
    let lock: toml::Table =
        lock.parse().context("Cargo.lock is not valid TOML, so restore it from version control")?;
    let packages = lock.get("package").and_then(|p| p.as_array()).context("Cargo.lock lists no packages")?;
    let field =
        |package: &toml::Value, key: &str| package.get(key).and_then(|v| v.as_str()).map(str::to_owned);
    let found: Vec<String> = packages
        .iter()
        .filter(|p| field(p, "name").as_deref() == Some(name))
        .filter_map(|p| field(p, "version"))
        .collect();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        several => bail!("Cargo.lock should hold {name} once but holds it {} times", several.len()),
    }
}

fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(folder) = variable(CACHE_VARIABLE) {
        return std::path::absolute(&folder)
            .with_context(|| format!("{CACHE_VARIABLE} is not a usable path"));
    }
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library").join("Caches"))
    } else {
        variable("XDG_CACHE_HOME")
            .filter(|p| p.is_absolute())
            .or_else(|| Some(variable("HOME")?.join(".cache")))
    };
    let base =
        base.with_context(|| format!("no home folder is known here, so set {CACHE_VARIABLE} to a folder"))?;
    Ok(base.join("stratascope"))
}

/// The file name of a program on this platform.
pub(crate) fn executable(name: &str) -> String {
    format!("{name}{}", env::consts::EXE_SUFFIX)
}

/// The first file called `name` in a folder of `PATH`.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let paths = env::var_os("PATH")?;
    // npm and npx are scripts on Windows, with their own extension.
    let names = if cfg!(windows) {
        vec![format!("{name}.exe"), format!("{name}.cmd")]
    } else {
        vec![name.to_owned()]
    };
    env::split_paths(&paths)
        .flat_map(|dir| names.iter().map(move |n| dir.join(n)).collect::<Vec<_>>())
        .find(|p| p.is_file())
}

/// A sibling of `path` that no finished thing is ever called: work goes there and is renamed when whole.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    path.with_file_name(format!(".partial-{name}"))
}

/// Makes an empty [`partial`] sibling of `path`, fills it with `fill`, and renames it to `path`.
///
/// Whatever was at `path` is replaced; a failure or an interruption leaves `path` as it was.
pub(crate) fn replace_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let work = partial(path);
    remove_folder(&work)?;
    fs::create_dir_all(&work)
        .with_context(|| format!("cannot create {}, so check permissions and space", work.display()))?;
    if let Err(error) = fill(&work) {
        // Half a download is of no use; that it cannot be removed matters less than why it stopped.
        let _ = fs::remove_dir_all(&work);
        return Err(error);
    }
    remove_folder(path)?;
    fs::rename(&work, path).with_context(|| format!("cannot move the finished folder to {}", path.display()))
}

/// Removes a folder and all in it; a missing one is fine.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}, so remove it by hand", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_file_gives_the_one_version_or_an_error() {
        let lock = "[[package]]\nname = \"a\"\nversion = \"1.2.3\"\n[[package]]\nname = \"b\"\nversion = \"1\"\n[[package]]\nname = \"b\"\nversion = \"2\"\n";
        assert_eq!(locked_version(lock, "a").unwrap(), "1.2.3");
        assert!(locked_version(lock, "b").unwrap_err().to_string().contains("2 times"));
        assert!(locked_version(lock, "c").unwrap_err().to_string().contains("0 times"));
    }

    #[test]
    fn a_failed_fill_leaves_the_old_folder() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("thing");
        replace_folder(&path, |work| Ok(fs::write(work.join("a"), "old")?)).unwrap();
        assert!(
            replace_folder(&path, |work| {
                fs::write(work.join("a"), "new")?;
                bail!("interrupted")
            })
            .is_err()
        );
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "old");
        replace_folder(&path, |work| Ok(fs::write(work.join("b"), "new")?)).unwrap();
        assert!(!path.join("a").exists() && path.join("b").exists() && !partial(&path).exists());
    }
}
