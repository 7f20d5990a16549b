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
        const float *thetas = s.thetas + (u64)latent * s.n_layers;
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
            float theta = thetas[layer];
            float z = s.sorted_values[e];
            const float *channels = s.channels + (u64)row * s.n_channels * D_OUT;
            if (!aux && !multi_only) {
                load_out(residual, channels + own_channel * D_OUT);
                float g_f = s.scale * dot_out(residual, direction, scratch), value = z, g_product = g_f, g_gate = 0.0f;
                bool counts = true;
                if (s.kind == JUMPRELU) {
                    counts = z > theta;
                    if (fabsf(z - theta) < s.bandwidth / 2.0f) {
                        if (adds) g_own[layer] -= (theta * g_f + s.lambda_per_row[layer]) / s.bandwidth;
                        g.own_touched = true;
                    }
                } else if (s.kind == GATED) {
                    float scaled = scaled_magnitude(s, latent, z);
                    value = scaled + s.own1[latent];
                    g_product = 0.0f;
                    if (value > 0.0f) {
                        if (adds) g_own[0] += g_f * scaled;
                        g.own1 += g_f;
                        g_product = g_f * expf(s.own0[latent]);
                        g.own_touched = true;
                    }
                }
                if (counts) {
                    float penalty = 0.0f;
                    if (s.has_norm) {
                        // lambda v^p |d|, by v and, where directions have any length, by d.
                        float term = s.lambda * powf(z, s.power) * length;
                        if (s.decoder_norm && length > 0.0f) {
                            float factor = term / (length * length) / s.rows;
                            for (int j = 0; j < OUT_EACH; j++) g_direction[j] += factor * direction[j];
                        }
                        penalty = s.power * term / z / s.rows;
                    }
                    if (value > 0.0f)
                        for (int j = 0; j < OUT_EACH; j++) g_direction[j] += value * s.scale * residual[j];
                    if (s.gate >= 0) {
                        // The decoder is held fixed in the gate's own reconstruction.
                        load_out(residual, channels + s.gate * D_OUT);
                        g_gate = s.gate_scale * dot_out(residual, direction, scratch);
                        to_encoder(s, row, g_product + g_gate + penalty, g_gate + penalty, g_encoder, g);
                    } else {
                        to_encoder(s, row, g_f + penalty, g_f + penalty, g_encoder, g);
                    }
                }
            }
            // Terms whose values are pre-activations.
            int number = aux ? s.aux : s.multi;
            if (number >= 0) {
                float scale = aux ? s.aux_scale : s.multi_scale;
                load_out(residual, channels + number * D_OUT);
                float g_z = scale * dot_out(residual, direction, scratch);
                for (int j = 0; j < OUT_EACH; j++) g_direction[j] += z * scale * residual[j];
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
                if (key >> 31 || key & 1 || s.sorted_values[e] < thetas[layer]) continue;
                to_encoder(s, row, per_row, per_row, g_encoder, g);
                if (adds) g_own[layer] -= per_row;
            }
            g.touched = g.own_touched = true;
        }
        bool momentum = s.m_w_enc != 0;
        // Own parameters and the step of their last change are read by all before one thread writes them.
        u32 own_last = s.own_step[latent], weights_last = s.weights_step[latent];
        __syncthreads();
        if (g.own_touched || momentum) {
            Adam a = {s.own_lr, decay_since(s, own_last)};
            for (u32 layer = threadIdx.x; layer < s.n_layers; layer += THREADS) {
                u64 at = (u64)latent * s.n_layers + layer;
                float factor = s.kind == JUMPRELU && s.log_threshold ? thetas[layer] : 1.0f;
                adam(s, a, s.own0 + at, momentum ? s.m_own0 + at : 0, s.v_own0 + at, factor * g_own[layer]);
            }
            if (adds && s.kind == GATED)
                adam(s, a, s.own1 + latent, momentum ? s.m_own1 + latent : 0, s.v_own1 + latent, g.own1);
            if (adds) s.own_step[latent] = s.step;
        }
        if (!g.touched && !momentum) continue;
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
    if (!s.pre_bias) return;
    for (int j = 0; j < IN_EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < D_IN) s.partial_through[(u64)blockIdx.x * D_IN + c] = through[j];
    }
}
