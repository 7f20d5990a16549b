//! A card: the device behind the seam, through the driver, NVRTC and cuBLASLt.
//!
//! One stream takes everything in order but for copies beside it (`super::pinned`), memory comes from the driver's pool on that stream,
//! and every call's result is looked at.
//! [`Libraries`] has been asked before anything of CUDA is called: cudarc ends the program where a library is missing.

#![expect(unsafe_code, reason = "calls into the driver and the matrix library")]

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::path::PathBuf;
use std::ptr::from_ref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{result as driver, sys};

use super::device::{Argument, Device, Factors, HostMemory, MatrixAt, Product};
use super::found::CardInfo;
use super::kernels::{Kernel, Shape};
use super::libraries::Libraries;
use super::nvrtc;
use super::pinned::{Beside, Pinned, Staircase};
use super::step::Address;
use crate::places;

/// Bytes that the matrix library may use besides.
const WORKSPACE: usize = 32 << 20;

/// A card in use. Dropping it gives everything back.
pub struct Card {
    name: String,
    /// What kernels are compiled for, such as `sm_90a`.
    architecture: String,
    context: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    beside: Beside,
    /// What much is downloaded through; made by the first who needs it.
    staircase: Mutex<Option<Staircase>>,
    handle: lt_sys::cublasLtHandle_t,
    workspace: Address,
    cache: Option<PathBuf>,
    functions: Mutex<HashMap<(Kernel, Shape), sys::CUfunction>>,
    modules: Mutex<HashMap<(&'static str, Shape), sys::CUmodule>>,
    algorithms: Mutex<HashMap<Key, lt_sys::cublasLtMatmulAlgo_t>>,
}

/// What decides how a product is best computed.
type Key = (usize, usize, usize, [(usize, bool); 3], Factors);

// SAFETY: the handles are used by one call at a time on one stream, and every call makes the context current on its own thread first;
// the maps are behind locks.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The cards that the driver knows, and the version of CUDA it can run.
///
/// # Errors
/// If there is no driver, or it cannot start.
pub fn cards() -> Result<(String, Vec<CardInfo>)> {
    ensure!(Libraries::find().driver.is_some(), "there is no NVIDIA driver: libcuda.so.1 was not found");
    driver::init().context("the NVIDIA driver does not start")?;
    let mut version = 0;
    // SAFETY: the driver is there; the address is of a live integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let n = driver::device::get_count()?;
    let cards = (0..n).map(|number| {
        let device = driver::device::get(number)?;
        let (major, minor) = capability(device)?;
        // SAFETY: `device` is one of the driver's.
        let memory = unsafe { driver::device::total_mem(device) }? as u64;
        Ok(CardInfo {
            name: driver::device::get_name(device)?,
            capability: format!("{major}.{minor}"),
            memory,
        })
    });
    Ok((format!("{}.{}", version / 1000, version % 1000 / 10), cards.collect::<Result<_>>()?))
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32)> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: `device` is one of the driver's.
    unsafe {
        Ok((driver::device::get_attribute(device, MAJOR)?, driver::device::get_attribute(device, MINOR)?))
    }
}

impl Card {
    /// Opens card number `number`.
    ///
    /// # Errors
    /// If a library is missing, there is no such card, or it cannot be used.
    pub fn open(number: usize) -> Result<Self> {
        if let Some(missing) = Libraries::find().missing() {
            anyhow::bail!(
                "training on a card needs {missing}; `stratascope doctor` says where they were looked for"
            );
        }
        driver::init().context("the NVIDIA driver does not start")?;
        let n = driver::device::get_count()?;
        let number = i32::try_from(number).ok().filter(|number| *number < n);
        let number = number.with_context(|| format!("there are {n} cards, counted from 0"))?;
        let device = driver::device::get(number)?;
        let (major, minor) = capability(device)?;
        // From Hopper on, some instructions are only of the very architecture.
        let suffix = if major >= 9 { "a" } else { "" };
        // SAFETY: the device exists; the context is released when the card is dropped.
        let context = unsafe { driver::primary_ctx::retain(device) }.context("the card cannot be used")?;
        // SAFETY: the context was just retained.
        unsafe { driver::ctx::set_current(context) }?;
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)?;
        // SAFETY: the stream was just made.
        let workspace = unsafe { driver::malloc_async(stream, WORKSPACE) }?;
        keep_memory(device)?;
        Ok(Self {
            name: driver::device::get_name(device)?,
            architecture: format!("sm_{major}{minor}{suffix}"),
            handle: lt::create_handle()?,
            beside: Beside::new()?,
            cache: places::cache_folder().ok().map(|cache| cache.join("kernels")),
            functions: Mutex::default(),
            modules: Mutex::default(),
            staircase: Mutex::default(),
            algorithms: Mutex::default(),
            context,
            device,
            stream,
            workspace,
        })
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as the card.
        Ok(unsafe { driver::ctx::set_current(self.context) }?)
    }

    fn function(&self, kernel: Kernel, shape: Shape) -> Result<sys::CUfunction> {
        if let Some(function) = lock(&self.functions).get(&(kernel, shape)) {
            return Ok(*function);
        }
        let file = kernel.file();
        let known = lock(&self.modules).get(&(file, shape)).copied();
        let module = match known {
            Some(module) => module,
            None => {
                let cache = self.cache.as_deref();
                let code = nvrtc::cubin(file, kernel.source(), shape, &self.architecture, cache)?;
                // SAFETY: `code` is machine code made by the compiler, whole.
                let module = unsafe { driver::module::load_data(code.as_ptr().cast()) };
                let module = module.with_context(|| format!("the card does not take {file}"))?;
                lock(&self.modules).insert((file, shape), module);
                module
            }
        };
        let name = CString::new(kernel.entry())?;
        // SAFETY: the module stays loaded as long as the card is open.
        let function = unsafe { driver::module::get_function(module, name) };
        let function = function.with_context(|| format!("{file} has no {}", kernel.entry()))?;
        lock(&self.functions).insert((kernel, shape), function);
        Ok(function)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory given back stays with the program, for its next buffer.
fn keep_memory(device: sys::CUdevice) -> Result<()> {
    use sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
    let all = u64::MAX;
    // SAFETY: the pool is the device's own; the value is what the attribute wants.
    unsafe {
        let pool = driver::device::get_default_mem_pool(device)?;
        sys::cuMemPoolSetAttribute(pool, THRESHOLD, from_ref(&all).cast_mut().cast()).result()?;
    }
    Ok(())
}

impl Device for Card {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = driver::mem_get_info()?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        // SAFETY: the stream lives as long as the card.
        let at = unsafe { driver::malloc_async(self.stream, bytes) };
        at.with_context(|| {
            let free = driver::mem_get_info().map_or(0, |(free, _)| free);
            format!("the card has no room for {bytes} bytes; {free} are free")
        })
    }

    fn release(&self, at: Address) {
        // SAFETY: `at` came from `allocate`, and whoever had it is being dropped.
        let released = self.enter().and_then(|()| Ok(unsafe { driver::free_async(at, self.stream) }?));
        if let Err(error) = released {
            tracing::debug!("memory of the card was not given back: {error:#}");
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `to` has room, by the owner of the buffer; ordinary memory has been read when the call returns.
        Ok(unsafe { driver::memcpy_htod_async(to, bytes, self.stream) }?)
    }

    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        self.enter()?;
        Ok(Box::new(Pinned::new(self.device, bytes)?))
    }

    fn upload_beside(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        self.beside.copy(self.stream, to, from, bytes)
    }

    fn wait_beside(&self) -> Result<()> {
        self.enter()?;
        self.beside.wait()
    }

    fn download(&self, from: Address, into: &mut [u8]) -> Result<()> {
        self.enter()?;
        if into.len() > Staircase::LEAST {
            let mut staircase = lock(&self.staircase);
            if staircase.is_none() {
                *staircase = Staircase::new(self.device).ok();
            }
            if let Some(staircase) = &mut *staircase {
                return staircase.download(self.stream, from, into);
            }
        }
        // SAFETY: there are as many bytes at `from`, by the owner of the buffer; the copy is waited for.
        unsafe { driver::memcpy_dtoh_async(into, from, self.stream) }?;
        self.wait()
    }

    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: there are as many bytes at `at`, by the owner of the buffer.
        Ok(unsafe { driver::memset_d8_async(at, byte, bytes, self.stream) }?)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: there are as many bytes at both places, by the owners of the buffers.
        Ok(unsafe { driver::memcpy_dtod_async(to, from, bytes, self.stream) }?)
    }

    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()> {
        self.enter()?;
        let function = self.function(kernel, shape)?;
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Bytes(bytes) => bytes.as_ptr().cast_mut().cast(),
                Argument::Address(value) | Argument::U64(value) => from_ref(value).cast_mut().cast(),
                Argument::U32(value) => from_ref(value).cast_mut().cast(),
                Argument::F32(value) => from_ref(value).cast_mut().cast(),
            })
            .collect();
        let (grid, block) = ((u32::try_from(blocks)?, 1, 1), (u32::try_from(shape.threads)?, 1, 1));
        // SAFETY: arguments have the sizes the kernel has them in, and are copied by the call; the addresses in them are of buffers
        // that live until their memory is released on this very stream.
        let launched = unsafe { driver::launch_kernel(function, grid, block, 0, self.stream, &mut pointers) };
        launched.with_context(|| format!("{} in {blocks} blocks was refused", kernel.entry()))
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.enter()?;
        let Product { m, n, k, a, b, c, factors, adds } = *product;
        // The library thinks in columns: there, the result is transposed, and so are both factors and their order.
        let description = Description::new(factors, b.transposed, a.transposed)?;
        let shape = |at: MatrixAt, rows: usize, columns: usize| {
            if at.transposed { (rows, columns, at.leading) } else { (columns, rows, at.leading) }
        };
        let (read, written) = (kind(factors), lt_sys::cudaDataType::CUDA_R_32F);
        let layouts = [
            Layout::new(read, shape(b, k, n))?,
            Layout::new(read, shape(a, m, k))?,
            Layout::new(written, (n, m, c.leading))?,
        ];
        let [left, right, out] = [layouts[0].0, layouts[1].0, layouts[2].0];
        let key = (
            m,
            n,
            k,
            [(a.leading, a.transposed), (b.leading, b.transposed), (c.leading, c.transposed)],
            factors,
        );
        let known = lock(&self.algorithms).get(&key).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let preference = Preference::new()?;
                // SAFETY: all descriptions live until the end of this function.
                let found = unsafe {
                    lt::get_matmul_algo_heuristic(
                        self.handle,
                        description.0,
                        left,
                        right,
                        out,
                        out,
                        preference.0,
                    )
                };
                let found = found.with_context(|| format!("no way to multiply {m} x {k} by {k} x {n}"))?;
                lock(&self.algorithms).insert(key, found.algo);
                found.algo
            }
        };
        let (one, kept) = (1.0f32, if adds { 1.0f32 } else { 0.0 });
        // SAFETY: descriptions live until the end of this function, the matrices are of these shapes by the caller, and the workspace is
        // as large as the preference said.
        let done = unsafe {
            lt::matmul(
                self.handle,
                description.0,
                from_ref(&one).cast(),
                from_ref(&kept).cast(),
                b.at as *const c_void,
                left,
                a.at as *const c_void,
                right,
                c.at as *const c_void,
                out,
                c.at as *mut c_void,
                out,
                from_ref(&algorithm),
                self.workspace as *mut c_void,
                WORKSPACE,
                self.stream.cast(),
            )
        };
        done.with_context(|| format!("multiplying {m} x {k} by {k} x {n} was refused"))
    }

    fn wait(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as the card.
        unsafe { driver::stream::synchronize(self.stream) }
            .context("the card failed at something asked of it before")
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: nobody else has the handles; what is still running on the stream is waited for first. Failures at the end of a program
        // change nothing.
        unsafe {
            let _ = driver::stream::synchronize(self.stream);
            self.beside.end();
            drop(lock(&self.staircase).take());
            let _ = driver::ctx::set_current(self.context);
            let _ = lt::destroy_handle(self.handle);
            let _ = driver::free_async(self.workspace, self.stream);
            for module in lock(&self.modules).values() {
                let _ = driver::module::unload(*module);
            }
            let _ = driver::stream::synchronize(self.stream);
            let _ = driver::stream::destroy(self.stream);
            let _ = driver::primary_ctx::release(self.device);
        }
    }
}

/// The type of the factors.
fn kind(factors: Factors) -> lt_sys::cudaDataType {
    match factors {
        Factors::F32 | Factors::Tf32 => lt_sys::cudaDataType::CUDA_R_32F,
        Factors::Bf16 => lt_sys::cudaDataType::CUDA_R_16BF,
    }
}

/// How a product is computed, and which factors are transposed.
struct Description(lt_sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(factors: Factors, transpose_left: bool, transpose_right: bool) -> Result<Self> {
        let compute = match factors {
            Factors::F32 | Factors::Bf16 => lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Factors::Tf32 => lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        let description = Self(lt::create_matmul_desc(compute, lt_sys::cudaDataType::CUDA_R_32F)?);
        use lt_sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA as A, CUBLASLT_MATMUL_DESC_TRANSB as B,
        };
        for (attribute, transposed) in [(A, transpose_left), (B, transpose_right)] {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(transposed);
            // SAFETY: the description was just made; the value is of the size the attribute has.
            unsafe {
                lt::set_matmul_desc_attribute(
                    description.0,
                    attribute,
                    from_ref(&operation).cast(),
                    size_of::<i32>(),
                )
            }?;
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

/// A matrix as the library sees it: rows, columns, and values from one column to the next.
struct Layout(lt_sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: lt_sys::cudaDataType, (rows, columns, leading): (usize, usize, usize)) -> Result<Self> {
        Ok(Self(lt::create_matrix_layout(kind, rows as u64, columns as u64, i64::try_from(leading)?)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

/// How much memory the library may use besides.
struct Preference(lt_sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self> {
        let preference = Self(lt::create_matmul_pref()?);
        let attribute =
            lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE;
        // SAFETY: the preference was just made; the value is of the size the attribute has.
        unsafe {
            lt::set_matmul_pref_attribute(
                preference.0,
                attribute,
                from_ref(&bytes).cast(),
                size_of::<usize>(),
            )
        }?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
