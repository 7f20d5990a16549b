// Encoder product with the threshold fused: every (row, latent) whose pre-activation may be active.
//
//   z = W_enc x + b_enc            kept when z > threshold - margin
//
// The margin bounds the f32 error of z, so what is kept is a superset of the exact active set; the
// host decides the few inside the margin in f64. A workgroup computes a 64 x 64 tile of z, each of
// its 16 x 16 invocations a 4 x 4 grid of it, and reserves room for its hits with one atomic.
// `count` goes on past the capacity: the host then grows the list and runs again.

struct Params {
    n_rows: u32,        // rows of x in this dispatch
    width_vec4: u32,    // d_in / 4, rounded up; the rest of x and w_enc is zero
    n_latents: u32,     // latents in this block of the encoder
    first_latent: u32,  // dictionary index of the block's first latent
    capacity: u32,      // room in found.hits
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

// What a latent needs beside its encoder row.
struct Latent {
    bias: f32,
    threshold: f32,
    margin_scale: f32,   // margin = margin_scale * |x| + margin_offset
    margin_offset: f32,
}

struct Hit {
    row: u32,
    latent: u32,
    z: f32,
}

struct Found {
    count: atomic<u32>,
    hits: array<Hit>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, width_vec4]
@group(0) @binding(2) var<storage, read> x_norm: array<f32>;          // [n_rows]
@group(0) @binding(3) var<storage, read> w_enc: array<vec4<f32>>;     // [n_latents, width_vec4]
@group(0) @binding(4) var<storage, read> latents: array<Latent>;      // [n_latents]
@group(0) @binding(5) var<storage, read_write> found: Found;

const TILE = 64u;   // rows and latents of a workgroup
const SIDE = 16u;   // invocations along each side
const STEP = 4u;    // vec4s of the inner dimension staged at a time

var<workgroup> sh_x: array<vec4<f32>, 256>;   // [STEP][TILE]
var<workgroup> sh_w: array<vec4<f32>, 256>;   // [STEP][TILE]
var<workgroup> sh_count: atomic<u32>;
var<workgroup> sh_base: u32;

@compute @workgroup_size(16, 16)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) local_ix: u32,
) {
    let row0 = group.y * TILE;
    let latent0 = group.x * TILE;
    // Each invocation stages one vec4 of x and one of w_enc a step.
    let stage_item = local_ix / STEP;
    let stage_k = local_ix % STEP;
    let stage_row = row0 + stage_item;
    let stage_latent = latent0 + stage_item;

    var z: array<array<f32, 4>, 4>;
    for (var k0 = 0u; k0 < params.width_vec4; k0 += STEP) {
        let k = k0 + stage_k;
        var staged_x = vec4<f32>();
        var staged_w = vec4<f32>();
        if k < params.width_vec4 {
            if stage_row < params.n_rows {
                staged_x = x[stage_row * params.width_vec4 + k];
            }
            if stage_latent < params.n_latents {
                staged_w = w_enc[stage_latent * params.width_vec4 + k];
            }
        }
        workgroupBarrier();
        sh_x[stage_k * TILE + stage_item] = staged_x;
        sh_w[stage_k * TILE + stage_item] = staged_w;
        workgroupBarrier();
        for (var s = 0u; s < STEP; s++) {
            let at = s * TILE;
            let w0 = sh_w[at + local.x];
            let w1 = sh_w[at + local.x + SIDE];
            let w2 = sh_w[at + local.x + 2u * SIDE];
            let w3 = sh_w[at + local.x + 3u * SIDE];
            for (var i = 0u; i < 4u; i++) {
                let xi = sh_x[at + local.y + i * SIDE];
                z[i][0] += dot(xi, w0);
                z[i][1] += dot(xi, w1);
                z[i][2] += dot(xi, w2);
                z[i][3] += dot(xi, w3);
            }
        }
    }

    // Which of the sixteen are kept, as bits; their values stay in z.
    var kept = 0u;
    for (var i = 0u; i < 4u; i++) {
        let row = row0 + local.y + i * SIDE;
        if row >= params.n_rows {
            continue;
        }
        let norm = x_norm[row];
        for (var j = 0u; j < 4u; j++) {
            let latent_ix = latent0 + local.x + j * SIDE;
            if latent_ix >= params.n_latents {
                continue;
            }
            let latent = latents[latent_ix];
            z[i][j] += latent.bias;
            let margin = latent.margin_scale * norm + latent.margin_offset;
            if z[i][j] > latent.threshold - margin {
                kept |= 1u << (i * 4u + j);
            }
        }
    }

    let n_kept = countOneBits(kept);
    var place = atomicAdd(&sh_count, n_kept);
    workgroupBarrier();
    if local_ix == 0u {
        sh_base = atomicAdd(&found.count, atomicLoad(&sh_count));
    }
    workgroupBarrier();
    place += sh_base;
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            if (kept & (1u << (i * 4u + j))) == 0u {
                continue;
            }
            if place < params.capacity {
                let row = row0 + local.y + i * SIDE;
                let latent = params.first_latent + latent0 + local.x + j * SIDE;
                found.hits[place] = Hit(row, latent, z[i][j]);
            }
            place++;
        }
    }
}
