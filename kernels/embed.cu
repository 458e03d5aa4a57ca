// Embedding: out[i] = table[ids[i]].
//
// table [vocab, cols], ids [rows], out [rows, cols]; bf16; cols a multiple of 8. One block a row. The wrapper checks ids < vocab.
#include <device.cuh>

extern "C" __global__ void embed(const bf16* table, const uint32_t* ids, int cols, bf16* out) {
    const bf16* src = table + size_t(ids[blockIdx.x]) * cols;
    bf16* dst = out + size_t(blockIdx.x) * cols;
    for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) store8(dst + i, load8(src + i));
}
