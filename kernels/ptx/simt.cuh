// The thread model's primitives: conversions, shuffles, votes, approximate exponentials, lines between devices.
//
// Invariant: the emulator of the tests has a file of the same name with the same functions.
#pragma once

#include <cstdint>

#define DEVICE __device__ __forceinline__

static constexpr unsigned ALL_LANES = 0xffffffffu;

DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// Two floats rounded to nearest even: `low` in the lower half.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two floats rounded to nearest even, as IEEE halves: `low` in the lower half.
DEVICE uint32_t pack_half(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two FP8 codes (e4m3), the HALF-th halfword of `codes`, as IEEE halves: exact. The first code comes to lie in the lower half. No code may be NaN.
template <int HALF>
DEVICE uint32_t decode_fp8x2(uint32_t codes) {
    uint32_t pair;
#if __CUDA_ARCH__ >= 890
    if constexpr (HALF == 0) asm("{ .reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(pair) : "r"(codes));
    else asm("{ .reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(pair) : "r"(codes));
#else
    // Moved to the place of a half's exponent and mantissa a code is the value times 2^-8, denormals included.
    const uint32_t apart = __byte_perm(codes, 0, HALF == 0 ? 0x1404 : 0x3424);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"((apart & 0x80008000u) | (apart & 0x7f007f00u) >> 1), "r"(0x5c005c00u));
#endif
    return pair;
}
// Four bytes by the hexadecimal digits of SELECTOR, the last one first: 0 to 3 are those of `a`, 4 to 7 those of `b`.
template <uint32_t SELECTOR>
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, SELECTOR);
}

// IEEE half to float, from its bits.
DEVICE float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// 2^x, relative error 2^-22; 2^-inf is 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(ALL_LANES, value, mask); }
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(ALL_LANES, value, mask); }
DEVICE uint32_t shuffle_up(uint32_t value, int by) { return __shfl_up_sync(ALL_LANES, value, by); }
DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(ALL_LANES, value, lane); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE bool warp_any(bool value) { return __any_sync(ALL_LANES, value); }

// Overlap of a launch with the one before it, where the launch allows that (sm_90; elsewhere grids never overlap).
//
// Everything issued before has been done, and is seen, after this; until then only what no kernel writes may be touched (weights; work lists, which copies
// from the host write: what follows a copy does not overlap with it). Every kernel of a chain of overlapping launches has to call it.
DEVICE void wait_for_earlier_grids() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next grid may start as soon as all blocks of this one have.
DEVICE void let_the_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Lines that devices leave in each other's memory: two words of data, each with the turn that it belongs to. A word and its turn come together.
struct alignas(16) Line {
    uint32_t first, first_turn, second, second_turn;
};
DEVICE void store_line(Line* at, uint32_t first, uint32_t second, uint32_t turn) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(at), "r"(first), "r"(turn), "r"(second) : "memory");
}
// Whether the line of that turn has come.
DEVICE bool load_line(const Line* at, uint32_t turn, uint32_t& first, uint32_t& second) {
    uint32_t first_turn, second_turn;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(first), "=r"(first_turn), "=r"(second), "=r"(second_turn) : "l"(at) : "memory");
    return first_turn == turn && second_turn == turn;
}
// Read anew every time, and nothing else with it. Also for page-locked memory of the host.
DEVICE uint32_t load_volatile(const uint32_t* at) {
    uint32_t value;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
// One turn of a wait for another device: reads in between would only be in the way of its writes.
DEVICE void pause() { __nanosleep(20); }

// Brings the line at an address on its way into the L2 cache. Nothing is read, so that this may come before earlier grids have been waited for.
DEVICE void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// The block's dynamic shared memory, 1024-byte aligned as swizzled tiles need it.
DEVICE uint8_t* dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t block_shared[];
    return block_shared;
}
