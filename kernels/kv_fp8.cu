// Keys and values kept in FP8 (e4m3), see fp8.cuh.
//
//   keep_fp8     from rows of bf16, `stride` elements apart
//   restore_fp8  the rows again, in bf16: [rows, kv_heads * head_dim]
// head_dim a multiple of 16, at most 128. keep_fp8: grid (row and head pairs / 8, keys alone or keys and values), one warp a pair.
#include <fp8.cuh>

static constexpr int THREADS = 256;

struct Kept {
    const bf16* from;
    uint8_t* codes;
    uint8_t* scales;
};

extern "C" __global__ void __launch_bounds__(THREADS) keep_fp8(
    const __grid_constant__ Kept keys, const __grid_constant__ Kept values, int rows, int stride, int kv_heads, int head_dim, int first_row, int capacity) {
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const int pair = (blockIdx.x * THREADS + threadIdx.x) / 32, row = pair / kv_heads, head = pair % kv_heads;
    if (row >= rows) return;
    const Kept& kept = blockIdx.y == 0 ? keys : values;
    keep_head(kept.from + size_t(row) * stride + head * head_dim, KeptHead(kept.codes, kept.scales, head, capacity, first_row + row, head_dim), head_dim);
}

extern "C" __global__ void restore_fp8(const uint8_t* codes, const uint8_t* scales, int rows, int kv_heads, int head_dim, int capacity, bf16* to) {
    const size_t unit = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int units = kv_heads * head_dim / 16;
    const size_t row = unit / units;
    if (row >= rows) return;
    const int column = unit % units * 16, head = column / head_dim;
    const size_t at = size_t(head) * capacity + row;
    const Codes16 held = *reinterpret_cast<const Codes16*>(codes + at * head_dim + column % head_dim);
    const float scale = scale_of(scales[at]);
    Vec8 restored[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t four = held.four[i / 2], pair = i % 2 ? decode_fp8x2<1>(four) : decode_fp8x2<0>(four);
        restored[i / 4].pair[i % 4] = pack_bf16(half_to_float(uint16_t(pair)) * scale, half_to_float(uint16_t(pair >> 16)) * scale);
    }
    store8(to + unit * 16, restored[0]);
    store8(to + unit * 16 + 8, restored[1]);
}
