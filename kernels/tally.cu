// What a batch is told by: active latents, the norm penalty and mean powers of each row, the latents that fired; and the totals.

// Grid: rows. Reads 8 bytes a kept latent. With a penalty by the length of directions, `lengths` has those.
extern "C" __global__ void tally(Step s, const float *lengths) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, layer = layer_of(s, row);
    const u32 *latents = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    float active = 0.0f, penalty = 0.0f, power_a = 0.0f, power_b = 0.0f;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) {
        float value = activation(s, latents[i], z[i], layer);
        if (value > 0.0f) {
            active += 1.0f;
            s.fired[latents[i]] = 1;
        }
        float penalised = s.kind == GATED ? z[i] : value;
        if (s.has_norm && penalised > 0.0f) {
            float length = s.decoder_norm ? lengths[latents[i]] : 1.0f;
            penalty += s.lambda * powf(penalised, s.power) * length;
            power_a += powf(penalised, s.mean_power_a);
            power_b += powf(penalised, s.mean_power_b);
        }
    }
    active = block_sum(active, scratch);
    penalty = block_sum(penalty, scratch);
    power_a = block_sum(power_a, scratch);
    power_b = block_sum(power_b, scratch);
    if (threadIdx.x == 0) {
        double *sums = s.row_sums + (u64)row * ROW_SUMS;
        sums[5] = active;
        sums[6] = penalty;
        sums[7] = power_a;
        sums[8] = power_b;
    }
}

// Sums each column of `rows` rows of doubles, in order. Grid: 1.
extern "C" __global__ void totals(Step s) {
    __shared__ double partial[THREADS];
    for (u32 column = 0; column < ROW_SUMS; column++) {
        double sum = 0.0;
        for (u32 row = threadIdx.x; row < s.n_rows; row += THREADS) sum += s.row_sums[(u64)row * ROW_SUMS + column];
        __syncthreads();
        partial[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0.0;
            for (u32 i = 0; i < THREADS; i++) total += partial[i];
            s.totals[column] = total;
        }
    }
}

// The length of each latent's direction. Grid: latents.
extern "C" __global__ void lengths(Step s, float *lengths) {
    __shared__ float scratch[32];
    u32 latent = blockIdx.x;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) {
        float value = s.w_dec[(u64)latent * D_OUT + c];
        sum += value * value;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) lengths[latent] = sqrtf(sum);
}
