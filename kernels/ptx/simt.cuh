// The thread model's primitives: conversions, shuffles, votes, approximate exponentials.
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

// Products of two pairs of bf16, rounded to nearest even, denormals kept.
DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
// Bytes by the hexadecimal digits of SELECTOR, the last one first: 0 to 3 of `bytes`, 4 to 7 are 0.
template <uint32_t SELECTOR>
DEVICE uint32_t spread_bytes(uint32_t bytes) {
    return __byte_perm(bytes, 0, SELECTOR);
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
// Everything issued before has been done, and is seen, after this; until then only what no kernel writes may be touched. Every kernel of a
// chain of overlapping launches has to call it.
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

// The block's dynamic shared memory, 1024-byte aligned as swizzled tiles need it.
DEVICE uint8_t* dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t block_shared[];
    return block_shared;
}
