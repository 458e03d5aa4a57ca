// Attention with mma.sync (sm_80 and later): prefill where there is no wgmma, and chunks of queries over long caches.
//
//   out[i, head] = softmax(q[i, head] · k[j, head / group] / sqrt(HD)) v[j, head / group] over the keys j that query i sees
// A block takes one piece of work for one KV head (grid: works x kv_heads); the heads of a group are packed as rows of its row tile, so that
// keys and values are read once for all of them. Keys and values come in tiles of KEYS rows, two tiles in shared memory, the next one
// in flight; rows beyond a segment are read as 0.
#include <attention/cursor.cuh>
#include <attention/output.cuh>
#include <attention/softmax.cuh>
#include <attention/tile.cuh>
#include <attention/sources.h>

static constexpr int WARPS = 4;
static constexpr int THREADS = WARPS * 32;

// TILES: 16-row tiles of a warp. KEYS: rows of a key tile.
template <int HD, int TILES, int KEYS>
struct MmaAttention {
    static constexpr int ROWS = WARPS * TILES * 16;

    const Shape& shape;
    const Sources& sources;
    const Task task;
    const Work work;
    const int kv_head, warp_row;
    bf16* const q;

    Softmax softmax[TILES];
    float out[TILES][HD / 2] = {};

    DEVICE MmaAttention(const Shape& shape, const Sources& sources, const Plan& plan)
        : shape(shape), sources(sources), task(plan.tasks[plan.works[blockIdx.x].task]), work(plan.works[blockIdx.x]),
          kv_head(blockIdx.y), warp_row(threadIdx.x / 32 * TILES * 16), q(reinterpret_cast<bf16*>(dynamic_shared())) {}

    DEVICE bf16* k(int stage) const { return q + (ROWS + stage * KEYS) * HD; }
    DEVICE bf16* v(int stage) const { return q + (ROWS + (2 + stage) * KEYS) * HD; }
    DEVICE int packed_rows() const { return task.queries * shape.group; }
    DEVICE int query_of(int row) const { return min((work.first_row + row) / shape.group, task.queries - 1); }

    DEVICE void load_q(const bf16* from) {
        for (int i = threadIdx.x; i < ROWS * Tile<HD>::CHUNKS; i += THREADS) {
            const int row = i / Tile<HD>::CHUNKS, chunk = i % Tile<HD>::CHUNKS;
            const bool inside = work.first_row + row < packed_rows();
            const PackedRow packed(inside ? work.first_row + row : 0, kv_head, shape.group);
            copy_async16(Tile<HD>::at(q, row, chunk),
                         from + size_t(task.first_query + packed.query) * shape.q_stride + packed.head * HD + chunk * 8, inside);
        }
    }

    DEVICE void load_tile(bf16* to, const bf16* const* matrices, const Cursor<KEYS>& at) {
        const Segment& segment = *at.segment;
        const bf16* from = matrices[segment.source] + size_t(segment.first_row + at.first_key()) * shape.kv_stride + kv_head * HD;
        Tile<HD>::load(to, from, shape.kv_stride, KEYS, segment.rows - at.first_key(), threadIdx.x, THREADS);
    }

    DEVICE void mask(float (&scores)[KEYS / 2], const Cursor<KEYS>& at, int row) {
        const int first = row + threadIdx.x % 32 / 4;
        const int visible[2] = {at.visible(query_of(first)), at.visible(query_of(first + 8))};
        mask_scores(scores, visible);
    }

    // One key tile: `now` is at hand, `next` is loaded meanwhile if there is `more`.
    DEVICE void step(int stage, const Cursor<KEYS>& now, const Cursor<KEYS>& next, bool more) {
        if (more) load_tile(k(stage ^ 1), sources.k, next);
        copy_async_commit();
        copy_async_wait<2>();
        __syncthreads();
        float scores[TILES][KEYS / 2];
        multiply_qk<HD, KEYS>(scores, q, warp_row, k(stage));
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            if (now.masked()) mask(scores[t], now, warp_row + t * 16);
            float rescale[2];
            softmax[t].update(scores[t], shape.scale * 1.4426950408889634f, rescale);
            rescale_rows(out[t], rescale);
        }
        if (more) load_tile(v(stage ^ 1), sources.v, next);
        copy_async_commit();
        copy_async_wait<2>();
        __syncthreads();
        multiply_pv<HD, KEYS>(out, scores, v(stage));
    }

    DEVICE void run(const Plan& plan, const bf16* q_matrix) {
        if (work.tiles == 0) return;
        Cursor<KEYS> now(plan, task, query_of(0), query_of(ROWS - 1), work.first_tile);
        load_q(q_matrix);
        load_tile(k(0), sources.k, now);
        copy_async_commit();
        load_tile(v(0), sources.v, now);
        copy_async_commit();
        for (int i = 0; i < work.tiles; ++i) {
            Cursor<KEYS> next = now;
            const bool more = i + 1 < work.tiles;
            if (more) next.advance(1);
            step(i % 2, now, next, more);
            now = next;
        }
        copy_async_wait<0>();
    }

    DEVICE void write(const Output& to) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            float normalise[2], lse[2];
            softmax[t].finish(shape.scale * 1.4426950408889634f, normalise, lse);
            rescale_rows(out[t], normalise);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + t * 16 + threadIdx.x % 32 / 4 + half * 8;
                if (work.first_row + row >= packed_rows()) continue;
                const PackedRow packed(work.first_row + row, kv_head, shape.group);
                if (work.slot < 0)
                    write_row<HD>(to, shape, task.first_query + packed.query, packed.head, out[t], half, lse[half]);
                else
                    write_partial<HD>(to, (size_t(work.slot) * shape.kv_heads + kv_head) * ROWS + row, out[t], half, lse[half]);
            }
        }
    }
};

template <int HD, int TILES, int KEYS>
DEVICE void attend(const Shape& shape, const Sources& sources, const Plan& plan, const bf16* q, const Output& to) {
    MmaAttention<HD, TILES, KEYS> attention(shape, sources, plan);
    attention.run(plan, q);
    attention.write(to);
}

#define KERNEL(NAME, HD, TILES, KEYS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                         \
        const __grid_constant__ Shape shape, const __grid_constant__ Sources sources, const __grid_constant__ Plan plan, \
        const bf16* q, const __grid_constant__ Output to) {                                                             \
        attend<HD, TILES, KEYS>(shape, sources, plan, q, to);                                                           \
    }

KERNEL(attention_mma_128, 128, 2, 64)
KERNEL(attention_mma_64, 64, 2, 64)
KERNEL(attention_mma_32, 32, 2, 64)
KERNEL(attention_mma_16, 16, 2, 64)
KERNEL(attention_chunk_128, 128, 1, 64)
KERNEL(attention_chunk_64, 64, 1, 64)
KERNEL(attention_chunk_32, 32, 1, 64)
KERNEL(attention_chunk_16, 16, 1, 64)
