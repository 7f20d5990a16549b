//! A device of the processor: compiles the CUDA kernels with the C++ compiler and runs their threads as fibers
//! (`cuda_on_cpu.h`), so that everything above the seam of `native::cuda` is tested without a card.
#![expect(unsafe_code, reason = "calls into the library made of the kernels, at addresses that it allocated")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use libloading::Library;
use native::cuda::{Address, Argument, Device, Factors, HostMemory, Kernel, PRELUDE, Product, Shape};

type Run = unsafe extern "C" fn(u32, u32, *mut *mut c_void);

/// Kernels of a shape, once they are compiled. A library runs one kernel at a time.
type Compiled = Arc<Mutex<Option<Library>>>;

/// What has been compiled by any device of the process.
static LIBRARIES: Mutex<Option<HashMap<Shape, Compiled>>> = Mutex::new(None);

/// The device. Its memory is the program's, and is checked to be used within what was allocated.
#[derive(Debug)]
pub(crate) struct Emulator {
    folder: PathBuf,
    /// Whether blocks run last to first, so that atomics find another order.
    backwards: bool,
    memory: Mutex<BTreeMap<Address, Vec<u64>>>,
    /// Bytes there are.
    room: usize,
    /// Where memory of the host lies that the device reads by itself, and how long it is.
    host: Arc<Mutex<BTreeMap<Address, usize>>>,
    /// Copies that were asked for beside everything else: to, from and how many bytes. They happen as late as they may.
    beside: Mutex<Vec<(Address, Address, usize)>>,
}

/// Memory of the host that the device reads by itself.
#[derive(Debug)]
struct Host {
    words: Vec<u64>,
    bytes: usize,
    known: Arc<Mutex<BTreeMap<Address, usize>>>,
}

impl HostMemory for Host {
    fn at(&self) -> Address {
        self.words.as_ptr() as Address
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        lock(&self.known).remove(&self.at());
    }
}

impl Emulator {
    /// A device that keeps its libraries in `folder`.
    #[must_use]
    pub(crate) fn new(folder: &Path) -> Self {
        Self::with_room(folder, 1 << 40)
    }

    /// A device of so many bytes.
    #[must_use]
    pub(crate) fn with_room(folder: &Path, room: usize) -> Self {
        let (memory, host, beside) = Default::default();
        Self { folder: folder.to_owned(), backwards: false, memory, room, host, beside }
    }

    /// A device whose blocks run in the other order.
    #[must_use]
    pub(crate) fn backwards(folder: &Path) -> Self {
        Self { backwards: true, ..Self::new(folder) }
    }

    /// Bytes allocated and not given back.
    #[must_use]
    pub(crate) fn in_use(&self) -> usize {
        lock(&self.memory).values().map(|words| 8 * words.len()).sum()
    }

    /// One library with all kernels for `shape`.
    fn compile(&self, shape: Shape) -> Result<Library> {
        let mut source = format!("#include \"{}\"\n", header().display());
        for (name, value) in shape.defines() {
            let _ = writeln!(source, "#define {name} {value}");
        }
        let _ = writeln!(source, "extern \"C\" {{\n{PRELUDE}\n}}");
        let mut files: Vec<&str> = Vec::new();
        for &kernel in Kernel::ALL {
            let name = kernel.entry();
            if !files.contains(&kernel.file()) {
                // Helpers of one file do not meet those of another.
                let space = kernel.file().trim_end_matches(".cu");
                let _ = writeln!(source, "namespace file_{space} {{\n{}\n}}", kernel.source());
                files.push(kernel.file());
            }
            let space = kernel.file().trim_end_matches(".cu");
            let _ = writeln!(
                source,
                "extern \"C\" void run_{name}(unsigned blocks, unsigned threads, void **args) {{\n\
                 emulator::run([](void **a) {{ emulator::call(file_{space}::{name}, a); }}, blocks, threads, args);\n}}"
            );
        }
        source.push_str("extern \"C\" unsigned size_of_step() { return sizeof(Step); }\n");
        source.push_str("extern \"C\" void run_backwards(bool yes) { emulator::backwards = yes; }\n");
        let name = format!("kernels-{}-{}-{}", shape.d_in, shape.d_out, shape.threads);
        let (cpp, so) = (self.folder.join(format!("{name}.cpp")), self.folder.join(format!("{name}.so")));
        std::fs::write(&cpp, source)?;
        let output = Command::new("c++")
            .args([
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-U_FORTIFY_SOURCE",
                "-ffp-contract=off",
                "-w",
                "-o",
            ])
            .arg(&so)
            .arg(&cpp)
            .output()
            .context("the tests of the CUDA kernels need a C++ compiler, `c++`")?;
        ensure!(
            output.status.success(),
            "the kernels do not compile:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // SAFETY: the library was made just now from the project's own sources, and runs nothing when loaded.
        Ok(unsafe { Library::new(&so) }?)
    }

    /// What the compiler makes of the size of a step's description.
    ///
    /// # Errors
    /// If the kernels do not compile.
    pub(crate) fn size_of_step(&self, shape: Shape) -> Result<usize> {
        let library = self.compile(shape)?;
        // SAFETY: the function was written above, with this type.
        let size = unsafe { library.get::<unsafe extern "C" fn() -> u32>(b"size_of_step")?() };
        Ok(size as usize)
    }

    /// Whether `bytes` bytes at `at` were allocated as one piece.
    fn check(&self, at: Address, bytes: usize) -> Result<()> {
        let memory = lock(&self.memory);
        let found = memory.range(..=at).next_back();
        let inside = found.is_some_and(|(start, words)| at - start + bytes as u64 <= 8 * words.len() as u64);
        ensure!(inside, "{bytes} bytes at {at:#x} were not allocated");
        Ok(())
    }

    fn values(&self, factors: Factors, at: Address, n: usize) -> Result<Vec<f32>> {
        let size = if factors == Factors::Bf16 { 2 } else { 4 };
        let mut bytes = vec![0u8; size * n];
        self.download(at, &mut bytes)?;
        let f32 = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let bf16 = |b: &[u8]| f32::from_le_bytes([0, 0, b[0], b[1]]);
        Ok(bytes.chunks_exact(size).map(|b| if size == 2 { bf16(b) } else { f32(b) }).collect())
    }
}

fn header() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/cuda_on_cpu.h")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Device for Emulator {
    fn name(&self) -> String {
        "CUDA kernels on the processor".to_owned()
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((self.room.saturating_sub(self.in_use()) as u64, self.room as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        ensure!(self.in_use() + bytes <= self.room, "no room for {bytes} bytes of {}", self.room);
        // What nobody wrote is no number, so that reading it is seen.
        let words = vec![u64::MAX; bytes.div_ceil(8)];
        let at = words.as_ptr() as Address;
        lock(&self.memory).insert(at, words);
        Ok(at)
    }

    fn release(&self, at: Address) {
        lock(&self.memory).remove(&at);
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.check(to, bytes.len())?;
        // SAFETY: checked just now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        let words = vec![u64::MAX; bytes.div_ceil(8).max(1)];
        let memory = Host { words, bytes, known: Arc::clone(&self.host) };
        lock(&self.host).insert(memory.at(), bytes);
        Ok(Box::new(memory))
    }

    fn upload_beside(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.check(to, bytes)?;
        lock(&self.beside).push((to, from, bytes));
        Ok(())
    }

    fn wait_beside(&self) -> Result<()> {
        for (to, from, bytes) in lock(&self.beside).drain(..) {
            let host = lock(&self.host);
            let found = host.range(..=from).next_back();
            let inside = found.is_some_and(|(start, length)| from - start + bytes as u64 <= *length as u64);
            ensure!(inside, "{bytes} bytes at {from:#x} of the host were gone before they were copied");
            self.check(to, bytes)?;
            // SAFETY: checked just now.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        }
        Ok(())
    }

    fn download(&self, from: Address, into: &mut [u8]) -> Result<()> {
        self.check(from, into.len())?;
        // SAFETY: checked just now.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes > 0 {
            self.check(at, bytes)?;
            // SAFETY: checked just now.
            unsafe { std::ptr::write_bytes(at as *mut u8, byte, bytes) };
        }
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.check(to, bytes)?;
        self.check(from, bytes)?;
        // SAFETY: checked just now.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()> {
        ensure!(blocks > 0, "{} was launched with no block", kernel.entry());
        let compiled = Arc::clone(lock(&LIBRARIES).get_or_insert_default().entry(shape).or_default());
        let mut library = lock(&compiled);
        let library = match &mut *library {
            Some(library) => library,
            none => none.insert(self.compile(shape)?),
        };
        let name = format!("run_{}", kernel.entry());
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Bytes(bytes) => bytes.as_ptr() as *mut c_void,
                Argument::Address(value) | Argument::U64(value) => std::ptr::from_ref(value) as *mut c_void,
                Argument::U32(value) => std::ptr::from_ref(value) as *mut c_void,
                Argument::F32(value) => std::ptr::from_ref(value) as *mut c_void,
            })
            .collect();
        // SAFETY: the function was written by `compile`, with this type; arguments are only read, in the sizes the kernel has.
        unsafe {
            library.get::<unsafe extern "C" fn(bool)>(b"run_backwards")?(self.backwards);
            let entry = library.get::<Run>(name.as_bytes())?;
            entry(u32::try_from(blocks)?, u32::try_from(shape.threads)?, pointers.as_mut_ptr());
        }
        Ok(())
    }

    fn product(&self, product: &Product) -> Result<()> {
        let Product { m, n, k, a, b, c, factors, adds } = *product;
        let size = |rows: usize, columns: usize, leading: usize| (rows.max(1) - 1) * leading + columns;
        let (a_rows, a_columns) = if a.transposed { (k, m) } else { (m, k) };
        let (b_rows, b_columns) = if b.transposed { (n, k) } else { (k, n) };
        let left = self.values(factors, a.at, size(a_rows, a_columns, a.leading))?;
        let right = self.values(factors, b.at, size(b_rows, b_columns, b.leading))?;
        let mut out = vec![0.0f32; n];
        for i in 0..m {
            for (j, out) in out.iter_mut().enumerate() {
                let left = |t: usize| left[if a.transposed { t * a.leading + i } else { i * a.leading + t }];
                let right =
                    |t: usize| right[if b.transposed { j * b.leading + t } else { t * b.leading + j }];
                *out = (0..k).map(|t| left(t) * right(t)).sum();
            }
            if adds {
                let before = self.values(Factors::F32, c.at + 4 * (i * c.leading) as u64, n)?;
                out.iter_mut().zip(before).for_each(|(out, before)| *out += before);
            }
            self.upload(c.at + 4 * (i * c.leading) as u64, bytemuck::cast_slice(&out))?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}
