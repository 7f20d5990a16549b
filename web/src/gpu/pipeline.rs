//! The compiled shaders, and the Rust side of their structs.
//!
//! `tests/tests/shaders.rs` compares each struct here, field by field, with its WGSL twin.

use bytemuck::{Pod, Zeroable};

use super::device::{Gpu, GpuError};

/// Rows and latents that one workgroup of `encode.wgsl` covers along each axis.
pub const ENCODE_TILE: u32 = 64;
/// Columns (of four values) that one workgroup of `decode.wgsl` covers.
pub const DECODE_COLUMNS: u32 = 64;

/// `Params` of `encode.wgsl`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct EncodeParams {
    /// Rows of x in this dispatch.
    pub n_rows: u32,
    /// `d_in / 4`, rounded up.
    pub width_vec4: u32,
    /// Latents in this block.
    pub n_latents: u32,
    /// Dictionary index of the block's first latent.
    pub first_latent: u32,
    /// Hits there is room for.
    pub capacity: u32,
    /// Padding to 32 bytes.
    pub pad0: u32,
    /// Padding.
    pub pad1: u32,
    /// Padding.
    pub pad2: u32,
}

/// `Latent` of `encode.wgsl`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct LatentConstants {
    /// Encoder bias.
    pub bias: f32,
    /// Threshold θ; zero for ReLU and top-k, which only ever keep positive pre-activations.
    pub threshold: f32,
    /// Margin per unit of ‖x‖.
    pub margin_scale: f32,
    /// Constant part of the margin.
    pub margin_offset: f32,
}

/// `Hit` of `encode.wgsl`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Hit {
    /// Row of this dispatch.
    pub row: u32,
    /// Dictionary index.
    pub latent: u32,
    /// Estimated pre-activation.
    pub z: f32,
}

/// `Params` of `decode.wgsl`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct DecodeParams {
    /// Rows of the output in this dispatch.
    pub n_rows: u32,
    /// `d_out / 4`, rounded up.
    pub width_vec4: u32,
    /// Dictionary index of the block's first latent.
    pub first_latent: u32,
    /// Padding to 16 bytes.
    pub pad0: u32,
}

/// `Entry` of `decode.wgsl`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// Dictionary index.
    pub latent: u32,
    /// Its activation.
    pub value: f32,
}

/// The two compute pipelines of a device.
#[derive(Debug, Clone)]
pub struct Pipelines {
    pub(crate) encode: wgpu::ComputePipeline,
    pub(crate) decode: wgpu::ComputePipeline,
}

impl Pipelines {
    /// The pipelines of `gpu`, compiled at the first call.
    ///
    /// # Errors
    /// If the device refuses one; the message holds its reason.
    pub async fn of(gpu: &Gpu) -> Result<Self, GpuError> {
        if let Some(compiled) = gpu.pipelines.get() {
            return Ok(compiled.clone());
        }
        let compiled = gpu
            .checked(|| {
                Ok(Self {
                    encode: compile(gpu, "encode", include_str!("../../../shaders/encode.wgsl")),
                    decode: compile(gpu, "decode", include_str!("../../../shaders/decode.wgsl")),
                })
            })
            .await?;
        Ok(gpu.pipelines.get_or_init(|| compiled).clone())
    }
}

fn compile(gpu: &Gpu, label: &str, source: &str) -> wgpu::ComputePipeline {
    let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(label),
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(label),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    })
}
