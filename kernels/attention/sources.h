// Key/value matrices of an attention call, passed by value.
#pragma once

struct bf16;

static constexpr int MAX_SOURCES = 64;

struct Sources {
    const bf16* k[MAX_SOURCES];
    const bf16* v[MAX_SOURCES];
};
