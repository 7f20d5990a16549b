// The dense route of a step: decoding and the gradients of both weights as matrix products of some latents at a time. These kernels
// make its factors from the lists of what was kept, and take what the lists need from its results. Objectives have one channel.

// Residuals before any latent is decoded: b_dec + skip - y. Grid: rows.
extern "C" __global__ void dense_base(Step s) {
    u64 start = (u64)blockIdx.x * D_OUT;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS)
        s.channels[start + c] = (s.base ? s.base[start + c] : 0.0f) + s.b_dec[c] - s.y[start + c];
}

// Activations of latents first .. first + width: [n_rows, leading], zeros where there is none. Grid: rows.
extern "C" __global__ void dense_activations(Step s, u32 first, u32 width, u32 leading, float *dense) {
    u32 row = blockIdx.x, layer = layer_of(s, row);
    const u32 *latents = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    float *values = dense + (u64)row * leading;
    for (u32 i = threadIdx.x; i < width; i += THREADS) values[i] = 0.0f;
    __syncthreads();
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) {
        u32 column = latents[i] - first;
        if (latents[i] >= first && column < width) values[column] = fmaxf(activation(s, latents[i], z[i], layer), 0.0f);
    }
}

// Squared errors of rows, whose residuals are decoded. Grid: rows.
extern "C" __global__ void dense_errors(Step s) {
    __shared__ float scratch[32];
    const float *residual = s.channels + (u64)blockIdx.x * D_OUT;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) sum += residual[c] * residual[c];
    sum = block_sum(sum, scratch);
    if (threadIdx.x > 0) return;
    double *sums = s.row_sums + (u64)blockIdx.x * ROW_SUMS;
    sums[0] = sum;
    sums[1] = (double)s.stretch_weights[0] * (double)sum;
    for (int i = 2; i < 5; i++) sums[i] = 0.0;
    sums[9] = 0.0;
}

// In place of the activations of latents first .. first + width, the gradients of their pre-activations; `g_features` has the products
// of residuals and directions, [n_rows, leading] as well. Grid: rows.
extern "C" __global__ void dense_signals(Step s, u32 first, u32 width, u32 leading, float *dense, const float *g_features,
                                         const float *lengths) {
    u32 row = blockIdx.x, layer = layer_of(s, row);
    const u32 *latents = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) {
        u32 latent = latents[i], column = latent - first;
        if (latent < first || column >= width) continue;
        float length = s.decoder_norm ? lengths[latent] : 1.0f;
        u64 at = (u64)row * leading + column;
        dense[at] = signal_of(s, latent, layer, g_features[at], z[i], length).encoder + pulled_back(s, latent, layer, z[i]);
    }
}
