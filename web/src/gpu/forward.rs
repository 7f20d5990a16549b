//! [`Forward`] on a graphics device, with exactly the reference's active set.
//!
//! The device screens: it keeps every (row, latent) that can be active within the f32 error bound of
//! [`shared::certify`]. The host sorts what is kept and settles the few inside the bound in f64. It also scales rows
//! where a dictionary asks for that, and undoes it in what it hands to the device. A skip connection is decoded like
//! further latents: input `j` is one, with column `j` of `W_skip` for a direction and `x_j` for a value.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable, cast_slice};
use shared::certify::{self, Margins};
use shared::row_scaling::Undo;
use shared::{Activation, Codes, CodesBuilder, Dims, Forward, Rows, Sae, ShapeError};

use super::device::{Gpu, GpuError};
use super::pipeline::{
    DECODE_COLUMNS, DecodeParams, ENCODE_TILE, EncodeParams, Entry, Hit, LatentConstants, Pipelines,
};
use shared::top_k::exact_top_k;

/// How dictionaries and batches are cut; the defaults fit every WebGPU device.
#[derive(Debug, Clone, Copy)]
pub struct Blocks {
    /// Largest buffer of encoder or decoder rows, in bytes.
    pub bytes: u64,
    /// Most rows of a batch in one dispatch.
    pub rows: usize,
    /// Hits per row that room is made for at first; the list grows when it does not suffice.
    pub hits_per_row: usize,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { bytes: 16 << 20, rows: 1024, hits_per_row: 256 }
    }
}

/// Some latents of the dictionary on the device.
#[derive(Debug)]
struct Block {
    latents: Range<usize>,
    w_enc: wgpu::Buffer,
    constants: wgpu::Buffer,
}

/// Some directions on the device: of latents, and behind the last latent the columns of a skip connection.
#[derive(Debug)]
struct Directions {
    latents: Range<usize>,
    rows: wgpu::Buffer,
}

/// A dictionary on a graphics device.
#[derive(Debug)]
pub struct GpuBackend {
    gpu: Gpu,
    pipelines: Pipelines,
    sae: Arc<Sae>,
    margins: Margins,
    blocks: Vec<Block>,
    directions: Vec<Directions>,
    cut: Blocks,
}

impl GpuBackend {
    /// Uploads `sae` in blocks.
    ///
    /// # Errors
    /// If the device is lost, out of memory, or cannot hold a single encoder row in a binding.
    pub async fn new(gpu: Gpu, sae: Arc<Sae>, cut: Blocks) -> Result<Self, GpuError> {
        let pipelines = Pipelines::of(&gpu).await?;
        let Dims { d_in, d_out, n_latents } = sae.dims();
        let row_bytes = 16 * vec4s(d_in.max(d_out)) as u64;
        let limit = gpu.binding_limit();
        if row_bytes > limit {
            return Err(GpuError::TooLarge { what: "one encoder row", bytes: row_bytes, limit });
        }
        let per_block = (cut.bytes.min(limit) / row_bytes).clamp(1, 65_535 * u64::from(ENCODE_TILE)) as usize;
        let margins = Margins::new(&sae);
        let mut blocks = Vec::new();
        for first in (0..n_latents).step_by(per_block) {
            let latents = first..n_latents.min(first + per_block);
            blocks.push(gpu.checked(|| Ok(upload_block(&gpu, &sae, &margins, latents))).await?);
        }
        let columns = sae.w_skip().map(|w_skip| columns(w_skip, d_in)).unwrap_or_default();
        let mut directions = Vec::new();
        for (first, rows) in [(0, sae.w_dec()), (n_latents, &columns[..])] {
            for (i, rows) in rows.chunks(per_block * d_out).enumerate() {
                let first = first + i * per_block;
                let latents = first..first + rows.len() / d_out;
                let rows = gpu.checked(|| Ok(upload_rows(&gpu, "directions", rows, d_out))).await?;
                directions.push(Directions { latents, rows });
            }
        }
        Ok(Self { gpu, pipelines, sae, margins, blocks, directions, cut })
    }

    /// The device in use.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The number of blocks the dictionary was cut into.
    #[must_use]
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Screens `x`, growing the list of hits until all fit; hits come in no particular order.
    async fn screen(&self, x: Rows<'_>, norms: &[f32]) -> Result<Vec<Hit>, GpuError> {
        let hit_bytes = size_of::<Hit>();
        let limit = self.gpu.binding_limit() as usize;
        let most = (limit - 4) / hit_bytes;
        let mut capacity = (x.n_rows() * self.cut.hits_per_row).clamp(1, most);
        loop {
            let staging = self.gpu.checked(|| self.submit_encode(x, norms, capacity)).await?;
            let bytes = self.gpu.read(&staging).await?;
            let count = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
            if count <= capacity {
                let hits = &bytes[4..4 + count * hit_bytes];
                return Ok(hits.chunks_exact(hit_bytes).map(bytemuck::pod_read_unaligned).collect());
            }
            if count > most {
                let bytes = (count * hit_bytes) as u64;
                return Err(GpuError::TooLarge { what: "the list of hits", bytes, limit: limit as u64 });
            }
            capacity = count;
        }
    }

    /// Records and submits one screening pass; the buffer returned can be mapped when it is done.
    fn submit_encode(&self, x: Rows<'_>, norms: &[f32], capacity: usize) -> Result<wgpu::Buffer, GpuError> {
        let gpu = &self.gpu;
        let n_rows = x.n_rows();
        let width = vec4s(x.width());
        let x_buffer = upload_rows(gpu, "x", x.data(), x.width());
        let norms = upload(gpu, "x norms", wgpu::BufferUsages::STORAGE, norms);
        let found_bytes = (4 + capacity * size_of::<Hit>()) as u64;
        let found =
            buffer(gpu, "found", found_bytes, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let staging = buffer(gpu, "found, to read", found_bytes, wgpu::BufferUsages::MAP_READ);
        let groups: Vec<(wgpu::BindGroup, u32)> = self
            .blocks
            .iter()
            .map(|block| {
                let params = EncodeParams {
                    n_rows: small(n_rows),
                    width_vec4: small(width),
                    n_latents: small(block.latents.len()),
                    first_latent: small(block.latents.start),
                    capacity: small(capacity),
                    ..EncodeParams::zeroed()
                };
                let params = upload(gpu, "encode params", wgpu::BufferUsages::UNIFORM, &[params]);
                let bound = [&params, &x_buffer, &norms, &block.w_enc, &block.constants, &found];
                (bind(gpu, &self.pipelines.encode, &bound), small(block.latents.len()).div_ceil(ENCODE_TILE))
            })
            .collect();
        let mut commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = commands.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipelines.encode);
            for (group, n_groups) in &groups {
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(*n_groups, small(n_rows).div_ceil(ENCODE_TILE), 1);
            }
        }
        commands.copy_buffer_to_buffer(&found, 0, &staging, 0, found_bytes);
        gpu.queue.submit([commands.finish()]);
        Ok(staging)
    }

    /// Settles the hits of one chunk and adds its rows to `builder`.
    fn settle(
        &self,
        x: Rows<'_>,
        norms: &[f32],
        hits: &[Hit],
        builder: &mut CodesBuilder,
    ) -> Result<(), GpuError> {
        let mut by_row: Vec<Vec<(u32, f32)>> = vec![Vec::new(); x.n_rows()];
        for hit in hits {
            let row = by_row.get_mut(hit.row as usize).ok_or_else(|| stray(hit))?;
            if hit.latent as usize >= self.sae.dims().n_latents {
                return Err(stray(hit));
            }
            row.push((hit.latent, hit.z));
        }
        for ((row, estimates), &norm) in x.iter().zip(&mut by_row).zip(norms) {
            estimates.sort_unstable_by_key(|&(latent, _)| latent);
            if let Activation::TopK { k } = self.sae.activation() {
                for (latent, value) in exact_top_k(&self.sae, &self.margins, *k, row, norm, estimates) {
                    builder.push(latent, value);
                }
            } else {
                for &(latent, z) in estimates.iter() {
                    let i = latent as usize;
                    let threshold = self.sae.activation().threshold(i).unwrap_or(0.0);
                    let margin = self.margins.margin(i, norm);
                    if let Some(value) = certify::decide(&self.sae, row, i, z, margin, threshold) {
                        builder.push(latent, value);
                    }
                }
            }
            builder.end_row()?;
        }
        Ok(())
    }

    /// Records and submits the decoding of rows `rows` of `x` and `codes`.
    fn submit_decode(
        &self,
        x: Rows<'_>,
        codes: &Codes,
        rows: Range<usize>,
    ) -> Result<wgpu::Buffer, GpuError> {
        let gpu = &self.gpu;
        let Dims { d_out, n_latents, .. } = self.sae.dims();
        let width = vec4s(d_out);
        let (mut entries, mut bias) = (Vec::new(), Vec::with_capacity(rows.len() * d_out));
        let mut starts = vec![0];
        for i in rows.clone() {
            let (latents, values) = codes.row(i);
            let Undo { scale, shift } = self.sae.rows().undo(x.row(i));
            bias.extend(self.sae.b_dec().iter().map(|&b| to_f32(scale * f64::from(b) + shift)));
            let scaled = |&value: &f32| to_f32(scale * f64::from(value));
            entries.extend(latents.iter().zip(values).map(|(&latent, v)| Entry { latent, value: scaled(v) }));
            if self.sae.w_skip().is_some() {
                let inputs = (small(n_latents)..).zip(x.row(i));
                entries.extend(inputs.map(|(latent, &value)| Entry { latent, value }));
            }
            starts.push(entries.len());
        }
        let out = upload_rows(gpu, "out", &bias, d_out);
        let staging = buffer(gpu, "out, to read", out.size(), wgpu::BufferUsages::MAP_READ);
        entries.resize(entries.len().max(1), Entry::zeroed());
        let entries_buffer = upload(gpu, "entries", wgpu::BufferUsages::STORAGE, &entries);
        let groups: Vec<wgpu::BindGroup> = self
            .directions
            .iter()
            .map(|block| {
                let spans: Vec<[u32; 2]> =
                    starts.windows(2).map(|s| span(&entries[s[0]..s[1]], s[0], &block.latents)).collect();
                let spans = upload(gpu, "spans", wgpu::BufferUsages::STORAGE, &spans);
                let params = DecodeParams {
                    n_rows: small(rows.len()),
                    width_vec4: small(width),
                    first_latent: small(block.latents.start),
                    pad0: 0,
                };
                let params = upload(gpu, "decode params", wgpu::BufferUsages::UNIFORM, &[params]);
                bind(gpu, &self.pipelines.decode, &[&params, &spans, &entries_buffer, &block.rows, &out])
            })
            .collect();
        let mut commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = commands.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipelines.decode);
            for group in &groups {
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(small(width).div_ceil(DECODE_COLUMNS), small(rows.len()), 1);
            }
        }
        commands.copy_buffer_to_buffer(&out, 0, &staging, 0, out.size());
        gpu.queue.submit([commands.finish()]);
        Ok(staging)
    }

    /// Most rows of `width` values that fit one dispatch and one binding.
    fn rows_per_dispatch(&self, width: usize) -> usize {
        let limit = self.gpu.binding_limit() as usize;
        self.cut.rows.min(limit / (16 * vec4s(width))).clamp(1, 65_535)
    }
}

impl Forward for GpuBackend {
    type Error = GpuError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, GpuError> {
        let Dims { d_in, n_latents, .. } = self.sae.dims();
        x.expect_width("x", d_in)?;
        check_finite(x)?;
        let scaled = self.sae.rows().scaled(x);
        let x = Rows::new(&scaled, d_in)?;
        let mut builder = CodesBuilder::new(n_latents);
        // Even when every latent is a hit, a chunk's list must fit one binding.
        let limit = self.gpu.binding_limit() as usize;
        let all_fit = ((limit - 4) / size_of::<Hit>() / n_latents).max(1);
        let chunk = self.rows_per_dispatch(d_in).min(all_fit);
        for first in (0..x.n_rows()).step_by(chunk) {
            let rows = x.slice(first, x.n_rows().min(first + chunk));
            let norms: Vec<f32> = rows.iter().map(certify::norm).collect();
            let hits = self.screen(rows, &norms).await?;
            self.settle(rows, &norms, &hits, &mut builder)?;
        }
        Ok(builder.finish())
    }

    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, GpuError> {
        self.sae.check_decode(x, codes)?;
        check_finite(x)?;
        let Dims { d_in, d_out, n_latents } = self.sae.dims();
        // Even when every latent is active, a chunk's entries must fit one binding.
        let limit = self.gpu.binding_limit() as usize;
        let all_fit = (limit / size_of::<Entry>() / (n_latents + d_in)).max(1);
        let chunk = self.rows_per_dispatch(d_out).min(all_fit);
        let mut out = Vec::with_capacity(codes.n_rows() * d_out);
        for first in (0..codes.n_rows()).step_by(chunk) {
            let rows = first..codes.n_rows().min(first + chunk);
            let staging = self.gpu.checked(|| self.submit_decode(x, codes, rows)).await?;
            let bytes = self.gpu.read(&staging).await?;
            for row in bytes.chunks_exact(16 * vec4s(d_out)) {
                out.extend(row.chunks_exact(4).take(d_out).map(bytemuck::pod_read_unaligned::<f32>));
            }
        }
        Ok(out)
    }
}

/// Vectors of four that hold `width` values.
fn vec4s(width: usize) -> usize {
    width.div_ceil(4)
}

/// Sizes here are bounded by the device's limits, far below 2³².
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn to_f32(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the device computes in f32")]
    let value = value as f32;
    value
}

/// The columns of a matrix whose rows have `width` values, one after the other.
fn columns(matrix: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| matrix.iter().skip(column).step_by(width).copied()).collect()
}

/// A NaN means nothing in WGSL, where an implementation may assume there is none.
fn check_finite(x: Rows<'_>) -> Result<(), ShapeError> {
    let Some(index) = x.data().iter().position(|v| !v.is_finite()) else { return Ok(()) };
    let value = x.data()[index].to_string();
    Err(ShapeError::Value { name: "x", index, value, expected: "a finite number" })
}

fn stray(hit: &Hit) -> GpuError {
    GpuError::Refused(format!("it returned latent {} of row {}, outside the batch", hit.latent, hit.row))
}

/// Entries of one row (ascending, the first at `start`) that lie in `block`, as first..end.
fn span(entries: &[Entry], start: usize, block: &Range<usize>) -> [u32; 2] {
    let before = |bound: usize| start + entries.partition_point(|e| (e.latent as usize) < bound);
    [small(before(block.start)), small(before(block.end))]
}

fn upload_block(gpu: &Gpu, sae: &Sae, margins: &Margins, latents: Range<usize>) -> Block {
    let d_in = sae.dims().d_in;
    let constants: Vec<LatentConstants> = latents
        .clone()
        .map(|i| LatentConstants {
            bias: sae.b_enc()[i],
            threshold: sae.activation().threshold(i).unwrap_or(0.0),
            margin_scale: margins.scale()[i],
            margin_offset: margins.offset()[i],
        })
        .collect();
    Block {
        w_enc: upload_rows(gpu, "w_enc", &sae.w_enc()[latents.start * d_in..latents.end * d_in], d_in),
        constants: upload(gpu, "latents", wgpu::BufferUsages::STORAGE, &constants),
        latents,
    }
}

/// Uploads rows of `width` values, each padded with zeros to whole vectors of four.
fn upload_rows(gpu: &Gpu, label: &str, data: &[f32], width: usize) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    if width.is_multiple_of(4) {
        return upload(gpu, label, usage, data);
    }
    let padded = 4 * vec4s(width);
    let mut rows = vec![0.0; data.len() / width * padded];
    for (to, from) in rows.chunks_exact_mut(padded).zip(data.chunks_exact(width)) {
        to[..width].copy_from_slice(from);
    }
    upload(gpu, label, usage, &rows)
}

/// Uploads through the queue: a buffer created mapped would be a panic where memory is short.
fn upload<T: Pod>(gpu: &Gpu, label: &str, usage: wgpu::BufferUsages, data: &[T]) -> wgpu::Buffer {
    let bytes: &[u8] = cast_slice(data);
    let made = buffer(gpu, label, bytes.len() as u64, usage);
    gpu.queue.write_buffer(&made, 0, bytes);
    made
}

fn buffer(gpu: &Gpu, label: &str, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage: usage | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    })
}

fn bind(gpu: &Gpu, pipeline: &wgpu::ComputePipeline, buffers: &[&wgpu::Buffer]) -> wgpu::BindGroup {
    let entries: Vec<wgpu::BindGroupEntry<'_>> = (0u32..)
        .zip(buffers)
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
        .collect();
    gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &entries,
    })
}
