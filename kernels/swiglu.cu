// SwiGLU: out = silu(gate) * up.
//
// gate_up [rows, 2 * width] holds gate then up in each row, out [rows, width]; bf16; width a multiple of 8. Grid (x: columns, y: rows).
#include <device.cuh>

extern "C" __global__ void swiglu(const bf16* gate_up, int width, bf16* out) {
    const int col = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (col >= width) return;
    const bf16* row = gate_up + size_t(blockIdx.y) * 2 * width;
    float gate[8], up[8];
    unpack(load8(row + col), gate);
    unpack(load8(row + width + col), up);
#pragma unroll
    for (int i = 0; i < 8; ++i) up[i] *= silu(gate[i]);
    store8(out + size_t(blockIdx.y) * width + col, pack(up));
}
