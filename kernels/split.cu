// f32 values as bf16, rounded to nearest, ties to even; with `low`, what that leaves, as bf16 too, so that high + low has 16 bits.
// Grid: n / THREADS. Reads 4 and writes 2 or 4 bytes a value.

__device__ inline u16 to_bf16(float v) {
    u32 bits = __float_as_uint(v);
    // A NaN keeps its upper half, made quiet.
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40u);
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

extern "C" __global__ void split(const float *from, u16 *high, u16 *low, u64 n) {
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float v = from[i];
    u16 rounded = to_bf16(v);
    high[i] = rounded;
    if (low) low[i] = to_bf16(v - __uint_as_float((u32)rounded << 16));
}
