// Decodes each row from its active latents, and leaves for every term of the objective the residual that its gradients come from
// (shared/src/loss): one channel a stretch of nested prefixes, then multi-TopK's, the gate's, AuxK's, and the whole dictionary's
// where there are prefixes. Grid: rows. Reads D_OUT values a kept latent, writes D_OUT a channel.

__device__ inline float square(const float *r) {
    float sum = 0.0f;
    for (int j = 0; j < OUT_EACH; j++) sum += r[j] * r[j];
    return sum;
}

__device__ inline void store(float *channel, const float *r) {
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_OUT) channel[c] = r[j];
    }
}

__device__ inline void add_direction(float *r, float factor, const float *direction) {
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_OUT) r[j] += factor * direction[c];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(Step s) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, count = s.kept_counts[row];
    const u32 *latents = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    float *channels = s.channels + (u64)row * s.n_channels * D_OUT;
    float base[OUT_EACH], running[OUT_EACH], other[OUT_EACH];
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        base[j] = 0.0f;
        if (c < D_OUT) {
            float skip = s.base ? s.base[(u64)row * D_OUT + c] : 0.0f;
            base[j] = skip + s.b_dec[c] - s.y[(u64)row * D_OUT + c];
        }
        running[j] = base[j];
    }
    double errors[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
    u32 next = 0;
    for (u32 stretch = 0; stretch < s.n_stretches; stretch++) {
        u32 end = s.stretch_ends[stretch];
        for (; next < count && (latents[next] & ~MULTI) < end; next++) {
            float value = activation(s, latents[next], z[next]);
            if (value > 0.0f) add_direction(running, value, s.w_dec + (u64)(latents[next] & ~MULTI) * D_OUT);
        }
        store(channels + stretch * D_OUT, running);
        errors[1] += (double)s.stretch_weights[stretch] * (double)block_sum(square(running), scratch);
    }
    errors[0] = block_sum(square(running), scratch);
    if (s.whole > 0) {
        // From the residual of each prefix to what its last stretch learns from: the sum over all prefixes that hold it.
        store(channels + s.whole * D_OUT, running);
        for (int j = 0; j < OUT_EACH; j++) other[j] = 0.0f;
        for (int stretch = (int)s.n_stretches - 1; stretch >= 0; stretch--) {
            float *channel = channels + stretch * D_OUT;
            add_direction(other, s.stretch_weights[stretch], channel);
            store(channel, other);
        }
    }
    for (int term = 0; term < 2; term++) {
        int number = term == 0 ? s.multi : s.gate;
        if (number < 0) continue;
        for (int j = 0; j < OUT_EACH; j++) other[j] = base[j];
        for (u32 i = 0; i < count; i++) add_direction(other, z[i], s.w_dec + (u64)(latents[i] & ~MULTI) * D_OUT);
        store(channels + number * D_OUT, other);
        errors[2 + term] = block_sum(square(other), scratch);
    }
    if (s.aux >= 0) {
        const u32 *dead_latents = s.dead_latents + (u64)row * s.dead_capacity;
        const float *dead_z = s.dead_z + (u64)row * s.dead_capacity;
        for (int j = 0; j < OUT_EACH; j++) other[j] = running[j];
        for (u32 i = 0; i < s.dead_counts[row]; i++)
            add_direction(other, dead_z[i], s.w_dec + (u64)dead_latents[i] * D_OUT);
        store(channels + s.aux * D_OUT, other);
        errors[4] = block_sum(square(other), scratch);
    }
    if (threadIdx.x == 0) {
        double *sums = s.row_sums + (u64)row * ROW_SUMS;
        for (int i = 0; i < 5; i++) sums[i] = errors[i];
    }
}
