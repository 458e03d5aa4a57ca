// Decode attention over keys and values in FP8, bound by their bandwidth: as decode.cu, but codes go from shared memory straight into operands.
//
// The tensor cores multiply halves, which hold every code exactly. A row's scale is no part of its elements: that of a key multiplies its scores, that of a
// value its weights. Queries are scaled by a power of two into the range of halves, and so are weights: `reference` is the largest exponent of the values'
// scales so far. Tiles come whole and in order, since all rows of a head lie together. Of them a lane reads 16 successive codes of a key (lane / 4 of eight),
// as the order of dimensions in a dot product is free, and successive codes of four values (two pairs of neighbours), as the order of output columns is.
#include <attention/cursor.cuh>
#include <attention/softmax.cuh>
#include <attention/sources.h>
#include <attention/warps.cuh>
#include <fp8.cuh>
#include <ptx/mma.cuh>

static constexpr int ROWS = 16;
static constexpr int WARPS = 4;
static constexpr int KEYS = 32;
static constexpr int STAGES = 3;

// The power of two next below, as bits; of what is not finite infinity.
DEVICE uint32_t exponent_of(float value) { return float_to_bits(value) & 0x7f800000u; }

// A warp's ring of tiles: rows of codes, cut into pieces of 16 that are permuted within their row so that lanes read different banks; and scales.
template <int HD>
struct Fp8Tiles {
    static constexpr int PIECES = HD / 16;         // of a row
    static constexpr int KEY_PIECES = HD / 64;     // of every key a lane has
    static constexpr int VALUE_BYTES = HD / 8;     // of every value a lane has
    static constexpr int CODES = KEYS * HD;
    static constexpr int SCALES = KEYS + 16;       // a tile's exponents, from a word's first byte on
    static constexpr int STAGE = 2 * CODES + 2 * SCALES;
    static constexpr int BYTES = STAGES * STAGE;

    uint8_t* stages;

    // Where a piece lies that is one of keys, read by four lanes for each of two neighbours at a time; or of values, by two lanes for each of four pairs.
    DEVICE static int place_of_key(int row, int piece) { return (row * PIECES + (piece ^ row % 2 * (PIECES / 2))) * 16; }
    DEVICE static int place_of_value(int row, int piece) { return (row * PIECES + (piece ^ row / 2 * 2 % PIECES)) * 16; }

    DEVICE const uint8_t* codes_of_key(int stage, int block, int piece) const {
        const int lane = threadIdx.x % 32;
        return stages + stage * STAGE + place_of_key(block * 8 + lane / 4, piece * 4 + lane % 4);
    }
    // As the weights of 16 keys lie in an operand: two neighbours, and those eight further on.
    DEVICE const uint8_t* codes_of_value(int stage, int step, int i) const {
        const int lane = threadIdx.x % 32, row = step * 16 + lane % 4 * 2 + i / 2 * 8 + i % 2, byte = lane / 4 * VALUE_BYTES;
        return stages + stage * STAGE + CODES + place_of_value(row, byte / 16) + byte % 16;
    }
    DEVICE const uint8_t* key_scales(int stage) const { return stages + stage * STAGE + 2 * CODES; }
    DEVICE const uint8_t* value_scales(int stage) const { return key_scales(stage) + SCALES; }

    // Where the tile's first row stands among those of its source.
    DEVICE static size_t first_of(const Fp8Sources& sources, int kv_head, const Cursor<KEYS>& at) {
        return size_t(kv_head) * sources.rows[at.segment->source] + at.segment->first_row + at.first_key();
    }

    DEVICE void load(int stage, const Fp8Sources& sources, int kv_head, const Cursor<KEYS>& at) const {
        const int source = at.segment->source, valid = at.segment->rows - at.first_key(), word = threadIdx.x % 32 * 4;
        const size_t first = first_of(sources, kv_head, at);
        copy(stage, sources.k[source] + first * HD, sources.v[source] + first * HD, valid);
        // Whole words, which may hold exponents of rows before and after.
        const int before = first % 4;
        if (word >= KEYS + 4) return;
        const bool inside = word < before + valid;
        const size_t from = inside ? first - before + word : 0;
        copy_async4(const_cast<uint8_t*>(key_scales(stage) + word), sources.k_scales[source] + from, inside);
        copy_async4(const_cast<uint8_t*>(value_scales(stage) + word), sources.v_scales[source] + from, inside);
    }

    DEVICE static void prefetch(const Fp8Sources& sources, int kv_head, const Cursor<KEYS>& at) {
        const int source = at.segment->source, valid = at.segment->rows - at.first_key(), lane = threadIdx.x % 32;
        const size_t first = first_of(sources, kv_head, at);
        if (lane >= valid) return;
        prefetch_line(sources.k[source] + (first + lane) * HD);
        prefetch_line(sources.v[source] + (first + lane) * HD);
    }

    // Rows from `valid` on become 0.
    DEVICE void copy(int stage, const uint8_t* keys, const uint8_t* values, int valid) const {
        uint8_t* to = stages + stage * STAGE;
#pragma unroll
        for (int i = 0; i < CODES / 512; ++i) {
            const int at = i * 32 + threadIdx.x % 32, row = at / PIECES, piece = at % PIECES;
            const bool inside = row < valid;
            copy_async16(to + place_of_key(row, piece), keys + (inside ? at * 16 : 0), inside);
            copy_async16(to + CODES + place_of_value(row, piece), values + (inside ? at * 16 : 0), inside);
        }
    }
};

// The queries of a row tile as operands: of dimension block b * 64, step m, this lane has dimensions 16 (lane % 4) + 4 m .. + 4 of rows lane / 4 and that plus 8.
template <int HD>
struct Queries {
    uint32_t operand[HD / 16][4];
    float unit;  // what scores have to be multiplied with

    DEVICE Queries(const bf16* q, const Shape& shape, const Task& task, int first_row, int kv_head) {
        const int lane = threadIdx.x % 32;
        float largest = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + half * 8;
            const bool inside = row < task.queries * shape.group;
            const PackedRow packed(inside ? row : 0, kv_head, shape.group);
            const bf16* from = q + size_t(task.first_query + packed.query) * shape.q_stride + packed.head * HD + lane % 4 * 16;
#pragma unroll
            for (int i = 0; i < HD / 32; ++i) {
                const Vec8 eight = inside ? load8(from + i / 2 * 64 + i % 2 * 8) : Vec8{};
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    operand[i * 2 + p / 2][p % 2 * 2 + half] = eight.pair[p];
                    largest = fmaxf(largest, fmaxf(fabsf(low(eight.pair[p])), fabsf(high(eight.pair[p]))));
                }
            }
        }
        for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
        // The largest comes to lie between 2^13 and 2^14.
        const uint32_t exponent = max(exponent_of(largest) >> 23, 14u);
        const float factor = bits_to_float((267u - exponent) << 23);
        unit = bits_to_float((exponent - 13u) << 23);
#pragma unroll
        for (int step = 0; step < HD / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) operand[step][i] = pack_half(low(operand[step][i]) * factor, high(operand[step][i]) * factor);
    }
};

template <int HD>
struct DecodeFp8 {
    using Tiles = Fp8Tiles<HD>;
    static constexpr int RUN = HD / 8;                 // output columns of this lane's: (2 (lane % 4) + i) * RUN + t
    static constexpr int LEAST = 27;                   // 2^-100, where `reference` begins
    using Left = Exchange<HD, 4, HD + 33>;

    const Shape& shape;
    const Fp8Sources& sources;
    const Work work;
    const Task task;
    const int kv_head, warp, lane;
    Tiles tiles;
    Softmax softmax;
    int reference = LEAST;
    float out[RUN * 4] = {};

    DEVICE DecodeFp8(const Shape& shape, const Fp8Sources& sources, const Plan& plan)
        : shape(shape), sources(sources), work(plan.works[blockIdx.x]), task(plan.tasks[work.task]), kv_head(blockIdx.y), warp(threadIdx.x / 32),
          lane(threadIdx.x % 32), tiles{dynamic_shared() + warp * Tiles::BYTES} {}

    DEVICE int packed_rows() const { return task.queries * shape.group; }
    DEVICE int query_of(int row) const { return min((work.first_row + row) / shape.group, task.queries - 1); }

    // Of the warp's first tiles, while the kernels before are still at work. What they write is seen all the same: it passes through the same cache.
    DEVICE void prefetch(const Plan& plan) const {
        if (warp >= work.tiles) return;
        Cursor<KEYS> at(plan, task, query_of(0), query_of(ROWS - 1), work.first_tile + warp);
        Tiles::prefetch(sources, kv_head, at);
        if (warp + WARPS >= work.tiles) return;
        at.advance(WARPS);
        Tiles::prefetch(sources, kv_head, at);
    }

    // Scores of the tile's keys, scaled as the queries are.
    DEVICE void multiply_keys(float (&scores)[KEYS / 2], const Queries<HD>& q, int stage, int before, int valid) const {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) scores[i] = 0.f;
#pragma unroll
        for (int piece = 0; piece < Tiles::KEY_PIECES; ++piece) {
            Codes16 codes[KEYS / 8];
#pragma unroll
            for (int block = 0; block < KEYS / 8; ++block) codes[block] = *reinterpret_cast<const Codes16*>(tiles.codes_of_key(stage, block, piece));
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int block = 0; block < KEYS / 8; ++block) {
                    const uint32_t four = codes[block].four[m];
                    multiply_add_half(&scores[4 * block], q.operand[piece * 4 + m], decode_fp8x2<0>(four), decode_fp8x2<1>(four));
                }
        }
        scale_columns(scores, tiles.key_scales(stage) + before, 1.f, valid);
    }

    // Multiplies column c by the c-th scale and `unit`; columns from `valid` on, whose scales are anything, become 0.
    DEVICE void scale_columns(float (&columns)[KEYS / 2], const uint8_t* scales, float unit, int valid) const {
#pragma unroll
        for (int block = 0; block < KEYS / 8; ++block)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 8 * block + lane % 4 * 2 + i;
                const float scale = column < valid ? scale_of(scales[column]) * unit : 0.f;
                columns[4 * block + i] *= scale;
                columns[4 * block + 2 + i] *= scale;
            }
    }

    // Keeps weights times scales below 2^13: what the output is to be multiplied with if a value's scale exceeds the reference.
    DEVICE float raise_reference(const uint8_t* scales, int valid) {
        uint32_t largest = lane < valid ? scales[lane] : 0;
        for (int step = 16; step > 0; step /= 2) largest = max(largest, shuffle_xor(largest, step));
        if (int(largest) <= reference) return 1.f;
        const float ratio = scale_of(reference) / scale_of(largest);
        reference = largest;
        return ratio;
    }

    DEVICE void multiply_values(const float (&weights)[KEYS / 2], int stage) {
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint32_t a[4], codes[4][RUN / 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = pack_half(weights[8 * step + 2 * i], weights[8 * step + 2 * i + 1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint8_t* from = tiles.codes_of_value(stage, step, i);
                if constexpr (RUN == 16) {
                    const Codes16 sixteen = *reinterpret_cast<const Codes16*>(from);
#pragma unroll
                    for (int w = 0; w < 4; ++w) codes[i][w] = sixteen.four[w];
                } else {
#pragma unroll
                    for (int w = 0; w < RUN / 4; ++w) codes[i][w] = reinterpret_cast<const uint32_t*>(from)[w];
                }
            }
#pragma unroll
            for (int w = 0; w < RUN / 4; ++w)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // A code of either neighbour beside that of the other.
                    const uint32_t near = half ? pick_bytes<0x7362>(codes[0][w], codes[1][w]) : pick_bytes<0x5140>(codes[0][w], codes[1][w]);
                    const uint32_t far = half ? pick_bytes<0x7362>(codes[2][w], codes[3][w]) : pick_bytes<0x5140>(codes[2][w], codes[3][w]);
                    const int t = w * 4 + half * 2;
                    multiply_add_half(&out[4 * t], a, decode_fp8x2<0>(near), decode_fp8x2<0>(far));
                    multiply_add_half(&out[4 * t + 4], a, decode_fp8x2<1>(near), decode_fp8x2<1>(far));
                }
        }
    }

    DEVICE void attend(int stage, const Queries<HD>& q, const Cursor<KEYS>& at) {
        float scores[KEYS / 2], rescale[2];
        const int before = Tiles::first_of(sources, kv_head, at) % 4, valid = at.segment->rows - at.first_key();
        multiply_keys(scores, q, stage, before, valid);
        if (at.masked()) {
            const int visible[2] = {at.visible(query_of(lane / 4)), at.visible(query_of(lane / 4 + 8))};
            mask_scores(scores, visible);
        }
        softmax.update(scores, shape.scale * LOG2_E * q.unit, rescale);
        const float ratio = raise_reference(tiles.value_scales(stage) + before, valid);
        rescale[0] *= ratio;
        rescale[1] *= ratio;
        if (warp_any(rescale[0] != 1.f || rescale[1] != 1.f)) rescale_rows(out, rescale);
        // 2^12 over the reference.
        scale_columns(scores, tiles.value_scales(stage) + before, bits_to_float(uint32_t(266 - reference) << 23), valid);
        multiply_values(scores, stage);
    }

    DEVICE void run(const Plan& plan, const Queries<HD>& q) {
        const int mine = (work.tiles - warp + WARPS - 1) / WARPS;
        if (mine <= 0) return;
        Cursor<KEYS> now(plan, task, query_of(0), query_of(ROWS - 1), work.first_tile + warp);
        Cursor<KEYS> ahead = now;
        int loaded = 0;
        for (; loaded < STAGES - 1; ++loaded) {
            if (loaded < mine) {
                if (loaded > 0) ahead.advance(WARPS);
                tiles.load(loaded, sources, kv_head, ahead);
            }
            copy_async_commit();
        }
        for (int i = 0, stage = 0, into = STAGES - 1; i < mine; ++i, ++loaded) {
            sync_warp();  // every lane is done with the scales that are overwritten now
            if (loaded < mine) {
                ahead.advance(WARPS);
                tiles.load(into, sources, kv_head, ahead);
            }
            copy_async_commit();
            copy_async_wait<STAGES - 1>();
            sync_warp();  // every lane's copies have arrived
            attend(stage, q, now);
            if (i + 1 < mine) now.advance(WARPS);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            into = into + 1 == STAGES ? 0 : into + 1;
        }
        copy_async_wait<0>();
    }

    // Merges the warps' results and writes them. The rings are not needed any more and hold what the warps exchange.
    DEVICE void write(const Output& to, float unit) {
        float normalise[2], lse[2];
        softmax.finish(shape.scale * LOG2_E * unit, normalise, lse);
        const float values_unit = scale_of(reference) * 0x1p-12f;
        __syncthreads();
        float* shared = reinterpret_cast<float*>(dynamic_shared());
        const Left left = {shared, shared + WARPS * ROWS * (HD + 33)};
        const int rows = min(packed_rows() - work.first_row, ROWS);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + half * 8;
            if (row >= rows) continue;
            const float factor = normalise[half] * values_unit;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int t = 0; t < RUN; ++t) *left.at(warp * ROWS + row, (lane % 4 * 2 + i) * RUN + t) = out[4 * t + 2 * half + i] * factor;
            if (lane % 4 == 0) left.lses[warp * ROWS + row] = lse[half];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * HD / 2; i += WARPS * 32)
            write_pair<HD, ROWS, WARPS>(to, shape, task, work, kv_head, left, i / (HD / 2), i % (HD / 2) * 2);
    }
};

#define KERNEL(NAME, HD)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(                                                                   \
        const __grid_constant__ Shape shape, const __grid_constant__ Fp8Sources sources, const __grid_constant__ Plan plan,          \
        const bf16* q, const __grid_constant__ Output to) {                                                                          \
        let_the_next_grid_start();                                                                                                   \
        DecodeFp8<HD> attention(shape, sources, plan);                                                                               \
        attention.prefetch(plan);                                                                                                    \
        wait_for_earlier_grids();                                                                                                    \
        const Queries<HD> queries(q, shape, attention.task, attention.work.first_row, attention.kv_head);                            \
        attention.run(plan, queries);                                                                                                \
        attention.write(to, queries.unit);                                                                                           \
    }

KERNEL(attention_decode_fp8_128, 128)
KERNEL(attention_decode_fp8_64, 64)
