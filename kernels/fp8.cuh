// FP8 (e4m3) as codes of a byte: sign, four bits of exponent (bias 7), three of mantissa; at most 448, no infinity.
//
// A code moved to the place of a bf16's sign, exponent and mantissa is the value times 2^-120, denormals included, so that two are decoded by moving bits
// and one product. Invariant: a factor is the scale times 2^120, and a bf16 (its lower half is 0).
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

// The least factor for elements of up to this size: scale = size / 448, rounded up; at most 2^127, where elements of more than 57,344 are clipped.
DEVICE float fp8_factor(float largest) {
    if (largest == 0.f) return FP8_FACTOR;
    const uint32_t up = (float_to_bits(largest / FP8_LARGEST) + 0xffffu) & 0xffff0000u;
    return fminf(bits_to_float(up), 128.f) * FP8_FACTOR;
}

// Four codes, the first in the lowest byte.
struct alignas(16) Codes16 {
    uint32_t four[4];
};

// Eight of 16 codes, as bf16: the first or the second half.
DEVICE Vec8 decode8(const Codes16& codes, int half, float factor) {
    const uint32_t factors = pack_bf16(factor, factor);
    Vec8 vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t four = codes.four[2 * half + i / 2];
        const uint32_t apart = i % 2 == 0 ? spread_bytes<0x1404>(four) : spread_bytes<0x3424>(four);  // a code in the upper byte of each half
        vec.pair[i] = multiply_bf16x2((apart & 0x80008000u) | (apart & 0x7f007f00u) >> 4, factors);
    }
    return vec;
}
