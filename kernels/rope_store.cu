// RoPE and KV write: rotates q and k of a packed row in place and copies the rotated key and the value to the cache (k and v null: nowhere).
//
//   rope_store           successive rows of the cache; row r has position runs.position[j] + (r - runs.row[j]) of the run it lies in
//   rope_store_each      each row has a position and a place of its own, as the rows of a batch of decodes
//   rope_store_each_fp8  the same where keys and values are kept in FP8
// qkv [rows, (heads + 2 kv_heads) * head_dim], k and v [rows, kv_heads * head_dim], bf16; head_dim a multiple of 16, at most 256 (FP8: 128). Element i of a head
// pairs with i + head_dim/2 (half-split form). One block a row.
#include <fp8.cuh>
#include <rope.cuh>

DEVICE uint32_t position_of(int row, const PositionRuns& runs) {
    int j = 0;
    while (j + 1 < runs.count && runs.row[j + 1] <= row) ++j;
    return runs.position[j] + (row - runs.row[j]);
}

DEVICE bf16* packed_row(bf16* qkv, int heads, int kv_heads, int head_dim) { return qkv + size_t(blockIdx.x) * (heads + 2 * kv_heads) * head_dim; }

extern "C" __global__ void rope_store(
    const __grid_constant__ PositionRuns runs, const __grid_constant__ Frequencies frequencies,
    int heads, int kv_heads, int head_dim, bf16* qkv, bf16* k, bf16* v) {
    __shared__ Angles angles;
    let_the_next_grid_start();
    angles.set(position_of(blockIdx.x, runs), frequencies, head_dim / 2);
    __syncthreads();
    wait_for_earlier_grids();
    const size_t at = blockIdx.x * size_t(kv_heads) * head_dim;
    rotate_row(packed_row(qkv, heads, kv_heads, head_dim), angles, heads, kv_heads, head_dim, k ? k + at : nullptr, v ? v + at : nullptr);
}

extern "C" __global__ void rope_store_each(
    const __grid_constant__ Places places, const __grid_constant__ Frequencies frequencies, int heads, int kv_heads, int head_dim, bf16* qkv) {
    __shared__ Angles angles;
    let_the_next_grid_start();
    angles.set(places.position[blockIdx.x], frequencies, head_dim / 2);
    __syncthreads();
    wait_for_earlier_grids();
    rotate_row(packed_row(qkv, heads, kv_heads, head_dim), angles, heads, kv_heads, head_dim, places.k[blockIdx.x], places.v[blockIdx.x]);
}

extern "C" __global__ void rope_store_each_fp8(
    const __grid_constant__ Fp8Places places, const __grid_constant__ Frequencies frequencies, int heads, int kv_heads, int head_dim, bf16* qkv) {
    __shared__ Angles angles;
    let_the_next_grid_start();
    angles.set(places.position[blockIdx.x], frequencies, head_dim / 2);
    __syncthreads();
    wait_for_earlier_grids();
    bf16* row = packed_row(qkv, heads, kv_heads, head_dim);
    rotate_row(row, angles, heads, kv_heads, head_dim, nullptr, nullptr);
    __syncthreads();
    // A warp for every head of keys and then of values.
    const int capacity = places.capacity[blockIdx.x], to_row = places.row[blockIdx.x];
    for (int i = threadIdx.x / 32; i < 2 * kv_heads; i += blockDim.x / 32) {
        const bool is_key = i < kv_heads;
        uint8_t* codes = is_key ? places.k[blockIdx.x] : places.v[blockIdx.x];
        uint8_t* scales = is_key ? places.k_scales[blockIdx.x] : places.v_scales[blockIdx.x];
        keep_head(row + (heads + i) * head_dim, KeptHead(codes, scales, i % kv_heads, capacity, to_row, head_dim), head_dim);
    }
}
