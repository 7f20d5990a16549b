// Sums of columns over all rows, in double precision and in order. Grid: columns / THREADS.

// Of the residuals of the whole dictionary: sums [D_OUT], from which the variance that AuxK is measured by follows.
extern "C" __global__ void residual_sums(Step s, double *sums) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= D_OUT) return;
    double sum = 0.0;
    for (u32 row = 0; row < s.n_rows; row++) sum += s.channels[((u64)row * s.n_channels + s.whole) * D_OUT + c];
    sums[c] = sum;
}

// Of what the encoder reads, for the dead-latent loss.
extern "C" __global__ void input_sums(Step s) {
    u32 c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= D_IN) return;
    double sum = 0.0;
    for (u32 row = 0; row < s.n_rows; row++) sum += s.input[(u64)row * D_IN + c];
    s.input_sum[c] = (float)sum;
}
