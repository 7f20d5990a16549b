//! What this machine offers: processor, memory, disk, GPU or why none, and the tools of the page.
//!
//! Looks at files, runs only `--version`, and opens NVIDIA's libraries where they are there: nothing that could change anything.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use sysinfo::{Disks, System};

/// Everything found.
#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    /// Version of this program.
    pub version: &'static str,
    /// The processor.
    pub cpu: Cpu,
    /// Bytes of memory in all.
    pub memory_total: u64,
    /// Bytes of memory that can still be had.
    pub memory_available: u64,
    /// The disk that holds the current folder, when it can be told.
    pub disk: Option<Disk>,
    /// The GPU.
    pub gpu: Gpu,
    /// What training on a card needs.
    pub cuda: crate::cuda::found::Found,
    /// Tools that build and test the page.
    pub tools: Vec<Tool>,
}

/// The processor.
#[derive(Debug, Clone, Serialize)]
pub struct Cpu {
    /// Its own name for itself.
    pub model: String,
    /// Threads that can run at once.
    pub threads: usize,
    /// Instruction sets that fast paths use: name, and whether this processor has it.
    pub features: Vec<(&'static str, bool)>,
}

/// A disk.
#[derive(Debug, Clone, Serialize)]
pub struct Disk {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Bytes free.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

/// An NVIDIA GPU, or what is missing for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Whether driver, device and library are all there.
    pub usable: bool,
    /// Names of the GPUs that the driver lists.
    pub devices: Vec<String>,
    /// What was found or is missing, one sentence each.
    pub notes: Vec<String>,
}

/// A tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tool {
    /// Its command.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Where it was found.
    pub path: Option<PathBuf>,
    /// The first line it prints for `--version`.
    pub version: Option<String>,
}

const TOOLS: [(&str, &[&str], &str); 5] = [
    ("trunk", &["trunk"], "builds the page"),
    ("wasm-bindgen", &["wasm-bindgen"], "binds WebAssembly to JavaScript"),
    ("wasm-opt", &["wasm-opt"], "makes the page smaller"),
    ("chromium", &["chromium", "chromium-browser", "google-chrome"], "tests the page"),
    ("node", &["node"], "drives the page's tests"),
];

/// Looks at this machine.
#[must_use]
pub fn examine() -> Findings {
    let mut system = System::new();
    system.refresh_memory();
    Findings {
        version: env!("CARGO_PKG_VERSION"),
        cpu: cpu(),
        memory_total: system.total_memory(),
        memory_available: system.available_memory(),
        disk: env::current_dir().ok().and_then(|folder| disk_of(&folder)),
        gpu: gpu(Path::new("/")),
        cuda: crate::cuda::found::look(),
        tools: tools(),
    }
}

fn cpu() -> Cpu {
    let mut system = System::new();
    system.refresh_cpu_all();
    let model = system.cpus().first().map_or_else(String::new, |c| c.brand().trim().to_owned());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Cpu { model, threads, features: cpu_features() }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    use std::arch::is_x86_feature_detected as has;
    vec![
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avx512f", has!("avx512f")),
        ("avx512_bf16", has!("avx512bf16")),
        ("avx512_vnni", has!("avx512vnni")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![("neon", cfg!(target_feature = "neon"))]
}

/// The disk whose mount point is the longest prefix of `folder`.
fn disk_of(folder: &Path) -> Option<Disk> {
    let disks = Disks::new_with_refreshed_list();
    let on = disks.list().iter().filter(|d| folder.starts_with(d.mount_point()));
    let disk = on.max_by_key(|d| d.mount_point().as_os_str().len())?;
    Some(Disk {
        mount: disk.mount_point().to_owned(),
        free: disk.available_space(),
        total: disk.total_space(),
    })
}

/// Looks below `root` for the driver's files, the device nodes and the driver library.
fn gpu(root: &Path) -> Gpu {
    let mut notes = Vec::new();
    let driver = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
    match driver.as_deref().and_then(|t| t.lines().next()) {
        Some(line) => notes.push(format!("driver: {}", line.trim_start_matches("NVRM version:").trim())),
        None => notes.push("no NVIDIA kernel driver is loaded (/proc/driver/nvidia is absent)".to_owned()),
    }
    let devices = gpu_names(&root.join("proc/driver/nvidia/gpus"));
    let node = root.join("dev/nvidiactl").exists() && root.join("dev/nvidia0").exists();
    if !node {
        notes.push("no device node: /dev/nvidiactl and /dev/nvidia0 are needed (in a container, pass the GPU through)".to_owned());
    }
    let library = library(root);
    match &library {
        Some(path) => {
            notes.push(format!("driver library: /{}", path.strip_prefix(root).unwrap_or(path).display()));
        }
        None => notes.push("no libcuda.so.1 in the usual folders or LD_LIBRARY_PATH".to_owned()),
    }
    Gpu { usable: driver.is_some() && node && library.is_some(), devices, notes }
}

/// The `Model:` line of each GPU the driver lists.
fn gpu_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("information")).ok())
        .filter_map(|text| Some(text.lines().find_map(|l| l.strip_prefix("Model:"))?.trim().to_owned()))
        .collect();
    names.sort();
    names
}

fn library(root: &Path) -> Option<PathBuf> {
    let usual = [
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/aarch64-linux-gnu",
        "usr/lib64",
        "usr/lib",
        "usr/local/cuda/compat",
        "usr/lib/wsl/lib",
    ];
    let extra = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let extra: Vec<PathBuf> = env::split_paths(&extra).filter(|_| root == Path::new("/")).collect();
    usual.iter().map(|f| root.join(f)).chain(extra).map(|f| f.join("libcuda.so.1")).find(|f| f.exists())
}

fn tools() -> Vec<Tool> {
    let folders = search_folders();
    TOOLS
        .iter()
        .map(|&(name, commands, purpose)| {
            let path = commands.iter().find_map(|c| folders.iter().map(|f| f.join(c)).find(|p| p.is_file()));
            let version = path.as_deref().and_then(version_of);
            Tool { name, purpose, path, version }
        })
        .collect()
}

/// The folders of `PATH`, then those of tools that set-up put into the cache.
fn search_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("PATH").map(|p| env::split_paths(&p).collect()).unwrap_or_default();
    if let Some(cache) = cache_folder() {
        let mut tools: Vec<PathBuf> =
            fs::read_dir(cache.join("tools")).into_iter().flatten().flatten().map(|e| e.path()).collect();
        // The newest of several versions first, as far as names tell.
        tools.sort();
        for tool in tools.into_iter().rev() {
            folders.extend(["bin", "node_modules/.bin", ""].map(|inside| tool.join(inside)));
        }
    }
    folders
}

/// `$STRATASCOPE_CACHE`, else `stratascope` in the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("STRATASCOPE_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("stratascope")))
        .or_else(|| Some(set("HOME")?.join(".cache/stratascope")))
}

fn version_of(path: &Path) -> Option<String> {
    let output =
        Command::new(path).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(str::trim).find(|l| !l.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_usable_only_when_all_three_parts_are_there() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let none = gpu(root.path());
        assert!(!none.usable && none.notes.len() == 3 && none.devices.is_empty());
        put("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX 575.1\nGCC\n");
        put("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H100\nIRQ: 1\n");
        put("usr/lib64/libcuda.so.1", "");
        assert!(!gpu(root.path()).usable, "no device node");
        put("dev/nvidiactl", "");
        put("dev/nvidia0", "");
        let found = gpu(root.path());
        assert!(found.usable);
        assert_eq!(found.devices, ["NVIDIA H100"]);
        assert_eq!(found.notes, ["driver: NVIDIA UNIX 575.1", "driver library: /usr/lib64/libcuda.so.1"]);
    }

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let findings = examine();
        assert!(findings.cpu.threads > 0 && findings.memory_total > findings.memory_available / 2);
        assert_eq!(findings.tools.len(), TOOLS.len());
    }
}
