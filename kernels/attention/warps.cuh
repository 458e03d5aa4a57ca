// The end of a decode block: what its warps found, each over its own share of the keys, becomes one result.
//
// Each warp leaves its normalised output and its LSE (natural) of ROWS packed rows in shared memory, as LAYOUT says where.
#pragma once

#include <attention/output.cuh>

static constexpr float LOG2_E = 1.4426950408889634f;

// A row of HD values at `row * STRIDE`, cut into eight runs that are PAD values apart: STRIDE and PAD spread what lanes write at once over the banks.
template <int HD, int PAD, int STRIDE>
struct Exchange {
    static constexpr int RUN = HD / 8;

    float* values;
    float* lses;

    DEVICE float* at(int row, int column) const { return values + row * STRIDE + column / RUN * (RUN + PAD) + column % RUN; }
};

// Writes columns `column` (even) and the next of packed row `row` of a piece of work.
template <int HD, int ROWS, int WARPS, class Layout>
DEVICE void write_pair(const Output& to, const Shape& shape, const Task& task, const Work& work, int kv_head, const Layout& left, int row, int column) {
    float largest = -INFINITY, sum = 0.f, even = 0.f, odd = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, left.lses[w * ROWS + row]);
    const float shift = largest == -INFINITY ? 0.f : largest;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const float weight = exp2_approx((left.lses[w * ROWS + row] - shift) * LOG2_E);
        const float* pair = left.at(w * ROWS + row, column);
        sum += weight;
        even += weight * pair[0];
        odd += weight * pair[1];
    }
    const float norm = sum > 0.f ? 1.f / sum : 0.f;
    const float lse = sum > 0.f ? largest + logf(sum) : -INFINITY;
    const PackedRow packed(work.first_row + row, kv_head, shape.group);
    if (work.slot < 0) {
        const size_t at = task.first_query + packed.query;
        *reinterpret_cast<uint32_t*>(to.out + at * shape.out_stride + packed.head * HD + column) = pack_bf16(even * norm, odd * norm);
        if (to.lse && column == 0) to.lse[at * shape.heads + packed.head] = lse;
    } else {
        const size_t at = (size_t(work.slot) * shape.kv_heads + kv_head) * ROWS + row;
        to.partial[at * HD + column] = even * norm;
        to.partial[at * HD + column + 1] = odd * norm;
        if (column == 0) to.partial_lse[at] = lse;
    }
}
