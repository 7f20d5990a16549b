//! Every kernel compiles for every architecture that is named, and keeps everything in registers.

use native::cuda::libraries::Libraries;
use native::cuda::{Kernel, Shape, nvrtc};

/// Set where the compiler must be there: the project's own test command installs it.
const REQUIRED: &str = "STRATASCOPE_REQUIRE_NVRTC";
/// A100, H100 and H200, B200.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

fn present() -> bool {
    let found = Libraries::find();
    assert!(
        found.nvrtc.is_some() || std::env::var_os(REQUIRED).is_none(),
        "libnvrtc was to be there, but was not found in {:?}",
        found.tried
    );
    found.nvrtc.is_some()
}

fn files() -> Vec<(&'static str, &'static str)> {
    let mut files: Vec<_> = Kernel::ALL.iter().map(|kernel| (kernel.file(), kernel.source())).collect();
    files.dedup();
    files
}

#[test]
fn every_kernel_compiles_and_nothing_spills() {
    if !present() {
        return;
    }
    // Gemma 2 2B, Gemma 2 27B, SmolLM2, a transcoder, and the smallest.
    let shapes = [(2304, 2304), (4608, 4608), (576, 576), (640, 2304), (1, 1)];
    for architecture in ARCHITECTURES {
        for (d_in, d_out) in shapes {
            let mut seen = Vec::new();
            for (file, source) in files() {
                let found = nvrtc::resources(file, source, Shape::new(d_in, d_out), architecture).unwrap();
                for kernel in found {
                    let name = format!("{} for {architecture}, {d_in} x {d_out}", kernel.entry);
                    println!(
                        "{name}: {} registers, {} bytes of shared memory",
                        kernel.registers, kernel.shared
                    );
                    assert_eq!(kernel.spilled, 0, "{name} spills");
                    assert!(kernel.registers > 0 && kernel.registers <= 255, "{name}: {kernel:?}");
                    assert!(kernel.shared <= 48 << 10, "{name}: {kernel:?}");
                    seen.push(kernel.entry);
                }
            }
            let wanted: Vec<&str> = Kernel::ALL.iter().map(|kernel| kernel.entry()).collect();
            seen.sort_unstable();
            let mut sorted = wanted.clone();
            sorted.sort_unstable();
            assert_eq!(seen, sorted, "{architecture}");
        }
    }
}

#[test]
fn compiled_code_is_kept_and_what_does_not_compile_says_where() {
    if !present() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (file, source) = (Kernel::Center.file(), Kernel::Center.source());
    let compile = |source: &str, shape: Shape, architecture: &str| {
        nvrtc::cubin(file, source, shape, architecture, Some(folder.path()))
    };
    let kept = || std::fs::read_dir(folder.path()).unwrap().count();
    let shape = Shape::new(8, 8);
    let code = compile(source, shape, "sm_80").unwrap();
    assert_eq!((compile(source, shape, "sm_80").unwrap() == code, kept()), (true, 1));
    compile(source, Shape::new(8, 9), "sm_80").unwrap();
    compile(source, shape, "sm_90a").unwrap();
    assert_eq!(kept(), 3);
    // A damaged file is compiled again.
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        std::fs::write(entry.unwrap().path(), "nothing").unwrap();
    }
    assert_eq!(compile(source, shape, "sm_80").unwrap(), code);
    let error = format!("{:#}", compile("int broken(", shape, "sm_80").unwrap_err());
    assert!(error.contains("center.cu(") && error.contains("error"), "{error}");
}
