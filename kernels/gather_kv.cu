// Gather of chosen rows into the send buffer: dst[i, h] = src[chosen[h, i] - offset, h], keys and values.
//
// chosen [kv_heads, k] i32, src and dst [rows, kv_heads * head_dim] bf16; head_dim a multiple of 8. Grid (x: i, y: keys or values).
#include <device.cuh>

extern "C" __global__ void gather_kv(
    const int32_t* chosen, int k, int offset, int kv_heads, int head_dim,
    const bf16* src_k, const bf16* src_v, bf16* dst_k, bf16* dst_v) {
    const bf16* src = blockIdx.y == 0 ? src_k : src_v;
    bf16* dst = blockIdx.y == 0 ? dst_k : dst_v;
    const int width = kv_heads * head_dim;
    for (int col = threadIdx.x * 8; col < width; col += blockDim.x * 8) {
        const int row = chosen[size_t(col / head_dim) * k + blockIdx.x] - offset;
        store8(dst + size_t(blockIdx.x) * width + col, load8(src + size_t(row) * width + col));
    }
}
