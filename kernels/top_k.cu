// The k best candidates of each KV head after a max-pool of 5, ascending; of equals the lowest column wins.
//
// scores [kv_heads, stride] f32. The pooled sequence is the columns `before` then `candidates`; candidates below `excluded` take part in
// the pooling only. keys [kv_heads, candidates] u32 is scratch; chosen [kv_heads, k] i32 gets score columns. NaN ranks below everything.
// One block of 1024 threads a head: radix select finds the k-th key digit by digit, then one ordered scan writes what is above it and the
// first few of its equals.
#include <device.cuh>
#include <top_k.h>

static constexpr int THREADS = 1024;
static constexpr int REACH = 2;  // the pool's window is 2 * REACH + 1

// Order-preserving map of floats to integers; both zeros are equal, NaN is least.
DEVICE uint32_t ordered(float value) {
    if (value != value) return 0;
    const uint32_t bits = float_to_bits(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE uint32_t pooled(const float* scores, const Pooling& p, int i) {
    const int at = p.before_count + i, reach = p.pool ? REACH : 0;
    const int from = max(at - reach, 0), to = min(at + reach, p.before_count + p.candidate_count - 1);
    uint32_t best = 0;
    for (int j = from; j <= to; ++j) {
        const int column = j < p.before_count ? p.before_first + j : p.candidate_first + j - p.before_count;
        best = max(best, ordered(scores[column]));
    }
    return best;
}

// Inclusive sum over the block; `warp_sums` holds 32 words of shared memory. Ends with all threads past their reads of it.
DEVICE uint32_t block_scan(uint32_t value, uint32_t* warp_sums, uint32_t* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = shuffle_up(value, step);
        if (lane >= step) value += below;
    }
    if (lane == 31) warp_sums[warp] = value;
    __syncthreads();
    uint32_t sums = warp_sums[lane];
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = shuffle_up(sums, step);
        if (lane >= step) sums += below;
    }
    *total = shuffle(sums, 31);
    const uint32_t before = shuffle(sums, (warp + 31) % 32);
    __syncthreads();
    return value + (warp == 0 ? 0 : before);
}

// The digit of the `need`-th best key among those that match `prefix` above `shift`; reduces `need` by the number of better digits.
DEVICE uint32_t select_digit(const uint32_t* keys, int from, int count, uint32_t prefix, int shift, int* need, uint32_t* histogram, uint32_t* found) {
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = from + threadIdx.x; i < count; i += THREADS) {
        const uint32_t key = keys[i];
        if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int left = *need, digit = 255;
        while (int(histogram[digit]) < left) left -= histogram[digit--];
        found[0] = digit;
        found[1] = left;
    }
    __syncthreads();
    *need = found[1];
    return prefix << 8 | found[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) top_k(
    const float* scores, int stride, const __grid_constant__ Pooling pooling, int excluded, int k, uint32_t* keys, int32_t* chosen) {
    __shared__ uint32_t histogram[256], warp_sums[32], found[2];
    const int count = pooling.candidate_count;
    scores += size_t(blockIdx.x) * stride;
    keys += size_t(blockIdx.x) * count;
    chosen += size_t(blockIdx.x) * k;
    for (int i = excluded + threadIdx.x; i < count; i += THREADS) keys[i] = pooled(scores, pooling, i);
    __syncthreads();

    uint32_t least = 0;
    int ties_wanted = k;
    for (int shift = 24; shift >= 0; shift -= 8) least = select_digit(keys, excluded, count, least, shift, &ties_wanted, histogram, found);

    uint32_t above = 0, ties = 0;  // counted so far
    for (int start = excluded; start < count; start += THREADS) {
        const int i = start + threadIdx.x;
        const uint32_t is_above = i < count && keys[i] > least, is_tie = i < count && keys[i] == least;
        uint32_t total;
        const uint32_t scan = block_scan(is_tie << 16 | is_above, warp_sums, &total);
        const uint32_t above_before = above + (scan & 0xffff) - is_above, ties_before = ties + (scan >> 16) - is_tie;
        if (is_above || (is_tie && ties_before < uint32_t(ties_wanted)))
            chosen[above_before + min(ties_before, uint32_t(ties_wanted))] = pooling.candidate_first + i;
        above += total & 0xffff;
        ties += total >> 16;
    }
}
