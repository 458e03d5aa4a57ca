// Parameter of top_k, passed by value; the wrapper in Rust has the same layout.
#pragma once

#include <cstdint>

// Which score columns form the pooled sequence: `before`, then `candidate`.
struct Pooling {
    int32_t before_first, before_count;
    int32_t candidate_first, candidate_count;
    int32_t pool;  // 0: the scores as they are
};
