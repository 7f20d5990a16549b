// The decoder bias: its gradient is the sum of residuals over rows, less, with a pre-bias, what every encoder row that was used
// feels of it. Sums go over parts first, in a fixed order.

// Sums of 32 rows each of the residuals. Grid: rows / 32.
extern "C" __global__ void sum_residuals(Step s) {
    u32 end = min_u32((blockIdx.x + 1) * 32, s.n_rows);
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) {
        float sum = 0.0f;
        for (u32 row = blockIdx.x * 32; row < end; row++) {
            const float *channels = s.channels + (u64)row * s.n_channels * D_OUT;
            sum += s.scale * channels[c];
            if (s.multi >= 0) sum += s.multi_scale * channels[s.multi * D_OUT + c];
            // Only the AuxK of multi-layer SAEs decodes with the bias.
            if (s.aux_mlsae) sum += s.aux_scale * channels[s.aux * D_OUT + c];
        }
        s.partial_bias[(u64)blockIdx.x * D_OUT + c] = sum;
    }
}

// Adam's step of the bias. Grid: D_OUT / THREADS.
extern "C" __global__ void update_bias(Step s) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= D_OUT) return;
    float g = 0.0f;
    for (u32 part = 0; part < s.n_parts; part++) g += s.partial_bias[(u64)part * D_OUT + c];
    if (s.pre_bias)
        for (u32 part = 0; part < s.n_partials; part++) g -= s.partial_through[(u64)part * D_IN + c];
    float second = (float)s.beta2 * s.v_b_dec[c] + s.gain * g * g;
    s.v_b_dec[c] = second;
    if (s.m_b_dec) {
        s.m_b_dec[c] = s.momentum * s.m_b_dec[c] + s.momentum_gain * g;
        g = s.m_b_dec[c] * s.momentum_correction;
    }
    s.b_dec[c] -= s.lr * g / (sqrtf(second * s.correction) + s.eps);
}
