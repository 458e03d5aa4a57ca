// Reproducible random numbers: out[i] uniform in [-scale, scale), from a hash of (seed, i). For weights of a given shape in benchmarks.
#include <device.cuh>

// The finaliser of a 64-bit counter-based generator: each input bit reaches each output bit.
DEVICE uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

extern "C" __global__ void random_bf16(uint64_t seed, float scale, uint64_t count, bf16* out) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x) {
        const float unit = float(mixed(seed ^ mixed(i)) >> 40) * 0x1p-23f - 1.f;
        out[i] = to_bf16(unit * scale);
    }
}
