//! Finding a graphics device, and saying in words why there is none.

use std::sync::{Arc, Mutex, OnceLock};

use shared::ShapeError;

use super::pipeline::Pipelines;

/// What can go wrong on the WebGPU backend.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GpuError {
    /// The browser or system offers no adapter.
    #[error("no WebGPU adapter: {0}")]
    NoAdapter(String),
    /// An adapter is there but gives no device.
    #[error("the adapter {adapter} gave no device: {reason}")]
    NoDevice {
        /// The adapter's name.
        adapter: String,
        /// What it said.
        reason: String,
    },
    /// The device went away while or before it was used; a new one may work.
    #[error("the graphics device was lost: {0}")]
    Lost(String),
    /// The device has not enough memory.
    #[error("the graphics device is out of memory: {0}")]
    OutOfMemory(String),
    /// The device refused an operation.
    #[error("the graphics device refused an operation: {0}")]
    Refused(String),
    /// An input of the wrong shape, or with values that are not finite.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A dictionary too large for the limits every WebGPU device has.
    #[error("{what} needs {bytes} bytes in one buffer, the device binds at most {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size in bytes.
        bytes: u64,
        /// The device's limit in bytes.
        limit: u64,
    },
}

/// A device with its queue, its name, and a note of whether it was lost.
#[derive(Debug, Clone)]
pub struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    name: String,
    software: bool,
    lost: Arc<Mutex<Option<String>>>,
    /// Compiled when first needed, then shared by every dictionary on the device.
    pub(crate) pipelines: Arc<OnceLock<Pipelines>>,
}

impl Gpu {
    /// Asks for an adapter and for a device with the default limits of WebGPU.
    ///
    /// # Errors
    /// If there is no adapter, or it gives no device.
    pub async fn request() -> Result<Self, GpuError> {
        let instance = wgpu::Instance::new(descriptor());
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        let adapter =
            instance.request_adapter(&options).await.map_err(|e| GpuError::NoAdapter(e.to_string()))?;
        Self::from_adapter(&adapter).await
    }

    /// A device of `adapter` with the default limits of WebGPU, however much more it could give.
    ///
    /// # Errors
    /// If the adapter gives no device.
    pub async fn from_adapter(adapter: &wgpu::Adapter) -> Result<Self, GpuError> {
        let info = adapter.get_info();
        let name = if info.name.is_empty() { "unnamed adapter".to_owned() } else { info.name.clone() };
        let described = wgpu::DeviceDescriptor {
            label: Some("stratascope"),
            required_limits: wgpu::Limits::defaults(),
            ..Default::default()
        };
        let (device, queue) = adapter
            .request_device(&described)
            .await
            .map_err(|e| GpuError::NoDevice { adapter: name.clone(), reason: e.to_string() })?;
        let lost = Arc::new(Mutex::new(None));
        let note = Arc::clone(&lost);
        device.set_device_lost_callback(move |reason, message| {
            if let Ok(mut lost) = note.lock() {
                *lost = Some(format!("{reason:?} {message}").trim().to_owned());
            }
        });
        let lower = name.to_lowercase();
        let software = info.device_type == wgpu::DeviceType::Cpu
            || ["swiftshader", "llvmpipe", "lavapipe", "software"].iter().any(|s| lower.contains(s));
        Ok(Self { device, queue, name, software, lost, pipelines: Arc::default() })
    }

    /// The adapter's name, as the browser tells it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the adapter is a program on the CPU: right, but slower than the CPU path of the page.
    #[must_use]
    pub fn is_software(&self) -> bool {
        self.software
    }

    /// `Err` with the reason once the device was lost.
    ///
    /// # Errors
    /// [`GpuError::Lost`].
    pub fn check(&self) -> Result<(), GpuError> {
        match self.lost.lock() {
            Ok(lost) => lost.as_ref().map_or(Ok(()), |reason| Err(GpuError::Lost(reason.clone()))),
            Err(_) => Err(GpuError::Lost("the note of its state is poisoned".to_owned())),
        }
    }

    /// The largest buffer the device binds, in bytes: WebGPU's default, 128 MiB.
    #[must_use]
    pub fn binding_limit(&self) -> u64 {
        self.device.limits().max_storage_buffer_binding_size
    }

    /// Destroys the device, as a crash of the driver would; tests use it.
    pub fn destroy(&self) {
        self.device.destroy();
    }

    /// Runs `work`, which only records and submits, and gives what the device found wrong with it.
    pub(crate) async fn checked<T>(&self, work: impl FnOnce() -> Result<T, GpuError>) -> Result<T, GpuError> {
        self.check()?;
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let result = work();
        let (validation, memory) = (validation.pop(), memory.pop());
        let found = [validation.await, memory.await];
        self.check()?;
        if let Some(error) = found.into_iter().flatten().next() {
            return Err(match error {
                wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory(error.to_string()),
                other => GpuError::Refused(other.to_string()),
            });
        }
        result
    }

    /// Waits until `buffer` can be read and copies its bytes.
    pub(crate) async fn read(&self, buffer: &wgpu::Buffer) -> Result<Vec<u8>, GpuError> {
        let (send, receive) = futures_channel::oneshot::channel();
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone only when the caller stopped waiting.
            let _ = send.send(result);
        });
        #[cfg(not(target_arch = "wasm32"))]
        self.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| GpuError::Lost(e.to_string()))?;
        let mapped = receive.await.map_err(|e| GpuError::Lost(e.to_string()))?;
        self.check()?;
        mapped.map_err(|e| GpuError::Refused(e.to_string()))?;
        let bytes = buffer.get_mapped_range(..).map_err(|e| GpuError::Refused(e.to_string()))?.to_vec();
        buffer.unmap();
        Ok(bytes)
    }
}

/// Vulkan under the rules of WebGPU natively, WebGPU itself in a browser.
fn descriptor() -> wgpu::InstanceDescriptor {
    wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::BROWSER_WEBGPU,
        flags: wgpu::InstanceFlags::VALIDATION | wgpu::InstanceFlags::STRICT_WEBGPU_COMPLIANCE,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    }
}
