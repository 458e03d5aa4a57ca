// Where a thread's output fragment goes: the result itself, or a partial result for combine.
#pragma once

#include <attention/plan.h>
#include <device.cuh>

// Matrices a call writes. `lse` [rows, heads] may be null. Partials are [slot, kv head, row of the row tile, head_dim] f32 with their
// LSEs [slot, kv head, row of the row tile].
struct Output {
    bf16* out;
    float* lse;
    float* partial;
    float* partial_lse;
};

// The packed rows of a GQA row tile: row r is query r / group of the task, head kv_head * group + r % group.
struct PackedRow {
    int query, head;
    DEVICE PackedRow(int row, int kv_head, int group) : query(row / group), head(kv_head * group + row % group) {}
};

// Writes one row's share of a thread: columns 8 j + 2 (lane % 4) from values[4 j + 2 r], for r = `half`.
template <int HD>
DEVICE void write_row(const Output& to, const Shape& shape, int row, int head, const float (&values)[HD / 2], int half, float lse) {
    bf16* at = to.out + size_t(row) * shape.out_stride + head * HD + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < HD / 8; ++j)
        *reinterpret_cast<uint32_t*>(at + 8 * j) = pack_bf16(values[4 * j + 2 * half], values[4 * j + 2 * half + 1]);
    if (to.lse && threadIdx.x % 4 == 0) to.lse[size_t(row) * shape.heads + head] = lse;
}

// The same into row `index` of the partials.
template <int HD>
DEVICE void write_partial(const Output& to, size_t index, const float (&values)[HD / 2], int half, float lse) {
    float* at = to.partial + index * HD + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < HD / 8; ++j) {
        at[8 * j] = values[4 * j + 2 * half];
        at[8 * j + 1] = values[4 * j + 2 * half + 1];
    }
    if (threadIdx.x % 4 == 0) to.partial_lse[index] = lse;
}
