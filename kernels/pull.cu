// The dead-latent loss of each dead latent before its weight: the sum over rows of theta - z, less those few above the threshold.
// Grid: latents. `terms` has a value a latent, zero for the living.
extern "C" __global__ void pull_terms(Step s, double *terms) {
    __shared__ float scratch[32];
    u32 latent = blockIdx.x;
    if (!s.pull_dead[latent]) {
        if (threadIdx.x == 0) terms[latent] = 0.0;
        return;
    }
    float sum = 0.0f, above = 0.0f;
    for (u32 c = threadIdx.x; c < D_IN; c += THREADS) sum += s.w_enc[(u64)latent * D_IN + c] * s.input_sum[c];
    const float *thetas = s.thetas + (u64)latent * s.n_layers;
    double all = 0.0;
    for (u32 layer = 0; layer < s.n_layers; layer++) all += (double)thetas[layer] * (double)s.layer_rows[layer];
    for (u32 e = s.offsets[latent] + threadIdx.x; e < s.offsets[latent + 1]; e += THREADS) {
        u32 row = (s.sorted_keys[e] & 0x7fffffffu) >> 1;
        above += fmaxf(s.sorted_values[e] - thetas[layer_of(s, row)], 0.0f);
    }
    sum = block_sum(sum, scratch);
    above = block_sum(above, scratch);
    if (threadIdx.x == 0)
        terms[latent] = all - (double)s.rows * (double)s.b_enc[latent] - (double)sum + (double)above;
}
