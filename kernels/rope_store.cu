// RoPE and KV write: rotates q and k of a packed row in place and copies the rotated key and the value to the cache (k and v null: nowhere).
//
// qkv [rows, (heads + 2 kv_heads) * head_dim], k and v [rows, kv_heads * head_dim], bf16; head_dim a multiple of 16, at most 256.
// Element i of a head pairs with i + head_dim/2 (half-split form). Row r has position runs.position[j] + (r - runs.row[j]) of the
// run it lies in. Angles are formed and reduced in double, so that a position of a million is as exact as the first. One block a row.
#include <device.cuh>
#include <rope.h>

// Rotates eight pairs, (first[i], first[i + half]).
DEVICE void rotate(bf16* first, int half, const float* cosine, const float* sine, bf16* copy) {
    float a[8], b[8], c[8], d[8];
    unpack(load8(first), a);
    unpack(load8(first + half), b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        c[i] = a[i] * cosine[i] - b[i] * sine[i];
        d[i] = b[i] * cosine[i] + a[i] * sine[i];
    }
    store8(first, pack(c));
    store8(first + half, pack(d));
    if (copy) {
        store8(copy, pack(c));
        store8(copy + half, pack(d));
    }
}

DEVICE uint32_t position_of(int row, const PositionRuns& runs) {
    int j = 0;
    while (j + 1 < runs.count && runs.row[j + 1] <= row) ++j;
    return runs.position[j] + (row - runs.row[j]);
}

extern "C" __global__ void rope_store(
    const __grid_constant__ PositionRuns runs, const __grid_constant__ Frequencies frequencies,
    int heads, int kv_heads, int head_dim, bf16* qkv, bf16* k, bf16* v) {
    __shared__ float cosine[128], sine[128];
    let_the_next_grid_start();
    const int half = head_dim / 2;
    const double position = position_of(blockIdx.x, runs);
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        constexpr double TURN = 6.283185307179586;
        const double angle = position * frequencies.radians[i];
        const float reduced = float(angle - TURN * rint(angle / TURN));
        cosine[i] = cosf(reduced) * frequencies.scale;
        sine[i] = sinf(reduced) * frequencies.scale;
    }
    __syncthreads();
    wait_for_earlier_grids();

    bf16* row = qkv + size_t(blockIdx.x) * (heads + 2 * kv_heads) * head_dim;
    const size_t kv_width = size_t(kv_heads) * head_dim;
    bf16* k_row = k ? k + blockIdx.x * kv_width : nullptr;
    const int units = half / 8;
    for (int i = threadIdx.x; i < (heads + kv_heads) * units; i += blockDim.x) {
        const int head = i / units, at = i % units * 8;
        bf16* copy = head < heads || !k_row ? nullptr : k_row + (head - heads) * head_dim + at;
        rotate(row + head * head_dim + at, half, cosine + at, sine + at, copy);
    }
    if (!v) return;
    bf16* v_row = v + blockIdx.x * kv_width;
    const bf16* values = row + (heads + kv_heads) * head_dim;
    for (int i = threadIdx.x * 8; i < kv_width; i += blockDim.x * 8) store8(v_row + i, load8(values + i));
}
