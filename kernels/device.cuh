// What every kernel leans on: bf16 as bits, 16-byte vectors, reductions over a warp and a block.
//
// Invariant: no inline PTX here; what differs between a GPU and the emulator of the tests is in <ptx/...>.
#pragma once

#include <ptx/simt.cuh>

// Brain float, stored. Arithmetic is in f32 always.
struct bf16 {
    uint16_t bits;
};

// Eight bf16 in one 16-byte access.
struct alignas(16) Vec8 {
    uint32_t pair[4];
};

DEVICE float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
DEVICE bf16 to_bf16(float value) { return bf16{uint16_t(pack_bf16(value, 0.f))}; }
DEVICE float low(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float high(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

DEVICE void unpack(const Vec8& vec, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = low(vec.pair[i]);
        out[2 * i + 1] = high(vec.pair[i]);
    }
}

DEVICE Vec8 pack(const float (&in)[8]) {
    Vec8 vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) vec.pair[i] = pack_bf16(in[2 * i], in[2 * i + 1]);
    return vec;
}

DEVICE Vec8 load8(const bf16* at) { return *reinterpret_cast<const Vec8*>(at); }
DEVICE void store8(bf16* at, const Vec8& vec) { *reinterpret_cast<Vec8*>(at) = vec; }

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
    return value;
}

// Sum over the block, known to all its threads. `scratch` holds 32 floats of shared memory; the block has at most 1024 threads, in whole warps.
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    const int warps = blockDim.x / 32;
    return warp_sum(threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.f);
}

DEVICE float silu(float x) { return x / (1.f + exp2_approx(-x * 1.4426950408889634f)); }
