// Decode attention: the few packed rows of one or several queries over a long cache in bf16, bound by the bandwidth of keys and values.
//
// The same formula and work list as mma.cu with a row tile of 16 packed rows. Each warp of a block walks every WARPS-th key tile on its own, with its
// own softmax and its own ring of shared memory, so that no warp waits for another; the warps' results are merged at the end through shared memory.
#include <attention/cursor.cuh>
#include <attention/softmax.cuh>
#include <attention/sources.h>
#include <attention/tile.cuh>
#include <attention/warps.cuh>

static constexpr int ROWS = 16;
static constexpr int WARPS = 4;
static constexpr int KEYS = 16;
static constexpr int STAGES = 3;

// A warp's own ring of key and value tiles in shared memory.
template <int HD>
struct Ring {
    static constexpr int TILE = KEYS * HD;  // elements
    static constexpr int BYTES = STAGES * 2 * TILE * 2;

    bf16* tiles;

    DEVICE explicit Ring(uint8_t* at) : tiles(reinterpret_cast<bf16*>(at)) {}

    DEVICE void load(int stage, const Sources& sources, const Shape& shape, int kv_head, const Cursor<KEYS>& at) {
        const int source = at.segment->source, valid = at.segment->rows - at.first_key(), lane = threadIdx.x % 32;
        const size_t offset = size_t(at.segment->first_row + at.first_key()) * shape.kv_stride + kv_head * HD;
        Tile<HD>::load(keys(stage), sources.k[source] + offset, shape.kv_stride, KEYS, valid, lane, 32);
        Tile<HD>::load(values(stage), sources.v[source] + offset, shape.kv_stride, KEYS, valid, lane, 32);
    }
    // Of a tile's lines; those of a row are 128 bytes apart.
    DEVICE static void prefetch(const Sources& sources, const Shape& shape, int kv_head, const Cursor<KEYS>& at) {
        constexpr int LINES = HD > 64 ? HD / 64 : 1;
        const int source = at.segment->source, valid = at.segment->rows - at.first_key();
        const size_t offset = size_t(at.segment->first_row + at.first_key()) * shape.kv_stride + kv_head * HD;
        for (int i = threadIdx.x % 32; i < min(KEYS, valid) * LINES; i += 32) {
            const size_t line = offset + size_t(i / LINES) * shape.kv_stride + i % LINES * 64;
            prefetch_line(sources.k[source] + line);
            prefetch_line(sources.v[source] + line);
        }
    }
    DEVICE bf16* keys(int stage) { return tiles + stage * 2 * TILE; }
    DEVICE bf16* values(int stage) { return keys(stage) + TILE; }
};

template <int HD>
struct DecodeAttention {
    using Left = Exchange<HD, 0, HD>;

    const Shape& shape;
    const Sources& sources;
    const Work work;
    const Task task;
    const int kv_head, warp, lane;
    bf16* q;
    Ring<HD> ring;
    Softmax softmax;
    float out[1][HD / 2] = {};

    DEVICE DecodeAttention(const Shape& shape, const Sources& sources, const Plan& plan)
        : shape(shape), sources(sources), work(plan.works[blockIdx.x]), task(plan.tasks[work.task]),
          kv_head(blockIdx.y), warp(threadIdx.x / 32), lane(threadIdx.x % 32), q(reinterpret_cast<bf16*>(dynamic_shared())),
          ring(dynamic_shared() + ROWS * HD * 2 + warp * Ring<HD>::BYTES) {}

    DEVICE int packed_rows() const { return task.queries * shape.group; }
    DEVICE int query_of(int row) const { return min((work.first_row + row) / shape.group, task.queries - 1); }

    // Of the warp's first tiles, while the kernels before are still at work. What they write is seen all the same: it passes through the same cache.
    DEVICE void prefetch(const Plan& plan) const {
        if (warp >= work.tiles) return;
        Cursor<KEYS> at(plan, task, query_of(0), query_of(ROWS - 1), work.first_tile + warp);
        Ring<HD>::prefetch(sources, shape, kv_head, at);
        if (warp + WARPS >= work.tiles) return;
        at.advance(WARPS);
        Ring<HD>::prefetch(sources, shape, kv_head, at);
    }

    DEVICE void load_q(const bf16* from) {
        for (int i = threadIdx.x; i < ROWS * Tile<HD>::CHUNKS; i += WARPS * 32) {
            const int row = i / Tile<HD>::CHUNKS, chunk = i % Tile<HD>::CHUNKS;
            const bool inside = work.first_row + row < packed_rows();
            const PackedRow packed(inside ? work.first_row + row : 0, kv_head, shape.group);
            copy_async16(Tile<HD>::at(q, row, chunk),
                         from + size_t(task.first_query + packed.query) * shape.q_stride + packed.head * HD + chunk * 8, inside);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
    }

    DEVICE void attend(int stage, const Cursor<KEYS>& at) {
        float scores[1][KEYS / 2], rescale[2];
        multiply_qk<HD, KEYS>(scores, q, 0, ring.keys(stage));
        if (at.masked()) {
            const int visible[2] = {at.visible(query_of(lane / 4)), at.visible(query_of(lane / 4 + 8))};
            mask_scores(scores[0], visible);
        }
        softmax.update(scores[0], shape.scale * LOG2_E, rescale);
        if (warp_any(rescale[0] != 1.f || rescale[1] != 1.f)) rescale_rows(out[0], rescale);
        multiply_pv<HD, KEYS>(out, scores, ring.values(stage));
    }

    DEVICE void run(const Plan& plan) {
        const int mine = (work.tiles - warp + WARPS - 1) / WARPS;
        if (mine <= 0) return;
        Cursor<KEYS> now(plan, task, query_of(0), query_of(ROWS - 1), work.first_tile + warp);
        Cursor<KEYS> ahead = now;
        int loaded = 0;
        for (; loaded < STAGES - 1; ++loaded) {
            if (loaded < mine) {
                if (loaded > 0) ahead.advance(WARPS);
                ring.load(loaded, sources, shape, kv_head, ahead);
            }
            copy_async_commit();
        }
        for (int i = 0; i < mine; ++i, ++loaded) {
            sync_warp();  // every lane is done with the stage that is overwritten now
            if (loaded < mine) {
                ahead.advance(WARPS);
                ring.load(loaded % STAGES, sources, shape, kv_head, ahead);
            }
            copy_async_commit();
            copy_async_wait<STAGES - 1>();
            sync_warp();  // every lane's copies have arrived
            attend(i % STAGES, now);
            if (i + 1 < mine) now.advance(WARPS);
        }
        copy_async_wait<0>();
    }

    // Merges the warps' results and writes them. The ring is not needed any more and holds what the warps exchange.
    DEVICE void write(const Output& to) {
        float normalise[2], lse[2];
        softmax.finish(shape.scale * LOG2_E, normalise, lse);
        rescale_rows(out[0], normalise);
        __syncthreads();
        float* values = reinterpret_cast<float*>(q + ROWS * HD);
        const Left left = {values, values + WARPS * ROWS * HD};
        const Output exchange = {nullptr, nullptr, left.values, left.lses};
        for (int half = 0; half < 2; ++half) write_partial<HD>(exchange, warp * ROWS + lane / 4 + half * 8, out[0], half, lse[half]);
        __syncthreads();
        const int rows = min(packed_rows() - work.first_row, ROWS);
        for (int i = threadIdx.x; i < rows * HD / 2; i += WARPS * 32)
            write_pair<HD, ROWS, WARPS>(to, shape, task, work, kv_head, left, i / (HD / 2), i % (HD / 2) * 2);
    }
};

#define KERNEL(NAME, HD)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(                                                                   \
        const __grid_constant__ Shape shape, const __grid_constant__ Sources sources, const __grid_constant__ Plan plan,             \
        const bf16* q, const __grid_constant__ Output to) {                                                                          \
        let_the_next_grid_start();                                                                                                   \
        DecodeAttention<HD> attention(shape, sources, plan);                                                                         \
        attention.prefetch(plan);                                                                                                    \
        wait_for_earlier_grids();                                                                                                    \
        attention.load_q(q);                                                                                                         \
        attention.run(plan);                                                                                                         \
        attention.write(to);                                                                                                         \
    }

KERNEL(attention_decode_128, 128)
KERNEL(attention_decode_64, 64)
KERNEL(attention_decode_32, 32)
KERNEL(attention_decode_16, 16)
