// Keys and values quantised to FP8 (e4m3) for their way between ranks, and back: a scale for every row and KV head.
//
//   quantize_kv  rows of bf16 [rows, kv_heads * head_dim] to rows of `row_bytes` bytes: [key codes | value codes | key scales | value scales]
//   restore_kv   the rows again, in bf16
// head_dim a multiple of 16, at most 128; row_bytes a multiple of 16. Codes and scales as in fp8.cuh.
// Grids: quantize_kv (row and head pairs / 8, keys or values), one warp a pair; restore_kv (row and unit of 8 elements, keys or values).
#include <fp8.cuh>

static constexpr int THREADS = 256;

// Where the parts of a quantised row begin; part 0 is keys, part 1 values.
struct QuantizedRow {
    uint8_t* bytes;
    int kv_heads, head_dim;

    DEVICE uint8_t* codes(int part, int head) const { return bytes + (part * kv_heads + head) * head_dim; }
    DEVICE float* scale(int part, int head) const { return reinterpret_cast<float*>(bytes + 2 * kv_heads * head_dim) + part * kv_heads + head; }
};

extern "C" __global__ void __launch_bounds__(THREADS) quantize_kv(
    const bf16* keys, const bf16* values, uint8_t* to, int rows, int kv_heads, int head_dim, int row_bytes) {
    const int pair = (blockIdx.x * THREADS + threadIdx.x) / 32, row = pair / kv_heads, head = pair % kv_heads, part = blockIdx.y;
    if (row >= rows) return;
    const QuantizedRow quantized{to + size_t(row) * row_bytes, kv_heads, head_dim};
    const bf16* from = (part == 0 ? keys : values) + (size_t(row) * kv_heads + head) * head_dim;
    keep_head(from, KeptHead(quantized.codes(part, head), quantized.scale(part, head)), head_dim);
}

extern "C" __global__ void __launch_bounds__(THREADS) restore_kv(
    uint8_t* from, bf16* keys, bf16* values, int rows, int kv_heads, int head_dim, int row_bytes) {
    const size_t unit = size_t(blockIdx.x) * THREADS + threadIdx.x;
    const int units = kv_heads * head_dim / 8, part = blockIdx.y;
    const size_t row = unit / units;
    if (row >= rows) return;
    const int column = unit % units * 8, head = column / head_dim;
    const QuantizedRow quantized{from + row * row_bytes, kv_heads, head_dim};
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(quantized.codes(part, head) + column % head_dim);
    const float scale = *quantized.scale(part, head);
    Vec8 restored;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = i % 2 ? decode_fp8x2<1>(codes[i / 2]) : decode_fp8x2<0>(codes[i / 2]);
        restored.pair[i] = pack_bf16(half_to_float(uint16_t(pair)) * scale, half_to_float(uint16_t(pair >> 16)) * scale);
    }
    store8((part == 0 ? keys : values) + unit * 8, restored);
}
