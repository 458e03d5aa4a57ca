// Products of one row with a weight matrix, as decode needs them: bound by the bandwidth of the weights.
//
//   gemv         out[j] = x · w[j] (+ bias[j]) (+ out[j])      bf16
//   gemv_f32     out[j] = x · w[j]                              f32 (logits)
//   gemv_swiglu  out[j] = silu(x · w[j]) * (x · w[width + j])   bf16
// x [cols], w [rows of out, cols]; bf16, sums in f32; cols a multiple of 8. One warp an output; x stays in the caches.
#include <device.cuh>

static constexpr int UNROLL = 4;

DEVICE float dot8(const Vec8& a, const Vec8& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low(a.pair[i]) * low(b.pair[i]) + high(a.pair[i]) * high(b.pair[i]);
    return sum;
}

// x · w over the warp, known to all lanes; UNROLL 16-byte loads of w are in flight per lane.
DEVICE float warp_dot(const bf16* x, const bf16* w, int cols) {
    constexpr int STEP = 32 * 8;
    float sum = 0.f;
    int col = threadIdx.x % 32 * 8;
    for (; col + (UNROLL - 1) * STEP < cols; col += UNROLL * STEP) {
        Vec8 weights[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) weights[u] = load8(w + col + u * STEP);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum += dot8(load8(x + col + u * STEP), weights[u]);
    }
    for (; col < cols; col += STEP) sum += dot8(load8(x + col), load8(w + col));
    return warp_sum(sum);
}

DEVICE int output_of_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }

extern "C" __global__ void gemv(const bf16* x, const bf16* w, const bf16* bias, int accumulate, int cols, int width, bf16* out) {
    const int j = output_of_warp();
    if (j >= width) return;
    float sum = warp_dot(x, w + size_t(j) * cols, cols);
    if (threadIdx.x % 32 != 0) return;
    if (bias) sum += to_float(bias[j]);
    if (accumulate) sum += to_float(out[j]);
    out[j] = to_bf16(sum);
}

extern "C" __global__ void gemv_f32(const bf16* x, const bf16* w, int cols, int width, float* out) {
    const int j = output_of_warp();
    if (j >= width) return;
    const float sum = warp_dot(x, w + size_t(j) * cols, cols);
    if (threadIdx.x % 32 == 0) out[j] = sum;
}

extern "C" __global__ void gemv_swiglu(const bf16* x, const bf16* w, int cols, int width, bf16* out) {
    const int j = output_of_warp();
    if (j >= width) return;
    const float gate = warp_dot(x, w + size_t(j) * cols, cols);
    const float up = warp_dot(x, w + size_t(width + j) * cols, cols);
    if (threadIdx.x % 32 == 0) out[j] = to_bf16(silu(gate) * up);
}
