// theta = exp(parameter) or the parameter itself, and the cut of each latent: theta less half the straight-through window. Latents
// without a threshold share one cut. Where layers have thresholds of their own, all of them, latent by latent.
// Grid: latents * layers / THREADS. Reads 4 bytes and writes 8 a latent.
extern "C" __global__ void thresholds(Step s) {
    u32 latent = blockIdx.x * THREADS + threadIdx.x;
    if (latent >= s.n_latents * s.n_layers) return;
    if (s.kind != JUMPRELU) {
        s.thetas[latent] = 0.0f;
        s.cuts[latent] = s.cut;
        return;
    }
    float theta = s.own0[latent];
    if (s.log_threshold) theta = (float)exp((double)theta);
    s.thetas[latent] = theta;
    s.cuts[latent] = theta - s.bandwidth / 2.0f;
}
