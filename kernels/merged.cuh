// Partial attention results that become one: sum_p e^(lse[p] - m) part[p] / sum_p e^(lse[p] - m), m = max_p lse[p], of N elements of a row and head.
//
// Partials are added in the caller's order. One that saw nothing has LSE -inf and counts nothing; if all are so, the result is 0.
#pragma once

#include <device.cuh>

template <int N>
struct Merged {
    float largest;
    float sum = 0.f, value[N] = {};

    DEVICE explicit Merged(float largest) : largest(largest) {}

    DEVICE void add(float lse, const float (&part)[N]) {
        if (lse == -INFINITY) return;
        const float weight = exp2_approx((lse - largest) * 1.4426950408889634f);
        sum += weight;
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] += weight * part[i];
    }

    DEVICE void normalise() {
        const float norm = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] *= norm;
    }
};
