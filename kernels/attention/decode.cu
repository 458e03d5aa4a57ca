// Decode attention: the few packed rows of one or several queries over a long cache in bf16 or FP8, bound by the bandwidth of keys and values.
//
// The same formula and work list as mma.cu with a row tile of 16 packed rows. Each warp of a block walks every WARPS-th key tile on its own, with its
// own softmax and its own ring of shared memory, so that no warp waits for another; the warps' results are merged at the end through shared memory.
#include <attention/kv_ring.cuh>
#include <attention/output.cuh>
#include <attention/softmax.cuh>

static constexpr int ROWS = 16;
static constexpr int WARPS = 4;
static constexpr int KEYS = 32;

template <int HD, class Ring>
struct DecodeAttention {
    static constexpr int STAGES = Ring::STAGES;

    const Shape& shape;
    const typename Ring::From& sources;
    const Task task;
    const Work work;
    const int kv_head, warp, lane;
    bf16* q;
    Ring ring;
    Softmax softmax;
    float out[1][HD / 2] = {};

    DEVICE DecodeAttention(const Shape& shape, const typename Ring::From& sources, const Plan& plan)
        : shape(shape), sources(sources), task(plan.tasks[plan.works[blockIdx.x].task]), work(plan.works[blockIdx.x]),
          kv_head(blockIdx.y), warp(threadIdx.x / 32), lane(threadIdx.x % 32), q(reinterpret_cast<bf16*>(dynamic_shared())),
          ring(dynamic_shared() + ROWS * HD * 2 + warp * Ring::BYTES) {}

    DEVICE int packed_rows() const { return task.queries * shape.group; }
    DEVICE int query_of(int row) const { return min((work.first_row + row) / shape.group, task.queries - 1); }

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
        softmax.update(scores[0], shape.scale * 1.4426950408889634f, rescale);
        rescale_rows(out[0], rescale);
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
        softmax.finish(shape.scale * 1.4426950408889634f, normalise, lse);
        rescale_rows(out[0], normalise);
        __syncthreads();
        float* values = reinterpret_cast<float*>(q + ROWS * HD);
        float* lses = values + WARPS * ROWS * HD;
        const Output exchange = {nullptr, nullptr, values, lses};
        for (int half = 0; half < 2; ++half) write_partial<HD>(exchange, warp * ROWS + lane / 4 + half * 8, out[0], half, lse[half]);
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * HD / 2; i += WARPS * 32) write_pair(to, values, lses, i / (HD / 2), i % (HD / 2) * 2);
    }

    // Columns `column` and the next of packed row `row`, over the warps.
    DEVICE void write_pair(const Output& to, const float* values, const float* lses, int row, int column) {
        if (work.first_row + row >= packed_rows()) return;
        float largest = -INFINITY, sum = 0.f, even = 0.f, odd = 0.f;
        for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, lses[w * ROWS + row]);
        const float shift = largest == -INFINITY ? 0.f : largest;
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2_approx((lses[w * ROWS + row] - shift) * 1.4426950408889634f);
            sum += weight;
            even += weight * values[(w * ROWS + row) * HD + column];
            odd += weight * values[(w * ROWS + row) * HD + column + 1];
        }
        const float norm = sum > 0.f ? 1.f / sum : 0.f;
        const float lse = sum > 0.f ? largest + logf(sum) : -INFINITY;
        const PackedRow packed(work.first_row + row, kv_head, shape.group);
        if (work.slot < 0) {
            const size_t at = task.first_query + packed.query;
            *reinterpret_cast<uint32_t*>(to.out + at * shape.out_stride + packed.head * HD + column) = pack_bf16(even * norm, odd * norm);
            if (to.lse && column == 0) to.lse[at * shape.heads + packed.head] = lse;
        } else {
            const size_t at = (size_t(work.slot) * shape.kv_heads + kv_head) * ROWS + row;
            to.partial[at * HD + column] = even * norm;
            to.partial[at * HD + column + 1] = odd * norm;
            if (column == 0) to.partial_lse[at] = lse;
        }
    }
};

#define KERNEL(NAME, HD, RING)                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(                                                      \
        const __grid_constant__ Shape shape, const __grid_constant__ RING<HD, KEYS>::From sources,                      \
        const __grid_constant__ Plan plan, const bf16* q, const __grid_constant__ Output to) {                          \
        let_the_next_grid_start();                                                                                      \
        wait_for_earlier_grids();                                                                                       \
        DecodeAttention<HD, RING<HD, KEYS>> attention(shape, sources, plan);                                            \
        attention.load_q(q);                                                                                            \
        attention.run(plan);                                                                                            \
        attention.write(to);                                                                                            \
    }

KERNEL(attention_decode_128, 128, PlainRing)
KERNEL(attention_decode_64, 64, PlainRing)
KERNEL(attention_decode_32, 32, PlainRing)
KERNEL(attention_decode_16, 16, PlainRing)
KERNEL(attention_decode_fp8_128, 128, Fp8Ring)
KERNEL(attention_decode_fp8_64, 64, Fp8Ring)
KERNEL(attention_decode_fp8_32, 32, Fp8Ring)
KERNEL(attention_decode_fp8_16, 16, Fp8Ring)
