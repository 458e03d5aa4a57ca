// Keys and values kept in FP8 (e4m3), a scale for every row and KV head, see fp8.cuh.
//
//   keep_fp8     codes [rows, kv_heads * head_dim], factors [kv_heads, capacity] of rows of bf16, `stride` elements apart
//   restore_fp8  the rows again, in bf16
// head_dim a multiple of 16, at most 128. keep_fp8: grid (row and head pairs / 8, keys alone or keys and values), one warp a pair.
#include <fp8.cuh>

static constexpr int THREADS = 256;

struct Kept {
    const bf16* from;
    uint8_t* codes;
    float* factors;
};

extern "C" __global__ void __launch_bounds__(THREADS) keep_fp8(
    const __grid_constant__ Kept keys, const __grid_constant__ Kept values, int rows, int stride, int kv_heads, int head_dim, int first_row, int capacity) {
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const int pair = (blockIdx.x * THREADS + threadIdx.x) / 32, row = pair / kv_heads, head = pair % kv_heads;
    if (row >= rows) return;
    const Kept& kept = blockIdx.y == 0 ? keys : values;
    const int at = threadIdx.x % 32 * 4;
    float value[4] = {}, largest = 0.f;
    if (at < head_dim) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(kept.from + size_t(row) * stride + head * head_dim + at);
#pragma unroll
        for (int i = 0; i < 2; ++i) value[2 * i] = low(from[i]), value[2 * i + 1] = high(from[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
    // What is not finite must not be hidden by its code: the factor carries it on.
    const bool broken = warp_any(!(value[0] * 0.f + value[1] * 0.f + value[2] * 0.f + value[3] * 0.f == 0.f));
    const float factor = fp8_factor(largest), scale = factor / FP8_FACTOR;
    if (at < head_dim) {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) codes |= to_fp8(value[i] / scale) << (8 * i);
        *reinterpret_cast<uint32_t*>(kept.codes + (size_t(first_row + row) * kv_heads + head) * head_dim + at) = codes;
    }
    if (at == 0) kept.factors[size_t(head) * capacity + first_row + row] = broken ? NAN : factor;
}

extern "C" __global__ void restore_fp8(const uint8_t* codes, const float* factors, int rows, int kv_heads, int head_dim, int capacity, bf16* to) {
    const size_t unit = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int units = kv_heads * head_dim / 16;
    const size_t row = unit / units;
    if (row >= rows) return;
    const float factor = factors[size_t(unit % units * 16 / head_dim) * capacity + row];
    const Codes16 held = *reinterpret_cast<const Codes16*>(codes + unit * 16);
    store8(to + unit * 16, decode8(held, 0, factor));
    store8(to + unit * 16 + 8, decode8(held, 1, factor));
}
