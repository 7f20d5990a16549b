// From lists of rows to lists of latents: what a latent learns from, rows ascending, AuxK's after the others. Counting and placing
// use integer atomics, whose result is then sorted, so that the same batch gives the same order.

// Key of an entry: AuxK or not, row, multi-TopK alone or not.
__device__ inline u32 entry_key(u32 row, bool aux, bool multi) { return (aux ? 1u << 31 : 0u) | row << 1 | (multi ? 1u : 0u); }

// Grid: rows. `cursors` has zeros.
extern "C" __global__ void count_entries(Step s) {
    u32 row = blockIdx.x;
    const u32 *kept = s.kept_latents + (u64)row * s.capacity;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) atomicAdd(&s.cursors[kept[i] & ~MULTI], 1u);
    if (s.aux < 0) return;
    const u32 *dead = s.dead_latents + (u64)row * s.dead_capacity;
    for (u32 i = threadIdx.x; i < s.dead_counts[row]; i += THREADS) atomicAdd(&s.cursors[dead[i]], 1u);
}

// offsets[i] = the sum of counts before i, for i up to n. Grid: 1.
extern "C" __global__ void scan(const u32 *counts, u32 *offsets, u32 n) {
    __shared__ u32 scratch[33];
    u32 before = 0;
    for (u32 start = 0; start < n; start += THREADS) {
        u32 i = start + threadIdx.x, total;
        u32 count = i < n ? counts[i] : 0;
        u32 place = before + block_before(count, scratch, &total);
        if (i < n) offsets[i] = place;
        before += total;
    }
    if (threadIdx.x == 0) offsets[n] = before;
}

// Grid: rows. `cursors` has zeros again.
extern "C" __global__ void place_entries(Step s) {
    u32 row = blockIdx.x;
    const u32 *kept = s.kept_latents + (u64)row * s.capacity;
    const float *z = s.kept_z + (u64)row * s.capacity;
    for (u32 i = threadIdx.x; i < s.kept_counts[row]; i += THREADS) {
        u32 latent = kept[i] & ~MULTI, place = s.offsets[latent] + atomicAdd(&s.cursors[latent], 1u);
        s.keys[place] = entry_key(row, false, kept[i] & MULTI);
        s.values[place] = z[i];
    }
    if (s.aux < 0) return;
    const u32 *dead = s.dead_latents + (u64)row * s.dead_capacity;
    const float *dead_z = s.dead_z + (u64)row * s.dead_capacity;
    for (u32 i = threadIdx.x; i < s.dead_counts[row]; i += THREADS) {
        u32 place = s.offsets[dead[i]] + atomicAdd(&s.cursors[dead[i]], 1u);
        s.keys[place] = entry_key(row, true, false);
        s.values[place] = dead_z[i];
    }
}

// Puts the entries of each latent in order, by counting how many keys are smaller: lists are short. Grid: latents.
extern "C" __global__ void sort_entries(Step s) {
    u32 start = s.offsets[blockIdx.x], n = s.offsets[blockIdx.x + 1] - start;
    const u32 *keys = s.keys + start;
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        u32 key = keys[i], rank = 0;
        for (u32 other = 0; other < n; other++) rank += keys[other] < key;
        s.sorted_keys[start + rank] = key;
        s.sorted_values[start + rank] = s.values[start + i];
    }
}
