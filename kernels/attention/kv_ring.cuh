// A warp's own ring of key and value tiles in shared memory, of keys and values in bf16 or in FP8.
//
// A ring starts copies of a stage with load(); when they have arrived, keys() and values() give its tiles. Each of the two holds until the next call of either.
#pragma once

#include <attention/cursor.cuh>
#include <attention/sources.h>
#include <attention/tile.cuh>
#include <fp8.cuh>

template <int HD, int KEYS>
struct PlainRing {
    using From = Sources;
    static constexpr int STAGES = 2;
    static constexpr int TILE = KEYS * HD;  // elements
    static constexpr int BYTES = STAGES * 2 * TILE * 2;

    bf16* tiles;

    DEVICE explicit PlainRing(uint8_t* at) : tiles(reinterpret_cast<bf16*>(at)) {}

    DEVICE void load(int stage, const From& sources, const Shape& shape, int kv_head, const Cursor<KEYS>& at) {
        const int source = at.segment->source, valid = at.segment->rows - at.first_key(), lane = threadIdx.x % 32;
        const size_t offset = size_t(at.segment->first_row + at.first_key()) * shape.kv_stride + kv_head * HD;
        Tile<HD>::load(keys(stage), sources.k[source] + offset, shape.kv_stride, KEYS, valid, lane, 32);
        Tile<HD>::load(values(stage), sources.v[source] + offset, shape.kv_stride, KEYS, valid, lane, 32);
    }
    DEVICE bf16* keys(int stage) { return tiles + stage * 2 * TILE; }
    DEVICE bf16* values(int stage) { return keys(stage) + TILE; }
};

template <int HD, int KEYS>
struct Fp8Ring {
    using From = Fp8Sources;
    static constexpr int STAGES = 2;
    static constexpr int RAW = KEYS * HD;  // bytes of a tile's codes
    static constexpr int STAGE = 2 * (RAW + KEYS * 4);
    static constexpr int BYTES = STAGES * STAGE + RAW * 2;

    uint8_t* stages;
    bf16* tile;  // the tile at hand, in bf16

    DEVICE explicit Fp8Ring(uint8_t* at) : stages(at), tile(reinterpret_cast<bf16*>(at + STAGES * STAGE)) {}

    DEVICE void load(int stage, const From& sources, const Shape& shape, int kv_head, const Cursor<KEYS>& at) {
        const int source = at.segment->source, valid = at.segment->rows - at.first_key();
        const size_t row = at.segment->first_row + at.first_key();
        const size_t codes = row * shape.kv_stride + kv_head * HD, factors = size_t(kv_head) * sources.rows[source] + row;
        load_tile(stages + stage * STAGE, sources.k[source] + codes, sources.k_factors[source] + factors, shape.kv_stride, valid);
        load_tile(stages + stage * STAGE + STAGE / 2, sources.v[source] + codes, sources.v_factors[source] + factors, shape.kv_stride, valid);
    }
    DEVICE bf16* keys(int stage) { return decode(stages + stage * STAGE); }
    DEVICE bf16* values(int stage) { return decode(stages + stage * STAGE + STAGE / 2); }

private:
    // Codes of KEYS rows, and behind them the rows' factors.
    DEVICE static void load_tile(uint8_t* to, const uint8_t* codes, const float* factors, int stride, int valid) {
        for (int i = threadIdx.x % 32; i < RAW / 16; i += 32) {
            const int row = i / (HD / 16), chunk = i % (HD / 16);
            copy_async16(to + i * 16, row < valid ? codes + size_t(row) * stride + chunk * 16 : codes, row < valid);
        }
        for (int row = threadIdx.x % 32; row < KEYS; row += 32) copy_async4(to + RAW + row * 4, row < valid ? factors + row : factors, row < valid);
    }

    DEVICE bf16* decode(const uint8_t* from) {
        const float* factors = reinterpret_cast<const float*>(from + RAW);
        sync_warp();  // every lane is done with the tile before
        for (int i = threadIdx.x % 32; i < RAW / 16; i += 32) {
            const int row = i / (HD / 16), chunk = i % (HD / 16) * 2;
            const Codes16 codes = *reinterpret_cast<const Codes16*>(from + i * 16);
            store8(Tile<HD>::at(tile, row, chunk), decode8(codes, 0, factors[row]));
            store8(Tile<HD>::at(tile, row, chunk + 1), decode8(codes, 1, factors[row]));
        }
        sync_warp();
        return tile;
    }
};
