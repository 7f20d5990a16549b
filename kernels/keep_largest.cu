// Of the pre-activations of latents first .. first + width, appends to the list of each row those that can still be among its
// largest; when a list grows too long, only its largest are kept, and the smallest of them is what others must exceed. With
// `of_dead`, only dead latents count and lists are those of AuxK. Ties go to the lower latent. Grid: rows.

// The key of the k-th largest of `count` values, and how many are larger.
__device__ u32 kth_largest(const float *z, u32 count, u32 k, u32 *histogram, u32 *shared_result) {
    u32 prefix = 0, mask = 0, wanted = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u32 key = key_of(z[i]);
            if ((key & mask) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 bin = 255, above = 0;
            while (above + histogram[bin] < wanted) above += histogram[bin--];
            shared_result[0] = bin;
            shared_result[1] = wanted - above;
        }
        __syncthreads();
        prefix |= shared_result[0] << shift;
        wanted = shared_result[1];
        mask |= 255u << shift;
        __syncthreads();
    }
    shared_result[2] = k - wanted;
    __syncthreads();
    return prefix;
}

// Keeps the k largest of a list, in order; returns how many are left.
__device__ u32 thin(u32 *latents, float *z, u32 count, u32 k, u32 *scratch, u32 *histogram, u32 *result) {
    if (count <= k) return count;
    u32 key = kth_largest(z, count, k, histogram, result);
    return keep_top(latents, z, count, key, k - result[2], 0, scratch);
}

extern "C" __global__ void keep_largest(Step s, u32 first, u32 width, u32 leading, u32 of_dead) {
    __shared__ u32 scratch[33], histogram[256], result[3];
    u32 row = blockIdx.x, capacity = of_dead ? s.dead_capacity : s.capacity;
    u32 k = of_dead ? s.largest_dead : s.largest;
    u32 *counts = of_dead ? s.dead_counts : s.kept_counts;
    u32 *latents = (of_dead ? s.dead_latents : s.kept_latents) + (u64)row * capacity;
    float *list = (of_dead ? s.dead_z : s.kept_z) + (u64)row * capacity;
    float *floors = s.floors + (of_dead ? s.n_rows : 0);
    const float *products = s.products + (u64)row * leading;
    u32 kept = counts[row];
    float floor = floors[row];
    for (u32 start = 0; start < width; start += THREADS) {
        u32 column = start + threadIdx.x, latent = first + column;
        bool above = false;
        float z = 0.0f;
        if (column < width && (!of_dead || s.dead[latent])) {
            z = products[column] + s.b_enc[latent];
            above = z > floor;
        }
        u32 total;
        u32 place = kept + block_before(above, scratch, &total);
        if (above) {
            latents[place] = latent;
            list[place] = z;
        }
        kept += total;
        __syncthreads();
        // The next stretch must have room.
        if (kept + THREADS > capacity) {
            kept = thin(latents, list, kept, k, scratch, histogram, result);
            // The smallest of k values: what comes later must exceed it, ties go to the lower latent.
            if (kept >= k) {
                float smallest = list[0];
                for (u32 i = 1; i < kept; i++) smallest = fminf(smallest, list[i]);
                floor = smallest;
            }
            __syncthreads();
        }
    }
    if (first + width >= s.n_latents) kept = thin(latents, list, kept, k, scratch, histogram, result);
    __syncthreads();
    if (threadIdx.x == 0) {
        counts[row] = kept;
        floors[row] = floor;
    }
}

// Marks all but the k largest of a row as reached by multi-TopK alone. Grid: rows.
extern "C" __global__ void mark_multi(Step s, u32 k) {
    __shared__ u32 scratch[33], histogram[256], result[3];
    u32 row = blockIdx.x, count = s.kept_counts[row];
    u32 *latents = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    if (count <= k) return;
    u32 key = kth_largest(z, count, k, histogram, result);
    u32 equal_allowed = k - result[2], equal_seen = 0;
    for (u32 start = 0; start < count; start += THREADS) {
        u32 i = start + threadIdx.x, total;
        u32 mine = i < count ? key_of(z[i]) : 0;
        u32 equal = i < count && mine == key;
        u32 before = equal_seen + block_before(equal, scratch, &total);
        if (i < count && !(mine > key || (equal && before < equal_allowed))) latents[i] |= MULTI;
        equal_seen += total;
    }
}
