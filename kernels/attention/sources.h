// Key/value matrices of an attention call, passed by value.
#pragma once

#include <cstdint>

struct bf16;

static constexpr int MAX_SOURCES = 64;

struct Sources {
    const bf16* k[MAX_SOURCES];
    const bf16* v[MAX_SOURCES];
};

// The same in FP8, see fp8.cuh; `rows` is the capacity.
struct Fp8Sources {
    const uint8_t* k[MAX_SOURCES];
    const uint8_t* v[MAX_SOURCES];
    const uint8_t* k_scales[MAX_SOURCES];
    const uint8_t* v_scales[MAX_SOURCES];
    int32_t rows[MAX_SOURCES];
};
