// Second half of a retaining head: out[h, first + i] = sum_j w2[h, j] * silu(hidden[i, j]).
//
// hidden [rows, width] f32 (the first product, before its activation), w2 [kv_heads, width] bf16, out [kv_heads, stride] f32. One warp a row;
// each activation is computed once and meets HEADS heads at a time.
#include <device.cuh>

static constexpr int HEADS = 8;

extern "C" __global__ void retaining_scores(
    const float* hidden, const bf16* w2, int rows, int width, int kv_heads, int first, int stride, float* out) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float* activations = hidden + size_t(row) * width;
    for (int head = 0; head < kv_heads; head += HEADS) {
        float sum[HEADS] = {};
        for (int j = lane; j < width; j += 32) {
            const float value = silu(activations[j]);
#pragma unroll
            for (int h = 0; h < HEADS; ++h)
                if (head + h < kv_heads) sum[h] += value * to_float(w2[size_t(head + h) * width + j]);
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            const float total = warp_sum(sum[h]);
            if (lane == 0 && head + h < kv_heads) out[size_t(head + h) * stride + first + row] = total;
        }
    }
}
