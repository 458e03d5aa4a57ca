// Parameters of rope_store, passed by value; the wrapper in Rust has the same layout.
#pragma once

#include <cstdint>

static constexpr int MAX_RUNS = 64;
static constexpr int MAX_PAIRS = 128;

// Rows whose positions ascend by one: run j starts at row[j] with position[j].
struct PositionRuns {
    int32_t count;
    int32_t row[MAX_RUNS];
    uint32_t position[MAX_RUNS];
};

// Radians per position of each pair, and the factor on sine and cosine.
struct Frequencies {
    float scale;
    float radians[MAX_PAIRS];
};
