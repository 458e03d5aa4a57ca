// The highest of a row of logits, of equals the lowest index; and whether all of them are finite.
//
// logits [count] f32; best[0] its index, best[1] the lowest index of a logit that is not finite, or all ones. One block of 1024 threads.
#include <device.cuh>

static constexpr int THREADS = 1024;
static constexpr uint32_t NONE = 0xffffffffu;

// Order-preserving map of floats to integers; both zeros are equal.
DEVICE uint32_t ordered(float value) {
    const uint32_t bits = float_to_bits(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Least value over the block, known to all its threads; `scratch` holds 32 words of shared memory.
DEVICE uint32_t block_min(uint32_t value, uint32_t* scratch) {
    for (int step = 16; step > 0; step /= 2) value = min(value, shuffle_xor(value, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[threadIdx.x % 32];
    for (int step = 16; step > 0; step /= 2) value = min(value, shuffle_xor(value, step));
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) argmax(const float* logits, int count, uint32_t* best) {
    __shared__ uint32_t scratch[32];
    let_the_next_grid_start();
    wait_for_earlier_grids();
    uint32_t least = NONE, at = NONE, bad = NONE;  // the complement of the highest, so that everything is a minimum
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float value = logits[i];
        if ((float_to_bits(value) & 0x7f800000u) == 0x7f800000u) {
            bad = min(bad, uint32_t(i));
        } else if (~ordered(value) < least) {
            least = ~ordered(value);
            at = i;
        }
    }
    const uint32_t highest = block_min(least, scratch);
    const uint32_t index = block_min(least == highest ? at : NONE, scratch);
    const uint32_t first_bad = block_min(bad, scratch);
    if (threadIdx.x == 0) {
        best[0] = index;
        best[1] = first_bad;
    }
}
