// input = x - b_dec, what an encoder with a pre-bias reads. Grid: rows. Reads and writes 4 bytes a value.
extern "C" __global__ void center(Step s) {
    u64 start = (u64)blockIdx.x * D_IN;
    for (u32 c = threadIdx.x; c < D_IN; c += THREADS) s.input[start + c] = s.x[start + c] - s.b_dec[c];
}
