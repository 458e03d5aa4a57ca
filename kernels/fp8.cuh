// FP8 (e4m3) as codes of a byte: sign, four bits of exponent (bias 7), three of mantissa; at most 448, no infinity.
//
// Kept keys and values are codes with a scale for every row and head, a power of two kept as the exponent of a float: element = code * scale. All of a head
// lies together: codes [heads, capacity, head_dim], scales [heads, capacity]. Invariant: an exponent is 1 to 254; 255 (infinity) over codes of 0, whose
// products are NaN, if an element of the row is not finite.
#pragma once

#include <device.cuh>

static constexpr float FP8_LARGEST = 448.f;

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

DEVICE float scale_of(uint8_t exponent) { return bits_to_float(uint32_t(exponent) << 23); }

// Exponent of the least scale for elements of up to this size: size / 448, rounded up to a power of two.
DEVICE uint8_t fp8_exponent(float largest) {
    if (largest == 0.f) return 127;
    return uint8_t(max((float_to_bits(largest / FP8_LARGEST) + 0x7fffffu) >> 23, 1u));
}

// Four codes, the first in the lowest byte.
struct alignas(16) Codes16 {
    uint32_t four[4];
};

// Where a row's head goes.
struct KeptHead {
    uint8_t* codes;
    uint8_t* exponent;

    DEVICE KeptHead(uint8_t* codes, uint8_t* exponents, int head, int capacity, int row, int head_dim)
        : codes(codes + (size_t(head) * capacity + row) * head_dim), exponent(exponents + size_t(head) * capacity + row) {}
};

// Keeps `head_dim` elements, by one warp; head_dim a multiple of 16, at most 128.
DEVICE void keep_head(const bf16* from, const KeptHead& to, int head_dim) {
    const int at = threadIdx.x % 32 * 4;
    float value[4] = {}, largest = 0.f;
    if (at < head_dim) {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(from + at);
#pragma unroll
        for (int i = 0; i < 2; ++i) value[2 * i] = low(pairs[i]), value[2 * i + 1] = high(pairs[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
    // What is not finite must not be hidden by its code: the scale carries it on.
    const bool broken = warp_any(!(value[0] * 0.f + value[1] * 0.f + value[2] * 0.f + value[3] * 0.f == 0.f));
    const uint8_t exponent = broken ? 255 : fp8_exponent(largest);
    if (at < head_dim) {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) codes |= (broken ? 0u : to_fp8(value[i] / scale_of(exponent))) << (8 * i);
        *reinterpret_cast<uint32_t*>(to.codes + at) = codes;
    }
    if (at == 0) *to.exponent = exponent;
}
