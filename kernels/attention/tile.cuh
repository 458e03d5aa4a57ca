// Tiles of rows in shared memory for ldmatrix, and the two products of attention on them (mma.sync).
//
// A tile is [rows, HD] bf16; the 16-byte chunks of a row are permuted by its number, so that eight rows of one chunk column lie in all
// 32 banks.
#pragma once

#include <device.cuh>
#include <ptx/mma.cuh>

template <int HD>
struct Tile {
    static constexpr int CHUNKS = HD / 8;
    static constexpr int SPREAD = CHUNKS < 8 ? CHUNKS : 8;      // chunks that are permuted among each other
    static constexpr int ROWS_A_LINE = 8 / SPREAD;              // rows in 128 bytes, if less than one fills them

    DEVICE static bf16* at(bf16* tile, int row, int chunk) {
        return tile + row * HD + (chunk ^ (row / ROWS_A_LINE % SPREAD)) * 8;
    }

    // Starts copying `rows` rows of `stride` elements from `from`, by `threads` threads of which this is `thread`; rows from `valid` on become 0.
    DEVICE static void load(bf16* tile, const bf16* from, int stride, int rows, int valid, int thread, int threads) {
        for (int i = thread; i < rows * CHUNKS; i += threads) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const bool inside = row < valid;
            copy_async16(at(tile, row, chunk), inside ? from + size_t(row) * stride + chunk * 8 : from, inside);
        }
    }
};

// scores[t] = q kᵀ: rows first_row + 16 t .. + 16 of the q tile against all KEYS rows of the k tile.
template <int HD, int KEYS, int TILES>
DEVICE void multiply_qk(float (&scores)[TILES][KEYS / 2], bf16* q, int first_row, bf16* k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) scores[t][i] = 0.f;
#pragma unroll
    for (int step = 0; step < HD / 16; ++step) {
        uint32_t a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) load_matrices(a[t], Tile<HD>::at(q, first_row + 16 * t + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int block = 0; block < KEYS / 16; ++block) {
            uint32_t b[4];
            load_matrices(b, Tile<HD>::at(k, block * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                multiply_add(&scores[t][8 * block], a[t], b[0], b[1]);
                multiply_add(&scores[t][8 * block + 4], a[t], b[2], b[3]);
            }
        }
    }
}

// out[t] += weights[t] v, the weights rounded to bf16.
template <int HD, int KEYS, int TILES>
DEVICE void multiply_pv(float (&out)[TILES][HD / 2], const float (&weights)[TILES][KEYS / 2], bf16* v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        uint32_t a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[t][i] = pack_bf16(weights[t][8 * step + 2 * i], weights[t][8 * step + 2 * i + 1]);
#pragma unroll
        for (int block = 0; block < HD / 16; ++block) {
            uint32_t b[4];
            load_matrices_transposed(b, Tile<HD>::at(v, step * 16 + lane % 16, 2 * block + lane / 16));
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                multiply_add(&out[t][8 * block], a[t], b[0], b[1]);
                multiply_add(&out[t][8 * block + 4], a[t], b[2], b[3]);
            }
        }
    }
}
