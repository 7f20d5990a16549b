//! Compiling kernels for a card: NVRTC from source to machine code, kept on disk by source, architecture and compiler.

#![expect(unsafe_code, reason = "calls into the run-time compiler")]

use std::ffi::CString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cudarc::nvrtc::{result, sys};

use super::kernels::{PRELUDE, Shape};
use super::libraries::Libraries;
use crate::files;

/// The compiler's version, major and minor.
///
/// # Errors
/// If it is not there.
pub fn version() -> Result<(i32, i32)> {
    check()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; both addresses are of live integers.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result()?;
    Ok((major, minor))
}

fn check() -> Result<()> {
    let libraries = Libraries::find();
    ensure!(
        libraries.nvrtc.is_some(),
        "kernels are compiled by libnvrtc, which was not found (searched after the loader's places: {:?})",
        libraries.tried
    );
    Ok(())
}

/// The source of `file` for `shape`.
fn source(text: &str, shape: Shape) -> String {
    let defines = shape.defines().map(|(name, value)| format!("#define {name} {value}\n")).concat();
    format!("{defines}{PRELUDE}\n{text}")
}

/// Machine code of the kernels of `file`, whose source is `text`, for `shape` on an architecture such as `sm_90a`: from `cache`, or
/// compiled now.
///
/// # Errors
/// If the compiler is not there, or refuses the source: then with its messages.
pub fn cubin(
    file: &str,
    text: &str,
    shape: Shape,
    architecture: &str,
    cache: Option<&Path>,
) -> Result<Vec<u8>> {
    let (major, minor) = version()?;
    let source = source(text, shape);
    let key = files::sha256(format!("{major}.{minor} {architecture}\n{source}").as_bytes());
    let path: Option<PathBuf> = cache.map(|cache| cache.join(format!("{key}.cubin")));
    if let Some(found) =
        path.as_deref().and_then(|path| std::fs::read(path).ok()).filter(|code| is_cubin(code))
    {
        return Ok(found);
    }
    let (code, _) = compile(file, &source, architecture, &[])?;
    if let Some(path) = path
        && let Err(error) = files::write_bytes(&path, &code)
    {
        tracing::debug!("{file} is compiled anew every time: {error:#}");
    }
    Ok(code)
}

/// Whether these bytes are an ELF file for a card.
fn is_cubin(code: &[u8]) -> bool {
    const CUDA: u16 = 190;
    code.starts_with(b"\x7fELF") && code.get(18..20) == Some(&CUDA.to_le_bytes()[..])
}

/// What a kernel takes of a card, as the assembler says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its function.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread that did not fit registers and are kept in memory.
    pub spilled: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// What the kernels of `file` take on an architecture.
///
/// # Errors
/// As [`cubin`].
pub fn resources(file: &str, text: &str, shape: Shape, architecture: &str) -> Result<Vec<Resources>> {
    version()?;
    let (_, log) = compile(file, &source(text, shape), architecture, &["--ptxas-options=-v"])?;
    Ok(parse(&log))
}

/// Reads the assembler's report: for each function a line with its name, one with spills, one with registers and memory.
fn parse(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    let before = |line: &str, what: &str| -> Option<u32> {
        line.split(what).next()?.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
    };
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Resources { entry, registers: 0, spilled: 0, shared: 0 });
        }
        let Some(last) = all.last_mut() else { continue };
        if line.contains(" bytes spill stores") {
            last.spilled = before(line, " bytes spill stores").unwrap_or(0);
        }
        if line.contains(" registers") {
            last.registers = before(line, " registers").unwrap_or(0);
            last.shared = before(line, " bytes smem").unwrap_or(0);
        }
    }
    all
}

/// Machine code of a source, and what the compiler said.
fn compile(file: &str, source: &str, architecture: &str, more: &[&str]) -> Result<(Vec<u8>, String)> {
    let what = || format!("cannot compile {file} for {architecture}");
    let (text, name) = (CString::new(source)?, CString::new(file)?);
    let program = result::create_program(&text, Some(&name)).with_context(what)?;
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    options.extend(more.iter().map(|&option| option.to_owned()));
    // SAFETY: the program was just created, and is destroyed below.
    let compiled = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let log: Vec<u8> = log.into_iter().take_while(|c| *c != 0).map(i8::cast_unsigned).collect();
    let log = String::from_utf8_lossy(&log).into_owned();
    let code = match compiled {
        // SAFETY: as above.
        Ok(()) => unsafe { read(program) }.with_context(what),
        Err(error) => Err(anyhow::anyhow!("{error}: {log}").context(what())),
    };
    // SAFETY: nobody has it any more.
    unsafe { result::destroy_program(program) }.with_context(what)?;
    Ok((code?, log))
}

/// The machine code of a compiled program.
///
/// # Safety
/// `program` must be one, compiled for a real architecture.
unsafe fn read(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut size = 0;
    // SAFETY: by the caller; the address is of a live integer.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut size) }.result()?;
    let mut code = vec![0u8; size];
    // SAFETY: by the caller; there is room for as many bytes as were asked for.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result()?;
    if !is_cubin(&code) {
        bail!("the compiler made {size} bytes that are no machine code for a card");
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'decode' for 'sm_90a'\n\
            ptxas info    : Function properties for decode\n    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 54 registers, used 1 barriers, 128 bytes smem\n";
        let wanted = Resources { entry: "decode".to_owned(), registers: 54, spilled: 12, shared: 128 };
        assert_eq!(parse(log), [wanted]);
        assert!(parse("nothing").is_empty());
    }
}
