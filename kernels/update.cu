// For each latent: its gradients from its entries, their part along the direction taken away, Adam, and the direction made unit
// again. Parameters and moments are read and written once; a latent without gradient is left alone unless there is momentum, and
// its second moment catches up when it next has one. The maths is that of shared/src/loss/backward.rs.
// Grid: parts of `piece` latents. Reads and writes 8 (D_IN + D_OUT) bytes a touched latent and reads 4 (D_IN + D_OUT) an entry.

struct Gradients {
    float product, bias, own1;
    bool touched, own_touched;
};

struct Adam {
    float lr, decay;
};

__device__ inline void adam(const Step &s, const Adam &a, float *p, float *m, float *v, float g) {
    float second = a.decay * *v + s.gain * g * g;
    *v = second;
    if (m) {
        *m = s.momentum * *m + s.momentum_gain * g;
        g = *m * s.momentum_correction;
    }
    *p -= a.lr * g / (sqrtf(second * s.correction) + s.eps);
}

__device__ inline float decay_since(const Step &s, u32 last) { return (float)pow(s.beta2, (double)(s.step - last)); }

__device__ inline u32 channel_of(const Step &s, u32 latent) {
    u32 stretch = 0;
    while (stretch + 1 < s.n_stretches && s.stretch_ends[stretch] <= latent) stretch++;
    return stretch;
}

__device__ inline void load_out(float *r, const float *from) {
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        r[j] = c < D_OUT ? from[c] : 0.0f;
    }
}

__device__ inline float dot_out(const float *a, const float *b, float *scratch) {
    float sum = 0.0f;
    for (int j = 0; j < OUT_EACH; j++) sum += a[j] * b[j];
    return block_sum(sum, scratch);
}

// The gradient of the product w.x' and of the bias reach the encoder.
__device__ inline void to_encoder(const Step &s, u32 row, float product, float bias, float *g_encoder, Gradients &g) {
    const float *input = s.input + (u64)row * D_IN;
    for (int j = 0; j < IN_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_IN) g_encoder[j] += product * input[c];
    }
    g.product += product;
    g.bias += bias;
    g.touched = true;
}

__device__ inline void add(float *to, float factor, const float *what) {
    for (int j = 0; j < OUT_EACH; j++) to[j] += factor * what[j];
}

// Adam's step of one latent, whose gradients are known; the direction without what lies along it, and made unit again.
__device__ inline void step_of(const Step &s, u32 latent, float *direction, float *g_direction, const float *g_encoder, const Gradients &g,
                               const float *g_own, float *through, float *scratch) {
    bool adds = threadIdx.x == 0;
    bool momentum = s.m_w_enc != 0;
    // Own parameters and the step of their last change are read by all before one thread writes them.
    u32 own_last = s.own_step[latent], weights_last = s.weights_step[latent];
    __syncthreads();
    if (g.own_touched || momentum) {
        Adam a = {s.own_lr, decay_since(s, own_last)};
        for (u32 layer = threadIdx.x; layer < s.n_layers; layer += THREADS) {
            u64 at = (u64)latent * s.n_layers + layer;
            float factor = s.kind == JUMPRELU && s.log_threshold ? s.thetas[at] : 1.0f;
            adam(s, a, s.own0 + at, momentum ? s.m_own0 + at : 0, s.v_own0 + at, factor * g_own[layer]);
        }
        if (adds && s.kind == GATED)
            adam(s, a, s.own1 + latent, momentum ? s.m_own1 + latent : 0, s.v_own1 + latent, g.own1);
        if (adds) s.own_step[latent] = s.step;
    }
    if (!g.touched && !momentum) return;
    Adam a = {s.lr, decay_since(s, weights_last)};
    for (int j = 0; j < IN_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c >= D_IN) continue;
        u64 at = (u64)latent * D_IN + c;
        through[j] += g.product * s.w_enc[at];
        adam(s, a, s.w_enc + at, momentum ? s.m_w_enc + at : 0, s.v_w_enc + at, g_encoder[j]);
    }
    if (s.unit_directions) {
        float along = dot_out(g_direction, direction, scratch);
        for (int j = 0; j < OUT_EACH; j++) g_direction[j] -= along * direction[j];
    }
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c >= D_OUT) continue;
        u64 at = (u64)latent * D_OUT + c;
        adam(s, a, &direction[j], momentum ? s.m_w_dec + at : 0, s.v_w_dec + at, g_direction[j]);
    }
    if (s.unit_directions) {
        float norm = sqrtf(dot_out(direction, direction, scratch));
        if (norm > 0.0f)
            for (int j = 0; j < OUT_EACH; j++) direction[j] /= norm;
    }
    for (int j = 0; j < OUT_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_OUT) s.w_dec[(u64)latent * D_OUT + c] = direction[j];
    }
    if (adds) {
        if (s.encoder_bias)
            adam(s, a, s.b_enc + latent, momentum ? s.m_b_enc + latent : 0, s.v_b_enc + latent, g.bias);
        s.weights_step[latent] = s.step;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) update(Step s, u32 piece) {
    __shared__ float scratch[32];
    // Gradients of the first of a latent's own parameters, layer by layer; one thread adds to them.
    __shared__ float g_own[MAX_LAYERS];
    float through[IN_EACH];
    for (int j = 0; j < IN_EACH; j++) through[j] = 0.0f;
    u32 end_latent = min_u32((blockIdx.x + 1) * piece, s.n_latents);
    for (u32 latent = blockIdx.x * piece; latent < end_latent; latent++) {
        u32 start = s.offsets[latent], end = s.offsets[latent + 1];
        bool pulled = s.pull_dead && s.pull_dead[latent];
        if (start == end && !pulled && !s.m_w_enc) continue;
        float direction[OUT_EACH], residual[OUT_EACH], g_direction[OUT_EACH], g_encoder[IN_EACH];
        load_out(direction, s.w_dec + (u64)latent * D_OUT);
        for (int j = 0; j < OUT_EACH; j++) g_direction[j] = 0.0f;
        for (int j = 0; j < IN_EACH; j++) g_encoder[j] = 0.0f;
        Gradients g = {0.0f, 0.0f, 0.0f, false, false};
        float length = 1.0f;
        bool adds = threadIdx.x == 0;
        __syncthreads();
        for (u32 layer = threadIdx.x; layer < s.n_layers; layer += THREADS) g_own[layer] = 0.0f;
        __syncthreads();
        if (s.decoder_norm) length = sqrtf(dot_out(direction, direction, scratch));
        u32 own_channel = channel_of(s, latent);
        for (u32 e = start; e < end; e++) {
            u32 key = s.sorted_keys[e], row = (key & 0x7fffffffu) >> 1;
            bool aux = key >> 31, multi_only = key & 1;
            u32 layer = layer_of(s, row);
            float z = s.sorted_values[e];
            const float *channels = s.channels + (u64)row * s.n_channels * D_OUT;
            if (!aux && !multi_only) {
                load_out(residual, channels + own_channel * D_OUT);
                float product = dot_out(residual, direction, scratch);
                if (s.kind == GATED) {
                    float g_f = s.scale * product, scaled = scaled_magnitude(s, latent, z);
                    float value = scaled + s.own1[latent], g_product = 0.0f, along;
                    if (value > 0.0f) {
                        if (adds) g_own[0] += g_f * scaled;
                        g.own1 += g_f;
                        g_product = g_f * expf(s.own0[latent]);
                        g.own_touched = true;
                    }
                    float penalty = penalty_of(s, z, length, &along);
                    add(g_direction, along, direction);
                    if (value > 0.0f) add(g_direction, value * s.scale, residual);
                    // The decoder is held fixed in the gate's own reconstruction.
                    load_out(residual, channels + s.gate * D_OUT);
                    float g_gate = s.gate_scale * dot_out(residual, direction, scratch) + penalty;
                    to_encoder(s, row, g_product + g_gate, g_gate, g_encoder, g);
                } else {
                    Signal q = signal_of(s, latent, layer, product, z, length);
                    if (adds) g_own[layer] += q.own;
                    if (q.near) g.own_touched = true;
                    if (q.counts) {
                        add(g_direction, q.along, direction);
                        if (z > 0.0f) add(g_direction, z * s.scale, residual);
                        to_encoder(s, row, q.encoder, q.encoder, g_encoder, g);
                    }
                }
            }
            // Terms whose values are pre-activations.
            int number = aux ? s.aux : s.multi;
            if (number >= 0) {
                float scale = aux ? s.aux_scale : s.multi_scale;
                load_out(residual, channels + number * D_OUT);
                float g_z = scale * dot_out(residual, direction, scratch);
                add(g_direction, z * scale, residual);
                to_encoder(s, row, g_z, g_z, g_encoder, g);
            }
        }
        if (pulled) {
            // Every row below the threshold pulls equally: the sum over all rows, less the few above.
            float per_row = s.pull_weight / s.rows;
            for (int j = 0; j < IN_EACH; j++) {
                u32 c = threadIdx.x + j * THREADS;
                if (c < D_IN) g_encoder[j] -= per_row * s.input_sum[c];
            }
            g.product -= s.pull_weight;
            g.bias -= s.pull_weight;
            if (adds)
                for (u32 layer = 0; layer < s.n_layers; layer++) g_own[layer] += per_row * s.layer_rows[layer];
            for (u32 e = start; e < end; e++) {
                u32 key = s.sorted_keys[e];
                u32 row = (key & 0x7fffffffu) >> 1, layer = layer_of(s, row);
                float back = key >> 31 || key & 1 ? 0.0f : pulled_back(s, latent, layer, s.sorted_values[e]);
                if (back == 0.0f) continue;
                to_encoder(s, row, back, back, g_encoder, g);
                if (adds) g_own[layer] -= back;
            }
            g.touched = g.own_touched = true;
        }
        step_of(s, latent, direction, g_direction, g_encoder, g, g_own, through, scratch);
    }
    if (!s.pre_bias) return;
    for (int j = 0; j < IN_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_IN) s.partial_through[(u64)blockIdx.x * D_IN + c] = through[j];
    }
}

// The same from matrix products (dense.cu), of latents first .. first + width, for objectives with one channel: `g_features` has the
// residuals times the directions [n_rows, leading], `g_dec` activations times residuals [width, D_OUT], `g_enc` the gradients of
// pre-activations times inputs [width, D_IN]. Grid: parts of `piece` latents. Reads 4 (D_IN + D_OUT) bytes more a touched latent, and 12 an
// entry.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    update_from_products(Step s, u32 first, u32 width, u32 leading, u32 piece, const float *g_features, const float *g_dec,
                         const float *g_enc, const float *lengths) {
    __shared__ float scratch[32];
    __shared__ float g_own[MAX_LAYERS];
    float through[IN_EACH];
    for (int j = 0; j < IN_EACH; j++) through[j] = 0.0f;
    u32 end_column = min_u32((blockIdx.x + 1) * piece, width);
    for (u32 column = blockIdx.x * piece; column < end_column; column++) {
        u32 latent = first + column, start = s.offsets[latent], end = s.offsets[latent + 1];
        bool pulled = s.pull_dead && s.pull_dead[latent];
        if (start == end && !pulled && !s.m_w_enc) continue;
        float length = s.decoder_norm ? lengths[latent] : 1.0f, per_row = pulled ? s.pull_weight / s.rows : 0.0f;
        float encoder = 0.0f, along = 0.0f, counted = 0.0f, near = 0.0f;
        for (u32 layer = 0; layer < s.n_layers; layer++) {
            float own = 0.0f;
            for (u32 e = start + threadIdx.x; e < end; e += THREADS) {
                u32 row = (s.sorted_keys[e] & 0x7fffffffu) >> 1;
                if (layer_of(s, row) != layer) continue;
                float z = s.sorted_values[e], back = pulled_back(s, latent, layer, z);
                Signal q = signal_of(s, latent, layer, g_features[(u64)row * leading + column], z, length);
                encoder += q.encoder + back;
                own += q.own - back;
                along += q.along;
                if (q.counts) counted = 1.0f;
                if (q.near) near = 1.0f;
            }
            own = block_sum(own, scratch);
            if (threadIdx.x == 0) g_own[layer] = pulled ? own + per_row * s.layer_rows[layer] : own;
        }
        encoder = block_sum(encoder, scratch);
        along = block_sum(along, scratch);
        Gradients g = {encoder, encoder, 0.0f, pulled, pulled};
        if (pulled) g.product = g.bias = encoder - s.pull_weight;
        if (block_sum(counted, scratch) > 0.0f) g.touched = true;
        if (block_sum(near, scratch) > 0.0f) g.own_touched = true;
        float direction[OUT_EACH], g_direction[OUT_EACH], g_encoder[IN_EACH];
        load_out(direction, s.w_dec + (u64)latent * D_OUT);
        load_out(g_direction, g_dec + (u64)column * D_OUT);
        for (int j = 0; j < OUT_EACH; j++) g_direction[j] = s.scale * g_direction[j] + along * direction[j];
        for (int j = 0; j < IN_EACH; j++) {
            u32 c = threadIdx.x + j * THREADS;
            g_encoder[j] = 0.0f;
            if (c < D_IN) g_encoder[j] = g_enc[(u64)column * D_IN + c] - (pulled ? per_row * s.input_sum[c] : 0.0f);
        }
        step_of(s, latent, direction, g_direction, g_encoder, g, g_own, through, scratch);
    }
    if (!s.pre_bias) return;
    // Parts of all stretches of latents are added, one stretch after the other.
    for (int j = 0; j < IN_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        u64 at = (u64)blockIdx.x * D_IN + c;
        if (c < D_IN) s.partial_through[at] = first > 0 ? s.partial_through[at] + through[j] : through[j];
    }
}
