// Parameters of rope_store, passed by value; the wrapper in Rust has the same layout.
#pragma once

#include <cstdint>

struct bf16;

static constexpr int MAX_RUNS = 64;
static constexpr int MAX_PAIRS = 128;
static constexpr int MAX_PLACES = 64;

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

// Each row's position, and the rows of keys and values it becomes.
struct Places {
    bf16* k[MAX_PLACES];
    bf16* v[MAX_PLACES];
    uint32_t position[MAX_PLACES];
};

// The same in FP8, see fp8.cuh: row `row` of matrices with `capacity` rows.
struct Fp8Places {
    uint8_t* k[MAX_PLACES];
    uint8_t* v[MAX_PLACES];
    uint8_t* k_scales[MAX_PLACES];
    uint8_t* v_scales[MAX_PLACES];
    int32_t row[MAX_PLACES];
    int32_t capacity[MAX_PLACES];
    uint32_t position[MAX_PLACES];
};
