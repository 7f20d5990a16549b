// The skip connection: its gradient is a product of residuals and inputs.

// The residuals that it learns from, [n_rows, D_OUT]. Grid: rows.
extern "C" __global__ void weigh_residuals(Step s, float *out) {
    const float *channels = s.channels + (u64)blockIdx.x * s.n_channels * D_OUT;
    for (u32 c = threadIdx.x; c < D_OUT; c += THREADS) {
        float r = s.scale * channels[c];
        if (s.multi >= 0) r += s.multi_scale * channels[s.multi * D_OUT + c];
        out[(u64)blockIdx.x * D_OUT + c] = r;
    }
}

// Adam's step of a dense array of n values. Grid: n / THREADS.
extern "C" __global__ void update_dense(Step s, float *p, float *m, float *v, const float *g, u64 n) {
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float gradient = g[i], second = (float)s.beta2 * v[i] + s.gain * gradient * gradient;
    v[i] = second;
    if (m) {
        m[i] = s.momentum * m[i] + s.momentum_gain * gradient;
        gradient = m[i] * s.momentum_correction;
    }
    p[i] -= s.lr * gradient / (sqrtf(second * s.correction) + s.eps);
}
