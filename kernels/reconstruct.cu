// Reconstructions [rows, D_OUT] of released autoencoders from codes: entries offsets[row] .. offsets[row + 1] of latents and values.
// `undo` has the scale and the shift that put a row back on its own scale, `skip` what the skip connection adds (null for none):
// scale (b_dec + sum of value times direction) + shift + skip. Grid: rows. Reads D_OUT values an entry, in the order of the entries.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    reconstruct(const u32 *offsets, const u32 *latents, const float *values, const float *w_dec, const float *b_dec, const float *undo,
                const float *skip, float *out) {
    u32 row = blockIdx.x;
    float sum[OUT_EACH];
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        sum[j] = c < D_OUT ? b_dec[c] : 0.0f;
    }
    for (u32 e = offsets[row]; e < offsets[row + 1]; e++) {
        const float *direction = w_dec + (u64)latents[e] * D_OUT;
        float value = values[e];
        for (int j = 0; j < OUT_EACH; j++) {
            u32 c = threadIdx.x + j * THREADS;
            if (c < D_OUT) sum[j] += value * direction[c];
        }
    }
    float scale = undo[2 * row], shift = undo[2 * row + 1];
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c >= D_OUT) continue;
        u64 at = (u64)row * D_OUT + c;
        out[at] = scale * sum[j] + shift + (skip ? skip[at] : 0.0f);
    }
}
