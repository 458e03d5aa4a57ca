// A token from each row of logits [rows, count] f32, as the row's choice says.
//
//   sharpness 0  the highest, of equals the lowest index
//   otherwise    weights 2^(sharpness * (logit - highest)); the nucleus are the highest logits, as few as hold `top_p` of all weights, and all that equal the
//                last of them; in the order of the indices, the first at which the sum of the weights exceeds `draw` times that of the nucleus
// chosen [rows, 2]: the index, and the lowest index of a logit that is not finite, or all ones. One block of 1024 threads a row; sums have a fixed order.
#include <choose.h>
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

struct Highest {
    float value;
    uint32_t index, first_bad;
};

// The highest of the logits and the first that is not finite, known to all threads.
DEVICE Highest find_highest(const float* logits, int count, uint32_t* scratch) {
    uint32_t least = NONE, at = NONE, bad = NONE;  // the complement of the highest, so that everything is a minimum
#pragma unroll 8
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
    return {index == NONE ? 0.f : logits[index], index, first_bad};
}

struct Weights {
    const float* logits;
    float highest, sharpness;

    DEVICE float at(int i) const { return exp2_approx((logits[i] - highest) * sharpness); }
};

// Sum of the weights of all logits from `least` on (as ordered integers), known to all threads.
DEVICE float mass_from(const Weights& weights, int count, uint32_t least, float* scratch) {
    float mass = 0.f;
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (ordered(weights.logits[i]) >= least) mass += weights.at(i);
    __syncthreads();
    return block_sum(mass, scratch);
}

// The highest `least` from which on the logits hold `enough`, bit by bit.
DEVICE uint32_t least_of_nucleus(const Weights& weights, int count, float enough, float* scratch) {
    uint32_t least = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const uint32_t tried = least | 1u << bit;
        if (mass_from(weights, count, tried, scratch) >= enough) least = tried;
    }
    return least;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose_tokens(
    const float* all_logits, int count, const __grid_constant__ Choices choices, uint32_t* all_chosen) {
    __shared__ uint32_t words[32];
    __shared__ float floats[32], sums[THREADS];
    __shared__ int owner;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const float* logits = all_logits + size_t(blockIdx.x) * count;
    uint32_t* chosen = all_chosen + blockIdx.x * 2;
    const float sharpness = choices.sharpness[blockIdx.x], top_p = choices.top_p[blockIdx.x], draw = choices.draw[blockIdx.x];
    const Highest highest = find_highest(logits, count, words);
    if (threadIdx.x == 0) {
        chosen[0] = highest.index;
        chosen[1] = highest.first_bad;
    }
    if (highest.first_bad != NONE || sharpness == 0.f) return;
    const Weights weights = {logits, highest.value, sharpness};
    uint32_t least = 0;
    if (top_p < 1.f) {
        const float all = mass_from(weights, count, 0, floats);
        // What is lost in rounding must not empty the nucleus.
        least = min(least_of_nucleus(weights, count, all * top_p, floats), ordered(highest.value));
    }
    // Each thread has a run of indices, so that the sums before it are those of the threads before it.
    const int run = (count + THREADS - 1) / THREADS, first = threadIdx.x * run, last = min(first + run, count);
    float mine = 0.f;
    for (int i = first; i < last; ++i)
        if (ordered(logits[i]) >= least) mine += weights.at(i);
    sums[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0.f, before = 0.f;
        for (int t = 0; t < THREADS; ++t) all += sums[t];
        const float wanted = all * draw;
        owner = 0;
        for (int t = 0; t < THREADS; ++t) {
            if (sums[t] == 0.f) continue;
            owner = t;
            if (before + sums[t] > wanted) break;
            before += sums[t];
        }
        floats[0] = before;
        floats[1] = wanted;
    }
    __syncthreads();
    if (threadIdx.x != owner) return;
    float sum = floats[0];
    for (int i = first; i < last; ++i) {
        const float weight = ordered(logits[i]) >= least ? weights.at(i) : 0.f;
        if (weight == 0.f) continue;
        chosen[0] = i;
        sum += weight;
        if (sum > floats[1]) return;
    }
}
