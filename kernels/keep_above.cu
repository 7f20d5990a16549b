// Of the pre-activations of latents first .. first + width, appends those above their cut to the lists of their rows, in order. With
// norms, everything that rounding may have put at or below its cut is kept too.
// A block has one row, so that the order is fixed without atomics. Grid: rows. Reads 4 bytes a pre-activation.
extern "C" __global__ void keep_above(Step s, u32 first, u32 width, u32 leading) {
    __shared__ u32 scratch[33];
    u32 row = blockIdx.x, kept = s.kept_counts[row], layer = layer_of(s, row);
    const float *products = s.products + (u64)row * leading;
    u64 list = (u64)row * s.capacity;
    for (u32 start = 0; start < width; start += 4 * THREADS) {
        float z[4];
        u32 mine = 0;
        for (int j = 0; j < 4; j++) {
            u32 column = start + 4 * threadIdx.x + j;
            bool above = false;
            if (column < width) {
                u32 latent = first + column;
                float cut = s.cuts[(u64)latent * s.n_layers + layer];
                if (s.norms) cut -= s.margin_scale[latent] * s.norms[row] + s.margin_offset[latent];
                z[j] = products[column] + s.b_enc[latent];
                above = z[j] > cut;
            }
            if (above) mine |= 1u << j;
        }
        u32 total;
        u32 place = kept + block_before(__popc(mine), scratch, &total);
        for (int j = 0; j < 4; j++) {
            if (!(mine >> j & 1)) continue;
            if (place < s.capacity) {
                s.kept_latents[list + place] = first + start + 4 * threadIdx.x + j;
                s.kept_z[list + place] = z[j];
            }
            place++;
        }
        kept += total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        s.kept_counts[row] = min_u32(kept, s.capacity);
        if (kept > s.capacity) *s.overflow = 1;
    }
}
