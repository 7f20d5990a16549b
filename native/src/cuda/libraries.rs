//! Finding the driver, the run-time compiler and the matrix library before anything is asked of them.
//!
//! Nothing of CUDA is linked. What is not there is found out here, by trying to open it: later calls would end the program. A
//! library of PyTorch's wheels is opened by its path, so that the loader knows it by its name from then on.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::Serialize;

/// A folder to look in first.
pub const FOLDER: &str = "STRATASCOPE_CUDA_LIBS";

/// What was found of CUDA, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Libraries {
    /// The driver, `libcuda`.
    pub driver: Option<PathBuf>,
    /// The run-time compiler, `libnvrtc`.
    pub nvrtc: Option<PathBuf>,
    /// The matrix library, `libcublasLt`.
    pub cublas_lt: Option<PathBuf>,
    /// Folders that were looked in after the places that the loader knows.
    pub tried: Vec<PathBuf>,
}

impl Libraries {
    /// Looks once, and opens what is there for the rest of the program.
    pub fn find() -> &'static Self {
        static FOUND: OnceLock<Libraries> = OnceLock::new();
        FOUND.get_or_init(look)
    }

    /// What is missing for training on a card, if anything.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        let all = [
            (&self.driver, "the driver, libcuda.so.1 (it comes with NVIDIA's driver)"),
            (
                &self.nvrtc,
                "the run-time compiler, libnvrtc.so.13 or .12 (of the CUDA toolkit, or of PyTorch's wheels)",
            ),
            (
                &self.cublas_lt,
                "the matrix library, libcublasLt.so.13 or .12 (of the CUDA toolkit, or of PyTorch's wheels)",
            ),
        ];
        let missing: Vec<&str> =
            all.into_iter().filter(|(found, _)| found.is_none()).map(|(_, what)| what).collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn look() -> Libraries {
    Libraries::default()
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn look() -> Libraries {
    let tried = folders();
    let find = |names: &[&str]| open::first(names, &tried);
    let driver = find(&["libcuda.so.1", "libcuda.so"]);
    // The compiler opens its built-in functions by a name that must be known by then.
    let nvrtc = find(&["libnvrtc.so.13", "libnvrtc.so.12"]);
    if let Some(folder) = nvrtc.as_deref().and_then(Path::parent) {
        open::all_like(folder, "libnvrtc-builtins.so");
    }
    let cublas_lt = find(&["libcublasLt.so.13", "libcublasLt.so.12"]);
    Libraries { driver, nvrtc, cublas_lt, tried }
}

/// Folders that may hold them: the one named, those of a toolkit, and those of the wheels of every Python in the path.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = env::var_os(FOLDER).map(PathBuf::from).into_iter().collect();
    for home in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os) {
        folders.extend(["lib64", "lib"].map(|lib| Path::new(&home).join(lib)));
    }
    folders.push("/usr/local/cuda/lib64".into());
    let path = env::var_os("PATH").unwrap_or_default();
    for entry in env::split_paths(&path) {
        let Some(lib) = entry.parent().map(|prefix| prefix.join("lib")) else { continue };
        for python in children(&lib, "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                folders.extend(["cu13", "cuda_nvrtc", "cublas"].map(|name| nvidia.join(name).join("lib")));
            }
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders.dedup();
    folders
}

fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let named =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    found.retain(named);
    found.sort_unstable();
    found
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod open {
    #![expect(unsafe_code, reason = "opening a library runs what it does at its start")]

    use std::path::{Path, PathBuf};

    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

    /// Opens the first of `names` that can be: where the loader looks, then in `folders`. It stays open.
    pub(super) fn first(names: &[&str], folders: &[PathBuf]) -> Option<PathBuf> {
        let known = names.iter().map(PathBuf::from);
        let below = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
        // What is named by hand comes first.
        let by_hand = std::env::var_os(super::FOLDER).map(PathBuf::from);
        let (first, rest): (Vec<_>, Vec<_>) =
            below.partition(|path| by_hand.as_deref().is_some_and(|folder| path.starts_with(folder)));
        first.into_iter().chain(known).chain(rest).find(|path| open(path))
    }

    /// Opens every library of `folder` whose name begins with `prefix`.
    pub(super) fn all_like(folder: &Path, prefix: &str) {
        for path in super::children(folder, prefix) {
            open(&path);
        }
    }

    fn open(path: &Path) -> bool {
        // SAFETY: these are NVIDIA's libraries, whose start only sets up their own state; nothing of them is called here.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
        library.map(std::mem::forget).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let none = Libraries::default().missing().unwrap();
        assert!(none.contains("libcuda") && none.contains("libnvrtc") && none.contains("libcublasLt"));
        let all = Some(PathBuf::from("x"));
        let found = Libraries { driver: all.clone(), nvrtc: all.clone(), cublas_lt: all, tried: vec![] };
        assert_eq!(found.missing(), None);
    }

    #[test]
    fn looking_never_ends_the_program() {
        let found = Libraries::find();
        assert!(std::ptr::eq(found, Libraries::find()));
    }
}
