// Keys and values quantised to FP8 (e4m3) for their way between ranks, and back: a scale for every row and KV head.
//
//   quantize_kv  rows of bf16 [rows, kv_heads * head_dim] to rows of `row_bytes` bytes: [key codes | value codes | key scales | value scales]
//   restore_kv   the rows again, in bf16
// head_dim a multiple of 16, at most 128; row_bytes a multiple of 16. Element = code * scale; a scale is a bf16, NaN if an element of the head is not finite.
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

// The least scale for elements of up to this size: size / 448, rounded up to a bf16.
DEVICE float scale_for(float largest) {
    return largest == 0.f ? 1.f : bits_to_float((float_to_bits(largest / FP8_LARGEST) + 0xffffu) & 0xffff0000u);
}

// A code's bits are those of an f32 that is smaller by 2^120.
DEVICE float value_of(uint32_t code) { return bits_to_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f; }

extern "C" __global__ void __launch_bounds__(THREADS) quantize_kv(
    const bf16* keys, const bf16* values, uint8_t* to, int rows, int kv_heads, int head_dim, int row_bytes) {
    const int pair = (blockIdx.x * THREADS + threadIdx.x) / 32, row = pair / kv_heads, head = pair % kv_heads, part = blockIdx.y;
    if (row >= rows) return;
    const QuantizedRow quantized{to + size_t(row) * row_bytes, kv_heads, head_dim};
    const bf16* from = (part == 0 ? keys : values) + (size_t(row) * kv_heads + head) * head_dim;
    const int at = threadIdx.x % 32 * 4;
    float value[4] = {}, largest = 0.f;
    if (at < head_dim) {
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = to_float(from[at + i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
    // What is not finite must not be hidden by its code: the scale carries it on.
    const bool broken = warp_any(!(value[0] * 0.f + value[1] * 0.f + value[2] * 0.f + value[3] * 0.f == 0.f));
    const float scale = scale_for(largest);
    if (at < head_dim) {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) codes |= to_fp8(value[i] / scale) << (8 * i);
        *reinterpret_cast<uint32_t*>(quantized.codes(part, head) + at) = codes;
    }
    if (at == 0) *quantized.scale(part, head) = broken ? NAN : scale;
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
    float restored[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) restored[i] = value_of(codes[i / 4] >> (8 * (i % 4)) & 0xffu) * scale;
    store8((part == 0 ? keys : values) + unit * 8, pack(restored));
}
