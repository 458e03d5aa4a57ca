// Products of one row with a weight matrix, as decode needs them: bound by the bandwidth of the weights.
//
//   gemv         out[j] = x · w[j] (+ bias[j]) (+ out[j])      bf16
//   gemv_f32     out[j] = x · w[j]                              f32 (logits)
//   gemv_swiglu  out[j] = silu(x · w[j]) * (x · w[width + j])   bf16
// x [cols], w [rows of out, cols]; bf16, sums in f32; cols a multiple of 8. One warp an output; x stays in the caches. The first weights are on their
// way before the kernel that makes x has ended.
#include <device.cuh>

static constexpr int UNROLL = 4;
static constexpr int STEP = 32 * 8;

DEVICE float dot8(const Vec8& a, const Vec8& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low(a.pair[i]) * low(b.pair[i]) + high(a.pair[i]) * high(b.pair[i]);
    return sum;
}

// UNROLL pieces of a row from this lane's column on, 16 bytes each; 0 beyond the row.
struct Chunk {
    Vec8 piece[UNROLL];

    DEVICE Chunk(const bf16* row, int col, int cols) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) piece[u] = col + u * STEP < cols ? load8(row + col + u * STEP) : Vec8{};
    }
};

DEVICE int first_column() { return threadIdx.x % 32 * 8; }

// x · w over the warp, known to all lanes; `ahead` holds the first weights, and a chunk of w is always in flight.
DEVICE float warp_dot(const bf16* x, const bf16* w, int cols, Chunk ahead) {
    float sum = 0.f;
    for (int col = first_column(); col < cols; col += UNROLL * STEP) {
        const Chunk weights = ahead, values(x, col, cols);
        ahead = Chunk(w, col + UNROLL * STEP, cols);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum += dot8(values.piece[u], weights.piece[u]);
    }
    return warp_sum(sum);
}

DEVICE int output_of_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }

extern "C" __global__ void gemv(const bf16* x, const bf16* w, const bf16* bias, int accumulate, int cols, int width, bf16* out) {
    const int j = output_of_warp();
    let_the_next_grid_start();
    if (j >= width) return;
    const bf16* row = w + size_t(j) * cols;
    const Chunk ahead(row, first_column(), cols);
    wait_for_earlier_grids();
    float sum = warp_dot(x, row, cols, ahead);
    if (threadIdx.x % 32 != 0) return;
    if (bias) sum += to_float(bias[j]);
    if (accumulate) sum += to_float(out[j]);
    out[j] = to_bf16(sum);
}

extern "C" __global__ void gemv_f32(const bf16* x, const bf16* w, int cols, int width, float* out) {
    const int j = output_of_warp();
    let_the_next_grid_start();
    if (j >= width) return;
    const bf16* row = w + size_t(j) * cols;
    const Chunk ahead(row, first_column(), cols);
    wait_for_earlier_grids();
    const float sum = warp_dot(x, row, cols, ahead);
    if (threadIdx.x % 32 == 0) out[j] = sum;
}

extern "C" __global__ void gemv_swiglu(const bf16* x, const bf16* w, int cols, int width, bf16* out) {
    const int j = output_of_warp();
    let_the_next_grid_start();
    if (j >= width) return;
    const bf16 *gate_row = w + size_t(j) * cols, *up_row = w + size_t(width + j) * cols;
    const Chunk gate_ahead(gate_row, first_column(), cols), up_ahead(up_row, first_column(), cols);
    wait_for_earlier_grids();
    const float gate = warp_dot(x, gate_row, cols, gate_ahead);
    const float up = warp_dot(x, up_row, cols, up_ahead);
    if (threadIdx.x % 32 == 0) out[j] = to_bf16(silu(gate) * up);
}
