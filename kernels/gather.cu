// Batches from raw vectors: rows chosen by number, put on their scale; and sums of rows, as the host takes them.

// A tap of a shard: its values, the scale and shift of each row (null where rows are not scaled on their own), and what values are
// multiplied by in the end. Mirrored in native/src/cuda/feed.rs.
struct Tap {
    const void *values;
    const double *own;
    float inverse;
    u32 unused;
};

// Types of the values.
#define TYPE_F32 0
#define TYPE_BF16 1

struct alignas(16) Four { float x, y, z, w; };
struct alignas(8) FourHalves { u16 x, y, z, w; };

__device__ inline float from_half(u32 half, u32 type) {
    if (type == TYPE_BF16) return __uint_as_float(half << 16);
    u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 1023u;
    // Below the smallest normal number: a multiple of 2^-24, which f32 holds exactly.
    if (exponent == 0) return __uint_as_float(__float_as_uint((float)mantissa * 5.9604644775390625e-8f) | sign);
    // No number, made quiet, or infinite.
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u));
    return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// What becomes of every value of a row.
struct Scaling { bool own; double divisor, shift; float inverse; };

// The same roundings as on the host: a difference, a quotient and its f32, a product.
__device__ inline float scaled(float v, const Scaling &by) {
    if (by.own) v = by.divisor == 0.0 ? 0.0f : (float)(((double)v - by.shift) / by.divisor);
    return v * by.inverse;
}

// Example i * n_rows + r is row r of input i. Of a row's own scale and shift, eps is added to the scale. Grid: rows of the batch. Reads
// 2 or 4 and writes 4 bytes a value.
extern "C" __global__ void gather(const Tap *taps, const u32 *examples, float *out, u32 n_rows, u32 width, u32 type, float eps) {
    u32 example = examples[blockIdx.x], row = example % n_rows;
    const Tap tap = taps[example / n_rows];
    Scaling by = {tap.own != 0, 1.0, 0.0, tap.inverse};
    if (by.own) {
        by.divisor = tap.own[2 * (u64)row] + (double)eps;
        by.shift = tap.own[2 * (u64)row + 1];
    }
    u64 from = (u64)row * width, to = (u64)blockIdx.x * width;
    if (width % 4 != 0) {
        for (u32 c = threadIdx.x; c < width; c += THREADS) {
            float v = type == TYPE_F32 ? ((const float *)tap.values)[from + c]
                                       : from_half(((const u16 *)tap.values)[from + c], type);
            out[to + c] = scaled(v, by);
        }
        return;
    }
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * THREADS) {
        Four v;
        if (type == TYPE_F32) {
            v = *(const Four *)((const float *)tap.values + from + c);
        } else {
            FourHalves h = *(const FourHalves *)((const u16 *)tap.values + from + c);
            v = {from_half(h.x, type), from_half(h.y, type), from_half(h.z, type), from_half(h.w, type)};
        }
        *(Four *)(out + to + c) = {scaled(v.x, by), scaled(v.y, by), scaled(v.z, by), scaled(v.w, by)};
    }
}

// The sum of each row and that of its squares, value after value: a thread a row, in f64. Products of f32 are exact in it, so that a
// fused addition changes nothing. Grid: n_rows / threads. Reads 4 bytes a value.
extern "C" __global__ void row_moments(const float *rows, double *moments, u32 n_rows, u32 width) {
    u32 row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= n_rows) return;
    double whole = -0.0, squares = -0.0;
    for (u32 c = 0; c < width; c++) {
        double v = rows[(u64)row * width + c];
        whole += v;
        squares += v * v;
    }
    moments[2 * (u64)row] = whole;
    moments[2 * (u64)row + 1] = squares;
}
