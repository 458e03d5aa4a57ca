// FP8 (e4m3) as codes of a byte: sign, four bits of exponent (bias 7), three of mantissa; at most 448, no infinity.
//
// A code moved to the place of a float's sign, exponent and mantissa is the value times 2^-120, denormals included, so that decoding is a shift
// and one product. Invariant: `factor` is the scale times 2^120 everywhere.
#pragma once

#include <device.cuh>

static constexpr float FP8_LARGEST = 448.f;
static constexpr float FP8_FACTOR = 0x1p120f;

// Nearest code, ties to even; what is larger becomes the largest.
DEVICE uint32_t to_fp8(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80u;
    const float size = bits_to_float(bits & 0x7fffffffu);
    if (size >= FP8_LARGEST) return sign | 0x7eu;
    // Below the least normal value codes are multiples of 2^-9; eight of them are its code.
    if (size < 0x1p-6f) return sign | uint32_t(rintf(size * 512.f));
    const uint32_t rounded = (bits & 0x7fffffffu) + 0x7ffffu + (bits >> 20 & 1u);
    return sign | ((rounded >> 20) - (120u << 3));
}

DEVICE float from_fp8(uint32_t code, float factor) { return bits_to_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * factor; }

// Four codes, the first in the lowest byte.
struct alignas(16) Codes16 {
    uint32_t four[4];
};

// Eight of 16 codes, as bf16: the first or the second half.
DEVICE Vec8 decode8(const Codes16& codes, int half, float factor) {
    Vec8 vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t two = codes.four[2 * half + i / 2] >> (i % 2 * 16);
        vec.pair[i] = pack_bf16(from_fp8(two & 0xffu, factor), from_fp8(two >> 8 & 0xffu, factor));
    }
    return vec;
}
