// Walking the key tiles of a row tile, segment after segment.
#pragma once

#include <attention/plan.h>
#include <device.cuh>

// Rows of `segment` that query `i` of the task sees.
DEVICE int visible_rows(const Segment& segment, int queries, int i) {
    return segment.causal ? min(max(segment.rows - queries + i + 1, 0), segment.rows) : segment.rows;
}

// The key tile at hand: KEYS rows of a segment from `first_key` on. The row tile's queries are first_query ..= last_query of the task.
template <int KEYS>
struct Cursor {
    const Segment* segment;
    int queries, first_query, last_query;
    int tile, tiles_here;

    DEVICE Cursor(const Plan& plan, const Task& task, int first, int last, int skip)
        : segment(plan.segments + task.first_segment), queries(task.queries), first_query(first), last_query(last), tile(0) {
        count_tiles();
        advance(skip);
    }

    DEVICE void count_tiles() { tiles_here = (visible_rows(*segment, queries, last_query) + KEYS - 1) / KEYS; }

    // Steps on by `by` tiles. Must not be moved past the end other than by being left there.
    DEVICE void advance(int by) {
        tile += by;
        while (tile >= tiles_here) {
            tile -= tiles_here;
            ++segment;
            count_tiles();
        }
    }

    DEVICE int first_key() const { return tile * KEYS; }
    // Whether some row of the row tile does not see all of this key tile.
    DEVICE bool masked() const { return first_key() + KEYS > visible_rows(*segment, queries, first_query); }
    // Keys of this tile that query `i` sees; may be negative or beyond KEYS.
    DEVICE int visible(int i) const { return visible_rows(*segment, queries, i) - first_key(); }
};
