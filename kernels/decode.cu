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

// Multiplies a channel of this row; each thread the values that it wrote.
__device__ inline void weigh(float *channel, float weight) {
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_OUT) channel[c] *= weight;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(Step s) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, count = s.kept_counts[row], layer = layer_of(s, row);
    float weight = s.row_weights ? s.row_weights[row] : 1.0f;
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
    double errors[5] = {0.0, 0.0, 0.0, 0.0, 0.0}, own = 0.0;
    u32 next = 0;
    for (u32 stretch = 0; stretch < s.n_stretches; stretch++) {
        u32 end = s.stretch_ends[stretch];
        for (; next < count && (latents[next] & ~MULTI) < end; next++) {
            float value = activation(s, latents[next], z[next], layer);
            if (value > 0.0f) add_direction(running, value, s.w_dec + (u64)(latents[next] & ~MULTI) * D_OUT);
        }
        store(channels + stretch * D_OUT, running);
        errors[1] += (double)weight * (double)s.stretch_weights[stretch] * (double)block_sum(square(running), scratch);
    }
    errors[0] = block_sum(square(running), scratch);
    if (s.whole > 0) store(channels + s.whole * D_OUT, running);
    if (s.n_stretches > 1 || s.stretch_weights[0] != 1.0f) {
        // From the residual of each prefix to what its last stretch learns from: the sum over all prefixes that hold it.
        for (int j = 0; j < OUT_EACH; j++) other[j] = 0.0f;
        for (int stretch = (int)s.n_stretches - 1; stretch >= 0; stretch--) {
            float *channel = channels + stretch * D_OUT;
            add_direction(other, s.stretch_weights[stretch], channel);
            store(channel, other);
        }
    }
    for (u32 stretch = 0; weight != 1.0f && stretch < s.n_stretches; stretch++) weigh(channels + stretch * D_OUT, weight);
    for (int term = 0; term < 2; term++) {
        int number = term == 0 ? s.multi : s.gate;
        if (number < 0) continue;
        for (int j = 0; j < OUT_EACH; j++) other[j] = base[j];
        for (u32 i = 0; i < count; i++) add_direction(other, z[i], s.w_dec + (u64)(latents[i] & ~MULTI) * D_OUT);
        store(channels + number * D_OUT, other);
        errors[2 + term] = (double)weight * (double)block_sum(square(other), scratch);
        if (weight != 1.0f) weigh(channels + number * D_OUT, weight);
    }
    if (s.aux >= 0) {
        const u32 *dead_latents = s.dead_latents + (u64)row * s.dead_capacity;
        const float *dead_z = s.dead_z + (u64)row * s.dead_capacity;
        float deviation = s.deviations ? s.deviations[row] : 1.0f;
        for (int j = 0; j < OUT_EACH; j++) {
            u32 c = threadIdx.x + j * THREADS;
            other[j] = running[j];
            if (s.aux_mlsae && c < D_OUT) other[j] = other[j] * deviation + s.b_dec[c];
        }
        for (u32 i = 0; i < s.dead_counts[row]; i++)
            add_direction(other, dead_z[i], s.w_dec + (u64)dead_latents[i] * D_OUT);
        store(channels + s.aux * D_OUT, other);
        errors[4] = block_sum(square(other), scratch);
        if (s.aux_mlsae) {
            float sum = 0.0f, squares = 0.0f;
            for (int j = 0; j < OUT_EACH; j++) sum += running[j];
            float mean = block_sum(sum, scratch) / D_OUT;
            for (int j = 0; j < OUT_EACH; j++)
                if (threadIdx.x + j * THREADS < D_OUT) squares += (running[j] - mean) * (running[j] - mean);
            own = (double)deviation * (double)deviation * (double)block_sum(squares, scratch);
        }
    }
    if (threadIdx.x == 0) {
        double *sums = s.row_sums + (u64)row * ROW_SUMS;
        for (int i = 0; i < 5; i++) sums[i] = errors[i];
        sums[9] = own;
    }
}

// The error that AuxK of multi-layer SAEs reconstructs is not constant: its gradient in the reconstruction is added to what all latents
// learn from. With c the channel of AuxK, r the whole error, d the row's unit, A and B the mean squares of c and of what is left:
// w (d c / B - A / B^2 d^2 (r - mean r)). Grid: rows.
extern "C" __global__ void push_back(Step s, float over_below, float over_above) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x;
    float *channels = s.channels + (u64)row * s.n_channels * D_OUT;
    const float *whole = channels + s.whole * D_OUT, *aux = channels + s.aux * D_OUT;
    float deviation = s.deviations ? s.deviations[row] : 1.0f, sum = 0.0f;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) sum += whole[c];
    float mean = block_sum(sum, scratch) / D_OUT;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) {
        float pushed = over_below * deviation * aux[c] - over_above * deviation * deviation * (whole[c] - mean);
        for (u32 stretch = 0; stretch < s.n_stretches; stretch++) channels[stretch * D_OUT + c] += pushed;
    }
}
