// RMSNorm: out = x / sqrt(mean(x^2) + epsilon) * w, the mean in f32.
//
// x, out [rows, cols], w [cols]; bf16; cols a multiple of 8, at most 8 * 1024 * VECTORS. One block a row; a row is read once, kept in registers, and so are
// the weights, which are on their way before the kernel that makes x has ended.
#include <device.cuh>

static constexpr int VECTORS = 4;

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const bf16* x, const bf16* w, float epsilon, int cols, bf16* out) {
    __shared__ float scratch[32];
    let_the_next_grid_start();
    Vec8 weights[VECTORS], held[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int col = (v * blockDim.x + threadIdx.x) * 8;
        if (col < cols) weights[v] = load8(w + col);
    }
    wait_for_earlier_grids();
    const bf16* row = x + size_t(blockIdx.x) * cols;
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int col = (v * blockDim.x + threadIdx.x) * 8;
        if (col >= cols) break;
        held[v] = load8(row + col);
        float value[8];
        unpack(held[v], value);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += value[i] * value[i];
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / cols + epsilon);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int col = (v * blockDim.x + threadIdx.x) * 8;
        if (col >= cols) break;
        float value[8], weight[8];
        unpack(held[v], value);
        unpack(weights[v], weight);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] *= scale * weight[i];
        store8(out + size_t(blockIdx.x) * cols + col, pack(value));
    }
}
