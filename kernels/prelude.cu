// What every kernel begins with: types, the description of a step, and sums over warps and blocks. No header is included, so that
// the run-time compiler needs no include path. The host defines D_IN, D_OUT (widths) and THREADS (threads of a block, a multiple
// of 32), and mirrors `Step` in native/src/cuda/step.rs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL 0xffffffffu
#define WARPS (THREADS / 32)
// Values of a row that one thread holds.
#define IN_EACH ((D_IN + THREADS - 1) / THREADS)
#define OUT_EACH ((D_OUT + THREADS - 1) / THREADS)
// Blocks that should fit a multiprocessor: two, where what a thread holds leaves the registers for it.
#define MIN_BLOCKS (IN_EACH + OUT_EACH > 20 ? 1 : 2)

// Latent functions.
#define RELU 0
#define JUMPRELU 1
#define GATED 2
#define TOPK 3
#define BATCHTOPK 4

// A latent number with this bit is reached by multi-TopK alone.
#define MULTI 0x80000000u

// Everything a training step reads and writes. Pointers first, then doubles, then 32-bit values: no padding.
struct Step {
    // The batch, and what the encoder reads of it.
    const float *x, *y;
    float *input, *base;
    // Parameters, Adam's second moments, and first ones (null with beta1 = 0).
    float *w_enc, *b_enc, *w_dec, *b_dec, *own0, *own1;
    float *v_w_enc, *v_b_enc, *v_w_dec, *v_b_dec, *v_own0, *v_own1;
    float *m_w_enc, *m_b_enc, *m_w_dec, *m_b_dec, *m_own0, *m_own1;
    // The step that last changed weights, and own parameters, of each latent.
    u32 *weights_step, *own_step;
    // Thresholds, and what pre-activations must exceed to be kept.
    float *thetas, *cuts;
    // Pre-activations of some latents, less their bias: [n_rows, leading].
    float *products;
    // Kept (latent, pre-activation) of each row, [n_rows, capacity], latents ascending; how many.
    u32 *kept_latents;
    float *kept_z;
    u32 *kept_counts;
    // Dead latents kept for AuxK, [n_rows, dead_capacity].
    u32 *dead_latents;
    float *dead_z;
    u32 *dead_counts;
    // The smallest pre-activation that can still be among the largest of its row.
    float *floors;
    // Raised when a row had no room.
    u32 *overflow;
    // Which latents are dead, for AuxK and for the dead-latent loss; null where there is neither.
    const u8 *dead, *pull_dead;
    // Where nested prefixes end, and their weights.
    const u32 *stretch_ends;
    const float *stretch_weights;
    // Residuals, [n_rows, n_channels, D_OUT]; sums of each row, [n_rows, ROW_SUMS]; latents that fired.
    float *channels;
    double *row_sums;
    u8 *fired;
    // What was kept, by latent: offsets [n_latents + 1], a cursor each, keys and values twice (as found, and sorted).
    u32 *offsets, *cursors, *keys, *sorted_keys;
    float *values, *sorted_values;
    // Sums over rows of parts, of what goes through the encoder, and of the input.
    float *partial_bias, *partial_through, *input_sum;
    // Totals of the batch.
    double *totals;
    // Of each row: its layer (null where all layers share thresholds), the weight of its errors (null for 1), and its own unit (null for
    // 1). Of each layer: its rows, and the sparsity weight of one.
    const u32 *layers;
    const float *row_weights, *deviations, *layer_rows, *lambda_per_row;
    // How far a pre-activation in f32 may be off: the norm of each row (null where that decides nothing), and of each latent the factor of
    // the norm and what does not depend on it.
    const float *norms, *margin_scale, *margin_offset;

    double beta2;
    u32 n_rows, n_latents, capacity, dead_capacity;
    u32 kind, pre_bias, n_channels, n_stretches;
    // Channels; -1 where there is none.
    int multi, gate, aux, whole;
    u32 largest, largest_dead, step, log_threshold;
    // Of the norm penalty: lambda, p, and whether directions have any length; p of the mean powers.
    float lambda, power, mean_power_a, mean_power_b;
    u32 has_norm, decoder_norm, unit_directions, n_partials;
    float bandwidth, scale, multi_scale, aux_scale;
    float gate_scale, pull_weight, rows, cut;
    // Adam.
    float lr, own_lr, momentum, momentum_gain;
    float momentum_correction, gain, correction, eps;
    // Parts of the sums over rows; layers with thresholds of their own; whether the encoder bias is trained; whether AuxK is that of
    // multi-layer SAEs.
    u32 n_parts, n_layers, encoder_bias, aux_mlsae;
};

// Sums of a row: squared errors (whole, prefixes, multi, gate, aux), active latents, penalty, two mean powers, and the squared
// distance of the whole error from its own mean, in the row's own unit.
#define ROW_SUMS 10
// Layers with thresholds of their own, at most.
#define MAX_LAYERS 128

__device__ inline float warp_sum(float v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL, v, offset);
    return v;
}

// The sum over the block, for every thread, in a fixed order. `scratch` is shared and holds 32 floats. All threads call it.
__device__ inline float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) total += scratch[warp];
    return total;
}

// How many threads before this one have a count, and how many there are in the block. `scratch` holds 33 numbers.
__device__ inline u32 block_before(u32 count, u32 *scratch, u32 *total) {
    u32 before = count;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        u32 below = __shfl_up_sync(FULL, before, offset);
        if (lane >= offset) before += below;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = before;
    __syncthreads();
    u32 sum = 0, all = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) sum += scratch[i];
        all += scratch[i];
    }
    *total = all;
    return sum + before - count;
}

// Bits that order as the numbers do.
__device__ inline u32 key_of(float z) {
    u32 bits = __float_as_uint(z);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Of a list, keeps what is above `key`, in order, and of values equal to it those before the `allowed`-th, of which `seen` came
// before this list; returns how many are left.
__device__ inline u32 keep_top(u32 *latents, float *z, u32 count, u32 key, u32 allowed, u32 seen, u32 *scratch) {
    u32 kept = 0;
    for (u32 start = 0; start < count; start += THREADS) {
        u32 i = start + threadIdx.x, equal_total, total;
        float value = i < count ? z[i] : 0.0f;
        u32 latent = i < count ? latents[i] : 0;
        u32 mine = key_of(value), equal = i < count && mine == key;
        u32 before = seen + block_before(equal, scratch, &equal_total);
        u32 stays = i < count && (mine > key || (equal && before < allowed));
        u32 place = kept + block_before(stays, scratch, &total);
        // Everything of this stretch has been read, and it is written no further than it was read.
        __syncthreads();
        if (stays) {
            latents[place] = latent;
            z[place] = value;
        }
        kept += total;
        seen += equal_total;
    }
    __syncthreads();
    return kept;
}

__device__ inline u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }

// exp(r_mag) (z - b_enc), the scaled part of a gate's magnitude.
__device__ inline float scaled_magnitude(const Step &s, u32 latent, float z) {
    return expf(s.own0[latent]) * (z - s.b_enc[latent]);
}

// Which of a latent's thresholds are those of a row.
__device__ inline u32 layer_of(const Step &s, u32 row) { return s.layers ? s.layers[row] : 0; }

// The activation of a pre-activation that was kept.
__device__ inline float activation(const Step &s, u32 flagged, float z, u32 layer) {
    if (flagged & MULTI) return 0.0f;
    u32 latent = flagged;
    if (s.kind == JUMPRELU) return z > s.thetas[(u64)latent * s.n_layers + layer] ? z : 0.0f;
    if (s.kind == GATED) return fmaxf(scaled_magnitude(s, latent, z) + s.own1[latent], 0.0f);
    return z;
}

// The gradient of the norm penalty lambda v^p |d| by v; by the direction it is `along` times the direction, where directions have any
// length.
__device__ inline float penalty_of(const Step &s, float v, float length, float *along) {
    *along = 0.0f;
    if (!s.has_norm) return 0.0f;
    float term = s.lambda * powf(v, s.power) * length;
    if (s.decoder_norm && length > 0.0f) *along = term / (length * length) / s.rows;
    return s.power * term / v / s.rows;
}

// What a kept pre-activation that stands for itself gives its latent, `product` being the residual times the direction: the gradient that
// reaches the encoder's product and bias, that of the threshold, and what the penalty adds along the direction; whether weights, and
// whether the threshold, have one.
struct Signal {
    float encoder, own, along;
    bool counts, near;
};

__device__ inline Signal signal_of(const Step &s, u32 latent, u32 layer, float product, float z, float length) {
    Signal q = {0.0f, 0.0f, 0.0f, true, false};
    float g_f = s.scale * product;
    if (s.kind == JUMPRELU) {
        float theta = s.thetas[(u64)latent * s.n_layers + layer];
        q.counts = z > theta;
        q.near = fabsf(z - theta) < s.bandwidth / 2.0f;
        if (q.near) q.own = -(theta * g_f + s.lambda_per_row[layer]) / s.bandwidth;
    }
    if (q.counts) q.encoder = g_f + penalty_of(s, z, length, &q.along);
    return q;
}

// What the dead-latent loss takes back of a row above the threshold: every row below it pulls equally.
__device__ inline float pulled_back(const Step &s, u32 latent, u32 layer, float z) {
    if (!s.pull_dead || !s.pull_dead[latent] || z < s.thetas[(u64)latent * s.n_layers + layer]) return 0.0f;
    return s.pull_weight / s.rows;
}
