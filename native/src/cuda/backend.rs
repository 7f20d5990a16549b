//! [`Forward`] on a device with the CUDA kernels, with exactly the reference's active set.
//!
//! The device screens: of encoder products in f32 it keeps every (row, latent) that can be active within the bound of
//! [`shared::certify`]; of top-k's, more than `k`, so that what lies within rounding of the `k`-th is among them. The host settles the
//! few that rounding could decide in f64. It also scales rows where a dictionary asks for that; the device undoes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use shared::certify::{self, Screen};
use shared::row_scaling::Undo;
use shared::top_k::{bounds, exact_top_k};
use shared::{Activation, Codes, CodesBuilder, Dims, Forward, Rows, Sae, ShapeError};

use super::device::{Argument, Buffer, Device, Factors, MatrixAt, Product};
use super::geometry;
use super::kernels::{Kernel, Shape};
use super::step::{Address, Step};

/// Most rows on the device at a time.
const ROWS: usize = 4096;
/// Bytes of the lists of what is kept, at most, where a row's fits.
const LISTS: usize = 1 << 30;
/// Latents kept of a row besides twice `k`: what may lie within rounding of the `k`-th.
const BESIDE: usize = 64;
/// The latent function of lists that are the largest of a row (`TOPK` of `kernels/prelude.cu`).
const LARGEST: u32 = 3;

type Shared = Arc<dyn Device + Send + Sync>;

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// Rows or codes of the wrong shape.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The device's own.
    #[error("{0:#}")]
    Device(anyhow::Error),
}

impl From<anyhow::Error> for CudaError {
    fn from(error: anyhow::Error) -> Self {
        Self::Device(error)
    }
}

/// A dictionary on a device.
#[derive(Debug)]
pub struct CudaBackend {
    device: Shared,
    shape: Shape,
    sae: Sae,
    screen: Screen,
    /// Factor of the norm and constant part that no latent's margin exceeds.
    largest_margin: [f32; 2],
    w_enc: Buffer,
    b_enc: Buffer,
    w_dec: Buffer,
    b_dec: Buffer,
    w_skip: Option<Buffer>,
    cuts: Buffer,
    margin_scale: Buffer,
    margin_offset: Buffer,
    /// Room for a row's list, of those above a threshold.
    capacity: AtomicUsize,
}

/// What the device kept of some rows.
struct Kept {
    capacity: usize,
    counts: Vec<u32>,
    latents: Vec<u32>,
    z: Vec<f32>,
}

impl Kept {
    fn row(&self, i: usize) -> Vec<(u32, f32)> {
        let row = i * self.capacity..i * self.capacity + self.counts[i] as usize;
        self.latents[row.clone()].iter().copied().zip(self.z[row].iter().copied()).collect()
    }
}

impl CudaBackend {
    /// Takes `sae` to `device`.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn new(device: Shared, sae: Sae) -> Result<Self, CudaError> {
        let Dims { d_in, d_out, n_latents: n } = sae.dims();
        let screen = Screen::new(&sae);
        let margins = screen.margins();
        let cuts: Vec<f32> = (0..n).map(|i| sae.activation().threshold(i).unwrap_or(0.0)).collect();
        let largest = |values: &[f32]| values.iter().copied().fold(0.0, f32::max);
        let of = |values: &[f32]| Buffer::of(&device, values);
        Ok(Self {
            shape: Shape::new(d_in, d_out),
            largest_margin: [largest(margins.scale()), largest(margins.offset())],
            w_enc: of(sae.w_enc())?,
            b_enc: of(sae.b_enc())?,
            w_dec: of(sae.w_dec())?,
            b_dec: of(sae.b_dec())?,
            w_skip: sae.w_skip().map(of).transpose()?,
            cuts: of(&cuts)?,
            margin_scale: of(margins.scale())?,
            margin_offset: of(margins.offset())?,
            capacity: AtomicUsize::new(geometry::first_capacity(n)),
            screen,
            sae,
            device,
        })
    }

    /// The dictionary held.
    #[must_use]
    pub fn sae(&self) -> &Sae {
        &self.sae
    }

    /// Activation vectors `[n_rows, d_in]` to latent activations; exactly the reference's active set.
    ///
    /// # Errors
    /// If rows are not `d_in` wide, or the device fails.
    pub fn encode(&self, x: Rows<'_>) -> Result<Codes, CudaError> {
        let Dims { d_in, n_latents, .. } = self.sae.dims();
        x.expect_width("x", d_in)?;
        let scaled = self.sae.rows().scaled(x);
        let x = Rows::new(&scaled, d_in)?;
        let mut builder = CodesBuilder::new(n_latents);
        let mut first = 0;
        while first < x.n_rows() {
            let capacity = self.room();
            let n_rows = (LISTS / 8 / capacity).clamp(1, ROWS).min(x.n_rows() - first);
            let rows = x.slice(first, first + n_rows);
            let norms: Vec<f32> = rows.data().par_chunks_exact(d_in).map(certify::norm).collect();
            let Some(kept) = self.kept(rows, &norms, capacity)? else {
                // A row had no room for all that may be active: again, with more.
                self.capacity.store(geometry::more_capacity(capacity, n_latents), Ordering::Relaxed);
                continue;
            };
            let settle = |i: usize| self.settle(rows.row(i), norms[i], &kept.row(i));
            let settled: Vec<Vec<(u32, f32)>> = (0..n_rows).into_par_iter().map(settle).collect();
            for row in settled {
                row.into_iter().for_each(|(latent, value)| builder.push(latent, value));
                builder.end_row()?;
            }
            first += n_rows;
        }
        Ok(builder.finish())
    }

    /// How many of a row's largest are kept; `None` where latents are decided one by one.
    fn largest(&self) -> Option<usize> {
        let k = self.screen.k()?;
        Some(k.saturating_mul(2).saturating_add(BESIDE).min(self.sae.dims().n_latents))
    }

    fn room(&self) -> usize {
        self.largest().map_or_else(
            || self.capacity.load(Ordering::Relaxed),
            |largest| geometry::capacity_of_largest(largest, self.shape.threads),
        )
    }

    /// What may be active of rows of these norms, with its pre-activations; `None` where a row's did not fit.
    fn kept(&self, x: Rows<'_>, norms: &[f32], capacity: usize) -> Result<Option<Kept>, CudaError> {
        let (n, d_in, n_rows) = (self.sae.dims().n_latents, self.sae.dims().d_in, x.n_rows());
        let device = &self.device;
        let at_once = geometry::latents_at_once(n_rows, n, geometry::PRODUCTS);
        let buffers = [n_rows * d_in, n_rows * at_once, n_rows * capacity, n_rows * capacity];
        let [input, products, latents, z] = buffers.map(|n| Buffer::new::<f32>(device, n));
        let [input, products, latents, z] = [input?, products?, latents?, z?];
        // No product of a row that f32 cannot be trusted with means anything; it is encoded elsewhere.
        let trusted: Vec<bool> = norms.iter().map(|&norm| self.screen.trusts(norm)).collect();
        if trusted.contains(&false) {
            let mut rows = x.data().to_vec();
            let untrusted = rows.chunks_exact_mut(d_in).zip(&trusted).filter(|(_, trusted)| !**trusted);
            untrusted.for_each(|(row, _)| row.fill(0.0));
            input.write(&rows)?;
        } else {
            input.write(x.data())?;
        }
        let safe: Vec<f32> =
            norms.iter().zip(&trusted).map(|(&norm, &trusted)| if trusted { norm } else { 0.0 }).collect();
        let [scale, offset] = self.largest_margin;
        let (counts, overflow) = (Buffer::zeros::<u32>(device, n_rows)?, Buffer::zeros::<u32>(device, 1)?);
        let norms = Buffer::of(device, &safe)?;
        // Nothing at or below this can be positive.
        let floors: Vec<f32> = safe.iter().map(|norm| -(scale * norm + offset)).collect();
        let floors = Buffer::of(device, &floors)?;
        let largest = self.largest();
        let told = Step {
            b_enc: self.b_enc.at(),
            cuts: self.cuts.at(),
            norms: norms.at(),
            margin_scale: self.margin_scale.at(),
            margin_offset: self.margin_offset.at(),
            products: products.at(),
            kept_latents: latents.at(),
            kept_z: z.at(),
            kept_counts: counts.at(),
            floors: floors.at(),
            overflow: overflow.at(),
            kind: if largest.is_some() { LARGEST } else { 0 },
            n_rows: n_rows as u32,
            n_latents: n as u32,
            n_layers: 1,
            capacity: capacity as u32,
            largest: largest.unwrap_or(0) as u32,
            ..Step::default()
        };
        for first in (0..n).step_by(at_once) {
            let width = at_once.min(n - first);
            self.multiply(
                (n_rows, width),
                input.at(),
                self.w_enc.at() + 4 * (first * d_in) as u64,
                (products.at(), at_once),
            )?;
            let [first, width, leading] = [first, width, at_once].map(|n| Argument::U32(n as u32));
            let told = Argument::Bytes(bytemuck::bytes_of(&told));
            let of_dead = Argument::U32(0);
            if largest.is_some() {
                let arguments = [told, first, width, leading, of_dead];
                device.launch(Kernel::KeepLargest, self.shape, n_rows, &arguments)?;
            } else {
                device.launch(Kernel::KeepAbove, self.shape, n_rows, &[told, first, width, leading])?;
            }
        }
        if overflow.read::<u32>(1)? != [0] {
            return Ok(None);
        }
        let counts = counts.read(n_rows)?;
        let (latents, z) = (latents.read(n_rows * capacity)?, z.read(n_rows * capacity)?);
        Ok(Some(Kept { capacity, counts, latents, z }))
    }

    /// `c = a · bᵀ` with all bits of f32: rows of `a` and of `b` are vectors read.
    fn multiply(
        &self,
        (m, n): (usize, usize),
        a: Address,
        b: Address,
        (c, leading): (Address, usize),
    ) -> Result<(), CudaError> {
        let k = self.sae.dims().d_in;
        Ok(self.device.product(&Product {
            m,
            n,
            k,
            a: MatrixAt { at: a, leading: k, transposed: false },
            b: MatrixAt { at: b, leading: k, transposed: true },
            c: MatrixAt { at: c, leading, transposed: false },
            factors: Factors::F32,
            adds: false,
        })?)
    }

    /// The active latents of one row, given estimates of all that may be.
    fn settle(&self, x: &[f32], norm: f32, estimates: &[(u32, f32)]) -> Vec<(u32, f32)> {
        let (sae, margins) = (&self.sae, self.screen.margins());
        let mut active = Vec::new();
        let whole = |active: &mut Vec<(u32, f32)>| {
            self.screen.row_in_f64(sae, x, |latent, value| active.push((latent, value)));
        };
        if !self.screen.trusts(norm) {
            whole(&mut active);
        } else if let Activation::TopK { k } = *sae.activation() {
            if self.is_complete(k, norm, estimates) {
                return exact_top_k(sae, margins, k, x, norm, estimates);
            }
            whole(&mut active);
        } else {
            for &(latent, z) in estimates {
                let i = latent as usize;
                let threshold = sae.activation().threshold(i).unwrap_or(0.0);
                if let Some(value) = certify::decide(sae, x, i, z, margins.margin(i, norm), threshold) {
                    active.push((latent, value));
                }
            }
        }
        active
    }

    /// Whether all that may be among the `k` largest of a row was kept: always, but where very many are equal to the `k`-th.
    fn is_complete(&self, k: usize, norm: f32, estimates: &[(u32, f32)]) -> bool {
        let largest = self.largest().unwrap_or(0);
        if estimates.len() < largest || largest == self.sae.dims().n_latents {
            return true;
        }
        let margins = self.screen.margins();
        let intervals = estimates.iter().map(|&(latent, z)| (z, margins.margin(latent as usize, norm)));
        let (enters, _) = bounds(k, intervals);
        let smallest = estimates.iter().map(|&(_, z)| z).fold(f32::INFINITY, f32::min);
        let [scale, offset] = self.largest_margin;
        smallest + (scale * norm + offset) < enters
    }

    /// Latent activations of the vectors `x` `[n_rows, d_in]` to reconstructions `[n_rows, d_out]`, summed in f32 in the order of the
    /// latents.
    ///
    /// # Errors
    /// If the codes index another dictionary width, `x` has another width or other rows than the codes, or the device fails.
    pub fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, CudaError> {
        self.sae.check_decode(x, codes)?;
        let mut out = vec![0.0; codes.n_rows() * self.sae.dims().d_out];
        let mut first = 0;
        while first < codes.n_rows() {
            // As many rows as their entries have room.
            let (mut last, mut entries) = (first, 0);
            while last < codes.n_rows() && last - first < ROWS {
                entries += codes.row(last).0.len();
                if entries > LISTS / 8 && last > first {
                    break;
                }
                last += 1;
            }
            let d_out = self.sae.dims().d_out;
            self.decode_rows(x.slice(first, last), codes, first, &mut out[first * d_out..last * d_out])?;
            first = last;
        }
        Ok(out)
    }

    /// Decodes the rows of `x`, the first of which is row `first` of the codes.
    fn decode_rows(
        &self,
        x: Rows<'_>,
        codes: &Codes,
        first: usize,
        out: &mut [f32],
    ) -> Result<(), CudaError> {
        let (n_rows, d_out) = (x.n_rows(), self.sae.dims().d_out);
        let (mut offsets, mut latents, mut values) = (vec![0u32], Vec::new(), Vec::new());
        for row in first..first + n_rows {
            let (row_latents, row_values) = codes.row(row);
            latents.extend_from_slice(row_latents);
            values.extend_from_slice(row_values);
            offsets.push(latents.len() as u32);
        }
        let undo = |x: &[f32]| {
            let Undo { scale, shift } = self.sae.rows().undo(x);
            [scale as f32, shift as f32]
        };
        let undo: Vec<f32> = x.iter().flat_map(undo).collect();
        let device = &self.device;
        let offsets = Buffer::of(device, &offsets)?;
        let (latents, values) = (Buffer::of(device, &latents)?, Buffer::of(device, &values)?);
        let (undo, decoded) = (Buffer::of(device, &undo)?, Buffer::new::<f32>(device, n_rows * d_out)?);
        let skip = self.w_skip.as_ref().map(|w_skip| -> Result<[Buffer; 2], CudaError> {
            let buffers = [Buffer::of(device, x.data())?, Buffer::new::<f32>(device, n_rows * d_out)?];
            self.multiply((n_rows, d_out), buffers[0].at(), w_skip.at(), (buffers[1].at(), d_out))?;
            Ok(buffers)
        });
        let skip = skip.transpose()?;
        let arguments = [
            offsets.at(),
            latents.at(),
            values.at(),
            self.w_dec.at(),
            self.b_dec.at(),
            undo.at(),
            skip.as_ref().map_or(0, |[_, skip]| skip.at()),
            decoded.at(),
        ];
        let arguments = arguments.map(Argument::Address);
        device.launch(Kernel::Reconstruct, self.shape, n_rows, &arguments)?;
        Ok(decoded.read_into(out)?)
    }
}

impl Forward for CudaBackend {
    type Error = CudaError;

    fn dims(&self) -> Dims {
        self.sae.dims()
    }

    async fn encode(&self, x: Rows<'_>) -> Result<Codes, CudaError> {
        Self::encode(self, x)
    }

    async fn decode(&self, x: Rows<'_>, codes: &Codes) -> Result<Vec<f32>, CudaError> {
        Self::decode(self, x, codes)
    }
}
