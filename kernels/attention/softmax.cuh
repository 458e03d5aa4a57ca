// Online softmax of one thread's share of a score tile, in the fragment layout that mma and wgmma have in common: a thread holds two rows,
// `element[4 j + 2 r + i]` being column 8 j + 2 (lane % 4) + i of row r; the four lanes of a quad share the rows.
//
// Scores are unscaled dot products; `scale` = log2(e) / sqrt(head_dim), so that weights are powers of two. Maxima are of unscaled scores.
#pragma once

#include <device.cuh>

static constexpr float LN_2 = 0.6931471805599453f;

struct Softmax {
    float largest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of this thread's columns only, until finish()

    // Turns scores into weights in place; `rescale[r]` is what earlier sums and outputs of row r have to be multiplied with.
    // LAZY: the old maximum stays (`rescale` = 1) as long as no weight exceeds 2^8; the result is the same, the reference point another.
    template <int N, bool LAZY = false>
    DEVICE void update(float (&scores)[N], float scale, float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = largest[r];
#pragma unroll
            for (int j = 0; j < N / 4; ++j) best = fmaxf(best, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
            best = fmaxf(best, shuffle_xor(best, 1));
            best = fmaxf(best, shuffle_xor(best, 2));
            // A row that has seen nothing yet keeps weights 0 = 2^-inf instead of NaN = inf - inf.
            if (LAZY && (best - largest[r]) * scale <= 8.f) best = largest[r];
            const float shift = best == -INFINITY ? 0.f : best * scale;
            rescale[r] = best == largest[r] ? 1.f : exp2_approx(largest[r] * scale - shift);
            largest[r] = best;
            float added = 0.f;
#pragma unroll
            for (int j = 0; j < N / 4; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[4 * j + 2 * r + i];
                    score = exp2_approx(score * scale - shift);
                    added += score;
                }
            }
            sum[r] = sum[r] * rescale[r] + added;
        }
    }

    // Completes the sums over the quad. `normalise[r]` is what the output of row r is to be multiplied with, `lse[r]` its natural
    // log-sum-exp; 0 and -inf for a row that saw nothing.
    DEVICE void finish(float scale, float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = sum[r];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            normalise[r] = total > 0.f ? 1.f / total : 0.f;
            lse[r] = total > 0.f ? (largest[r] * scale) * LN_2 + logf(total) : -INFINITY;
        }
    }
};

// Multiplies the output fragment of N values by the rows' factors.
template <int N>
DEVICE void rescale_rows(float (&out)[N], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        out[4 * j] *= factor[0];
        out[4 * j + 1] *= factor[0];
        out[4 * j + 2] *= factor[1];
        out[4 * j + 3] *= factor[1];
    }
}

// Hides what a row does not see: columns from visible[r] on.
template <int N>
DEVICE void mask_scores(float (&scores)[N], const int (&visible)[2]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (8 * j + column + i % 2 >= visible[i / 2]) scores[4 * j + i] = -INFINITY;
    }
}
