// BatchTopK: of all pre-activations kept, the k N largest; ties go to earlier rows, then to lower latents. Which are worth keeping is
// counted first where no batch before says it.

// Counts the positive pre-activations of latents first .. first + width by the upper 12 bits below their sign: a bin is a sixteenth of
// an octave. Grid: rows. Reads 4 bytes a pre-activation.
extern "C" __global__ void batch_count(Step s, u32 first, u32 width, u32 leading, u64 *histogram) {
    __shared__ u32 counts[4096];
    for (u32 i = threadIdx.x; i < 4096; i += THREADS) counts[i] = 0;
    __syncthreads();
    const float *products = s.products + (u64)blockIdx.x * leading;
    for (u32 column = threadIdx.x; column < width; column += THREADS) {
        float z = products[column] + s.b_enc[first + column];
        if (z > 0.0f) atomicAdd(&counts[__float_as_uint(z) >> 19], 1u);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 4096; i += THREADS)
        if (counts[i]) atomicAdd(&histogram[i], (u64)counts[i]);
}

// Counts values by the 8 bits of their key at `shift`, among those whose higher bits are `prefix`. Grid: rows. Integer sums do
// not depend on their order.
extern "C" __global__ void batch_histogram(Step s, u32 prefix, u32 mask, u32 shift, u32 *histogram) {
    __shared__ u32 counts[256];
    for (u32 i = threadIdx.x; i < 256; i += THREADS) counts[i] = 0;
    __syncthreads();
    u32 row = blockIdx.x;
    const float *z = s.kept_z + (u64)row * s.capacity;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) {
        u32 key = key_of(z[i]);
        if ((key & mask) == prefix) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 256; i += THREADS)
        if (counts[i]) atomicAdd(&histogram[i], counts[i]);
}

// How many values of each row have this key. Grid: rows.
extern "C" __global__ void batch_equal(Step s, u32 key, u32 *equal) {
    __shared__ u32 count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    u32 row = blockIdx.x;
    const float *z = s.kept_z + (u64)row * s.capacity;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS)
        if (key_of(z[i]) == key) atomicAdd(&count, 1u);
    __syncthreads();
    if (threadIdx.x == 0) equal[row] = count;
}

// Keeps what is above the key, and of those equal to it the first `allowed` of the batch; `before` has how many of them earlier
// rows have. Grid: rows.
extern "C" __global__ void batch_retain(Step s, u32 key, u32 allowed, const u32 *before) {
    __shared__ u32 scratch[33];
    u32 row = blockIdx.x, count = s.kept_counts[row];
    u32 *latents = s.kept_latents + (u64)row * s.capacity;
    float *z = s.kept_z + (u64)row * s.capacity;
    u32 kept = keep_top(latents, z, count, key, allowed, before[row], scratch);
    if (threadIdx.x == 0) s.kept_counts[row] = kept;
}
