// Sparse decoder: adds the directions of a row's active latents, one block of the dictionary at a time.
//
//   out += W_dec^T f               over the latents of this block only
//
// The host fills `out` with b_dec first and dispatches once a block. An invocation owns four
// neighbouring values of one output row, so no two write the same place.

struct Params {
    n_rows: u32,        // rows of out in this dispatch
    width_vec4: u32,    // d_out / 4, rounded up
    first_latent: u32,  // dictionary index of the block's first latent
    pad0: u32,
}

struct Entry {
    latent: u32,
    value: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> spans: array<vec2<u32>>;     // [n_rows]: entries first..end of this block
@group(0) @binding(2) var<storage, read> entries: array<Entry>;       // active latents, row after row
@group(0) @binding(3) var<storage, read> w_dec: array<vec4<f32>>;     // [latents of the block, width_vec4]
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>; // [n_rows, width_vec4]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.y;
    if column >= params.width_vec4 || row >= params.n_rows {
        return;
    }
    let span = spans[row];
    var sum = out[row * params.width_vec4 + column];
    for (var e = span.x; e < span.y; e++) {
        let entry = entries[e];
        sum += entry.value * w_dec[(entry.latent - params.first_latent) * params.width_vec4 + column];
    }
    out[row * params.width_vec4 + column] = sum;
}
