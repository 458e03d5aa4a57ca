// Rotation of the heads of a row, see rope_store.cu.
#pragma once

#include <device.cuh>
#include <rope.h>

// Sine and cosine of a row's angles, by the whole block, which has to meet before they are used. Angles are formed and reduced in double, so that a
// position of a million is as exact as the first.
struct Angles {
    float cosine[MAX_PAIRS], sine[MAX_PAIRS];

    DEVICE void set(double position, const Frequencies& frequencies, int half) {
        for (int i = threadIdx.x; i < half; i += blockDim.x) {
            constexpr double TURN = 6.283185307179586;
            const double angle = position * frequencies.radians[i];
            const float reduced = float(angle - TURN * rint(angle / TURN));
            cosine[i] = cosf(reduced) * frequencies.scale;
            sine[i] = sinf(reduced) * frequencies.scale;
        }
    }
};

// Rotates eight pairs, (first[i], first[i + half]).
DEVICE void rotate(bf16* first, int half, const float* cosine, const float* sine, bf16* copy) {
    float a[8], b[8], c[8], d[8];
    unpack(load8(first), a);
    unpack(load8(first + half), b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        c[i] = a[i] * cosine[i] - b[i] * sine[i];
        d[i] = b[i] * cosine[i] + a[i] * sine[i];
    }
    store8(first, pack(c));
    store8(first + half, pack(d));
    if (copy) {
        store8(copy, pack(c));
        store8(copy + half, pack(d));
    }
}

// Rotates q and k of a packed row in place, by the whole block; keys and values are copied to k_row and v_row, if those are not null.
DEVICE void rotate_row(bf16* row, const Angles& angles, int heads, int kv_heads, int head_dim, bf16* k_row, bf16* v_row) {
    const int half = head_dim / 2, units = half / 8, kv_width = kv_heads * head_dim;
    for (int i = threadIdx.x; i < (heads + kv_heads) * units; i += blockDim.x) {
        const int head = i / units, at = i % units * 8;
        bf16* copy = head < heads || !k_row ? nullptr : k_row + (head - heads) * head_dim + at;
        rotate(row + head * head_dim + at, half, angles.cosine + at, angles.sine + at, copy);
    }
    if (!v_row) return;
    const bf16* values = row + (heads + kv_heads) * head_dim;
    for (int i = threadIdx.x * 8; i < kv_width; i += blockDim.x * 8) store8(v_row + i, load8(values + i));
}
