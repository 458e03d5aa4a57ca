// The emulator's counterpart of kernels/ptx/simt.cuh.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <unistd.h>

#include "../simt.h"

#define DEVICE inline
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
// A macro, because unistd.h has a function of this name.
#define pause emulator::pause

using std::max;
using std::min;

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline uint32_t round_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline uint32_t round_half(float value) {
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size != size) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    // Below the least normal half steps are 2^-24; above, ten bits follow the leading one.
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const uint32_t steps = uint32_t(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return sign | (uint32_t(exponent + 14) << 10) + steps;
}
inline uint32_t pack_half(float low, float high) { return round_half(low) | round_half(high) << 16; }
template <int HALF>
uint32_t decode_fp8x2(uint32_t codes) {
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
        const int code = codes >> (16 * HALF + 8 * i) & 0xff, exponent = code >> 3 & 15, mantissa = code & 7;
        const float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
        pair |= round_half(code & 0x80 ? -size : size) << (16 * i);
    }
    return pair;
}
template <uint32_t SELECTOR>
uint32_t pick_bytes(uint32_t a, uint32_t b) {
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = SELECTOR >> (4 * i) & 7;
        picked |= ((from < 4 ? a : b) >> (8 * (from % 4)) & 0xff) << (8 * i);
    }
    return picked;
}

inline float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.f : 1.f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(1024 + fraction), exponent - 25);
}

// Launches of one stream never overlap here.
inline void wait_for_earlier_grids() {}
inline void let_the_next_grid_start() {}

inline void prefetch_line(const void*) {}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

template <class T>
T lane_value(T value, int lane) {
    const auto slots = emulator::exchange(&value, sizeof(T));
    T other;
    std::memcpy(&other, slots[lane], sizeof(T));
    return other;
}
inline float shuffle_xor(float value, int mask) { return lane_value(value, emulator::current->lane ^ mask); }
inline uint32_t shuffle_xor(uint32_t value, int mask) { return lane_value(value, emulator::current->lane ^ mask); }
inline uint32_t shuffle_up(uint32_t value, int by) { return lane_value(value, max(emulator::current->lane - by, 0)); }
inline uint32_t shuffle(uint32_t value, int lane) { return lane_value(value, lane); }
inline void sync_warp() { lane_value(0, 0); }
inline bool warp_any(bool value) {
    const auto slots = emulator::exchange(&value, 1);
    for (int lane = 0; lane < 32; ++lane)
        if (slots[lane][0]) return true;
    return false;
}

inline void __syncthreads() { emulator::sync_block(); }
// Launches of other streams may be at the same word.
template <class T>
T atomicAdd(T* at, T value) {
    return std::atomic_ref<T>(*at).fetch_add(value);
}
template <class T>
T atomicMin(T* at, T value) {
    const std::atomic_ref<T> word(*at);
    T old = word.load();
    while (value < old && !word.compare_exchange_weak(old, value)) {
    }
    return old;
}

struct alignas(16) Line {
    uint64_t half[2];
};
inline void store_line(Line* at, uint32_t first, uint32_t second, uint32_t turn) {
    const uint32_t words[2] = {first, second};
    for (int i = 0; i < 2; ++i) __atomic_store_n(&at->half[i], words[i] | uint64_t(turn) << 32, __ATOMIC_RELAXED);
}
inline bool load_line(const Line* at, uint32_t turn, uint32_t& first, uint32_t& second) {
    const uint64_t halves[2] = {__atomic_load_n(&at->half[0], __ATOMIC_RELAXED), __atomic_load_n(&at->half[1], __ATOMIC_RELAXED)};
    first = uint32_t(halves[0]), second = uint32_t(halves[1]);
    return halves[0] >> 32 == turn && halves[1] >> 32 == turn;
}
inline uint32_t load_volatile(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }

inline uint8_t* dynamic_shared() { return emulator::block_shared; }
