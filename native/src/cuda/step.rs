//! What a kernel is told: the mirror of `struct Step` in `kernels/prelude.cu`, field by field.

use bytemuck::{Pod, Zeroable};

/// An address in the device's memory; 0 is none.
pub type Address = u64;

/// Everything a training step reads and writes. Addresses first, then doubles, then 32-bit values: no padding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "kernels/prelude.cu describes every field")]
pub struct Step {
    pub x: Address,
    pub y: Address,
    pub input: Address,
    pub base: Address,
    pub w_enc: Address,
    pub b_enc: Address,
    pub w_dec: Address,
    pub b_dec: Address,
    pub own0: Address,
    pub own1: Address,
    pub v_w_enc: Address,
    pub v_b_enc: Address,
    pub v_w_dec: Address,
    pub v_b_dec: Address,
    pub v_own0: Address,
    pub v_own1: Address,
    pub m_w_enc: Address,
    pub m_b_enc: Address,
    pub m_w_dec: Address,
    pub m_b_dec: Address,
    pub m_own0: Address,
    pub m_own1: Address,
    pub weights_step: Address,
    pub own_step: Address,
    pub thetas: Address,
    pub cuts: Address,
    pub products: Address,
    pub kept_latents: Address,
    pub kept_z: Address,
    pub kept_counts: Address,
    pub dead_latents: Address,
    pub dead_z: Address,
    pub dead_counts: Address,
    pub floors: Address,
    pub overflow: Address,
    pub dead: Address,
    pub pull_dead: Address,
    pub stretch_ends: Address,
    pub stretch_weights: Address,
    pub channels: Address,
    pub row_sums: Address,
    pub fired: Address,
    pub offsets: Address,
    pub cursors: Address,
    pub keys: Address,
    pub sorted_keys: Address,
    pub values: Address,
    pub sorted_values: Address,
    pub partial_bias: Address,
    pub partial_through: Address,
    pub input_sum: Address,
    pub totals: Address,
    pub layers: Address,
    pub row_weights: Address,
    pub deviations: Address,
    pub layer_rows: Address,
    pub lambda_per_row: Address,
    pub norms: Address,
    pub margin_scale: Address,
    pub margin_offset: Address,
    pub beta2: f64,
    pub n_rows: u32,
    pub n_latents: u32,
    pub capacity: u32,
    pub dead_capacity: u32,
    pub kind: u32,
    pub pre_bias: u32,
    pub n_channels: u32,
    pub n_stretches: u32,
    pub multi: i32,
    pub gate: i32,
    pub aux: i32,
    pub whole: i32,
    pub largest: u32,
    pub largest_dead: u32,
    pub step: u32,
    pub log_threshold: u32,
    pub lambda: f32,
    pub power: f32,
    pub mean_power_a: f32,
    pub mean_power_b: f32,
    pub has_norm: u32,
    pub decoder_norm: u32,
    pub unit_directions: u32,
    pub n_partials: u32,
    pub bandwidth: f32,
    pub scale: f32,
    pub multi_scale: f32,
    pub aux_scale: f32,
    pub gate_scale: f32,
    pub pull_weight: f32,
    pub rows: f32,
    pub cut: f32,
    pub lr: f32,
    pub own_lr: f32,
    pub momentum: f32,
    pub momentum_gain: f32,
    pub momentum_correction: f32,
    pub gain: f32,
    pub correction: f32,
    pub eps: f32,
    pub n_parts: u32,
    pub n_layers: u32,
    pub encoder_bias: u32,
    pub aux_mlsae: u32,
}

/// A latent number with this bit is reached by multi-TopK alone.
pub const MULTI: u32 = 1 << 31;
/// Sums of a row: squared errors (whole, prefixes, multi, gate, aux), active latents, penalty, two mean powers, and the squared
/// distance of the whole error from its own mean, in the row's own unit.
pub const ROW_SUMS: usize = 10;
/// The number with these ordered bits: the inverse of `key_of` in `kernels/prelude.cu`.
#[must_use]
pub fn of_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ (1 << 31) } else { !key })
}

/// Layers with thresholds of their own, at most.
pub const MAX_LAYERS: usize = 128;
