// Weights as they stand in a file, to bf16, and a check that all are finite.
//
// src: `count` elements of f32 (type 0), f16 (1) or bf16 (2); dst bf16, may be src for bf16. The least index (from `first`) of an
// element that is not finite, before or after rounding, is left in *bad (atomically; the caller sets it to all ones before the first part).
#include <device.cuh>

DEVICE float element(const void* src, int type, size_t i) {
    if (type == 0) return static_cast<const float*>(src)[i];
    const uint16_t bits = static_cast<const uint16_t*>(src)[i];
    return type == 1 ? half_to_float(bits) : bits_to_float(uint32_t(bits) << 16);
}

extern "C" __global__ void convert_weights(const void* src, int type, uint64_t count, uint64_t first, bf16* dst, unsigned long long* bad) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        const bf16 value = to_bf16(element(src, type, i));
        if ((value.bits & 0x7f80) == 0x7f80) atomicMin(bad, static_cast<unsigned long long>(first + i));
        dst[i] = value;
    }
}
