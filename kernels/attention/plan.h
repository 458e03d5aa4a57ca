// What an attention launch works through, as the planner in Rust lays it out in device memory, and how a kernel walks it.
//
// A task is a run of query rows over a list of key/value segments, as if those were concatenated. Its rows are cut into row tiles,
// what a row tile sees of each segment into key tiles; key tiles are numbered through over the segments. A piece of work is a row tile
// with a run of its key tiles.
// Invariant: the structs here and in src/backend/cuda/attention_plan.rs have the same layout.
#pragma once

#include <cstdint>

// A run of key/value rows. `causal`: of m queries over n rows, query i sees the first n - m + i + 1.
struct Segment {
    int32_t source, first_row, rows, causal, map;
};

// Rows of q, and where the segments stand in the list.
struct Task {
    int32_t first_query, queries, first_segment, segments;
};

// Row tile and key tiles. `slot` is where a partial result goes, -1 if this is the whole.
struct Work {
    int32_t task, first_row, first_tile, tiles, slot;
};

// Partial results of a row tile that belong together: `slots` of them from `slot` on.
struct Merge {
    int32_t task, first_row, slot, slots;
};

struct Plan {
    const Task* tasks;
    const Segment* segments;
    const Work* works;
};

// Geometry and strides in elements of the matrices of a call. `group` is query heads per KV head.
struct Shape {
    int32_t heads, kv_heads, group;
    int32_t q_stride, kv_stride, out_stride;
    float scale;  // 1 / sqrt(head_dim)
};
