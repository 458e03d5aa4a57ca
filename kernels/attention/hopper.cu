// Prefill attention on Hopper: tensor copies, warpgroup products, specialised warps.
//
// The formula and work list of mma.cu; a piece of work is a row tile of 64 * CONSUMERS queries of one head, never split. One block a multiprocessor
// stays until the list is done; its producer warp takes the next piece from a counter (the list is sorted longest first) and keeps
// STAGES key tiles and value tiles in flight; each consumer warpgroup owns 64 query rows. A consumer issues the scores of tile i and the
// outputs of tile i - 1 together and does the softmax of tile i while the latter run; consumers take turns in issuing (ping-pong), so that
// one's softmax hides behind the other's products.
//
// Shared memory tiles are [HD / 64][rows][64] bf16 with 128-byte swizzle. Each segment has tensor maps of its own that end at its last row:
// what lies beyond is read as 0 and masked.
#include <attention/cursor.cuh>
#include <attention/operand.cuh>
#include <attention/output.cuh>
#include <attention/softmax.cuh>
#include <ptx/hopper.cuh>

static constexpr int MAX_MAPS = 96;

struct Maps {
    TensorMap q, k[MAX_MAPS], v[MAX_MAPS];
};

// Where a ring of stages stands.
template <int STAGES>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

template <int HD_, int CONSUMERS_, int KEYS_, int STAGES_ = 2, int QUERY_STAGES_ = 1>
struct Tiling {
    static constexpr int HD = HD_, CONSUMERS = CONSUMERS_, KEYS = KEYS_;
    static constexpr int STAGES = STAGES_;              // key tiles, and value tiles
    static constexpr int QUERY_STAGES = QUERY_STAGES_;  // with two, the next piece's queries come while this one's are in use
    static constexpr int ROWS = 64 * CONSUMERS;
    static constexpr int THREADS = 128 * (CONSUMERS + 1);
    static constexpr int COLUMN_BLOCKS = HD / 64;
    static constexpr int TILE_BYTES = KEYS * HD * 2;
    static constexpr int Q_BYTES = ROWS * HD * 2;
    // 65536 registers over the warpgroups, in steps of 8.
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
};

template <class T>
struct Shared {
    alignas(1024) uint8_t q[T::QUERY_STAGES][T::Q_BYTES];
    alignas(1024) uint8_t k[T::STAGES][T::TILE_BYTES];
    alignas(1024) uint8_t v[T::STAGES][T::TILE_BYTES];
    uint64_t q_full[T::QUERY_STAGES], q_empty[T::QUERY_STAGES];
    uint64_t k_full[T::STAGES], k_empty[T::STAGES], v_full[T::STAGES], v_empty[T::STAGES];
    uint64_t work_full[2], work_empty[2];
    int work[2];  // number of the piece, -1: no more

    DEVICE void init() {
        constexpr int WARPS = 4 * T::CONSUMERS;  // each consumer warp arrives once
        for (int i = 0; i < T::QUERY_STAGES; ++i) {
            barrier_init(&q_full[i], 1);
            barrier_init(&q_empty[i], WARPS);
        }
        for (int i = 0; i < T::STAGES; ++i) {
            barrier_init(&k_full[i], 1);
            barrier_init(&v_full[i], 1);
            barrier_init(&k_empty[i], WARPS);
            barrier_init(&v_empty[i], WARPS);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(&work_full[i], 1);
            barrier_init(&work_empty[i], WARPS);
        }
        barrier_init_fence();
    }
};

// One head of one row tile.
struct Piece {
    Work work;
    Task task;
    int head;
    DEVICE Piece(const Plan& plan, const Shape& shape, int number)
        : work(plan.works[number / shape.heads]), task(plan.tasks[work.task]), head(number % shape.heads) {}
    template <class T>
    DEVICE Cursor<T::KEYS> cursor(const Plan& plan) const {
        return Cursor<T::KEYS>(plan, task, work.first_row, min(work.first_row + T::ROWS, task.queries) - 1, 0);
    }
};

// The one thread that feeds the block.
template <class T>
struct Producer {
    Shared<T>& shared;
    const Maps& maps;
    const Shape& shape;
    const Plan& plan;
    RingPosition<T::STAGES> k_at, v_at;
    RingPosition<T::QUERY_STAGES> q_at;

    DEVICE void load_k(const Cursor<T::KEYS>& at, int kv_head) {
        barrier_wait(&shared.k_empty[k_at.stage], k_at.parity ^ 1);
        barrier_arrive_expect(&shared.k_full[k_at.stage], T::TILE_BYTES);
        copy_box(shared.k[k_at.stage], &maps.k[at.segment->map], &shared.k_full[k_at.stage], 0, at.first_key(), kv_head * T::COLUMN_BLOCKS);
        k_at.advance();
    }

    DEVICE void load_v(const Cursor<T::KEYS>& at, int kv_head) {
        barrier_wait(&shared.v_empty[v_at.stage], v_at.parity ^ 1);
        barrier_arrive_expect(&shared.v_full[v_at.stage], T::TILE_BYTES);
        copy_box(shared.v[v_at.stage], &maps.v[at.segment->map], &shared.v_full[v_at.stage], 0, at.first_key(), kv_head * T::COLUMN_BLOCKS);
        v_at.advance();
    }

    DEVICE void load_piece(const Piece& piece) {
        if (piece.work.tiles == 0) return;
        const int kv_head = piece.head / shape.group;
        barrier_wait(&shared.q_empty[q_at.stage], q_at.parity ^ 1);
        barrier_arrive_expect(&shared.q_full[q_at.stage], T::Q_BYTES);
        copy_box(shared.q[q_at.stage], &maps.q, &shared.q_full[q_at.stage], 0, piece.task.first_query + piece.work.first_row, piece.head * T::COLUMN_BLOCKS);
        q_at.advance();
        Cursor<T::KEYS> values = piece.cursor<T>(plan);
        load_k(values, kv_head);
        for (int i = 1; i < piece.work.tiles; ++i) {
            Cursor<T::KEYS> keys = values;
            keys.advance(1);
            load_k(keys, kv_head);
            load_v(values, kv_head);
            values = keys;
        }
        load_v(values, kv_head);
    }

    DEVICE void run(uint32_t* counter, int pieces) {
        for (RingPosition<2> at;; at.advance()) {
            const int number = int(atomicAdd(counter, 1u));
            barrier_wait(&shared.work_empty[at.stage], at.parity ^ 1);
            shared.work[at.stage] = number < pieces ? number : -1;
            barrier_arrive(&shared.work_full[at.stage]);
            if (number >= pieces) return;
            load_piece(Piece(plan, shape, number));
        }
    }
};

// One warpgroup of 64 query rows. LAZY: outputs are rescaled only when a row's maximum has grown by more than 2^8.
template <class T, bool PING_PONG, bool LAZY>
struct Consumer {
    static constexpr int HD = T::HD, KEYS = T::KEYS;

    Shared<T>& shared;
    const Shape& shape;
    const Plan& plan;
    const Output& to;
    const int group;  // which consumer, from 0
    const float scale;
    RingPosition<T::STAGES> k_at, v_at;
    RingPosition<T::QUERY_STAGES> q_at;

    float scores[KEYS / 2];
    uint32_t weights[KEYS / 4];  // bf16 pairs, fragments of the second product
    float out[HD / 2];
    Softmax softmax;

    DEVICE Consumer(Shared<T>& shared, const Shape& shape, const Plan& plan, const Output& to)
        : shared(shared), shape(shape), plan(plan), to(to), group(threadIdx.x / 128 - 1), scale(shape.scale * 1.4426950408889634f) {}

    // A turn is passed on from consumer to consumer in a ring of named barriers; the first turn is given at the start.
    DEVICE void give_first_turn() const {
        if (PING_PONG && group == T::CONSUMERS - 1) named_arrive(1, 256);
    }
    DEVICE void take_turn() const {
        if (PING_PONG) named_sync(1 + group, 256);
    }
    DEVICE void pass_turn() const {
        if (PING_PONG) named_arrive(1 + (group + 1) % T::CONSUMERS, 256);
    }
    // Every arrival is met: the first consumer takes the turn that the last one has passed to it.
    DEVICE void take_last_turn() const {
        if (PING_PONG && group == 0) named_sync(1, 256);
    }

    DEVICE static void release(uint64_t* barrier) {
        if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    }

    DEVICE void issue_scores() {
        const uint8_t* q = shared.q[q_at.stage] + group * 64 * 128;
        const uint8_t* k = shared.k[k_at.stage];
        pin(scores);
        products_fence();
#pragma unroll
        for (int step = 0; step < HD / 16; ++step) {
            const int block = step / 4, bytes = step % 4 * 32;
            Product<KEYS>::multiply_shared(scores, operand(q + block * T::ROWS * 128 + bytes, 16), operand(k + block * KEYS * 128 + bytes, 16), step > 0);
        }
        products_commit();
    }

    DEVICE void issue_outputs() {
        const uint8_t* v = shared.v[v_at.stage];
        pin(out);
        products_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step)
            Product<HD>::multiply_registers(out, weights + 4 * step, operand(v + step * 2048, KEYS * 128));
        products_commit();
    }

    DEVICE void mask(const Piece& piece, const Cursor<KEYS>& at) {
        const int row = piece.work.first_row + group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        const int last = piece.task.queries - 1;
        const int visible[2] = {at.visible(min(row, last)), at.visible(min(row + 8, last))};
        mask_scores(scores, visible);
    }

    // Scores to weights; what `out` has to be rescaled with.
    DEVICE void soften(const Piece& piece, const Cursor<KEYS>& at, float (&rescale)[2]) {
        if (at.masked()) mask(piece, at);
        softmax.template update<KEYS / 2, LAZY>(scores, scale, rescale);
    }

    DEVICE void pack_weights() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
    }

    DEVICE void finish_outputs() {
        products_wait<0>();
        pin(out);
        release(&shared.v_empty[v_at.stage]);
        v_at.advance();
    }

    DEVICE void attend(const Piece& piece) {
        float rescale[2];
        softmax = Softmax();
#pragma unroll
        for (int i = 0; i < HD / 2; ++i) out[i] = 0.f;
        Cursor<KEYS> at = piece.cursor<T>(plan);
        barrier_wait(&shared.q_full[q_at.stage], q_at.parity);

        barrier_wait(&shared.k_full[k_at.stage], k_at.parity);
        take_turn();
        issue_scores();
        pass_turn();
        products_wait<0>();
        pin(scores);
        release(&shared.k_empty[k_at.stage]);
        k_at.advance();
        soften(piece, at, rescale);
        pack_weights();

        for (int i = 1; i < piece.work.tiles; ++i) {
            at.advance(1);
            barrier_wait(&shared.k_full[k_at.stage], k_at.parity);
            take_turn();
            issue_scores();
            barrier_wait(&shared.v_full[v_at.stage], v_at.parity);
            issue_outputs();
            pass_turn();
            products_wait<1>();
            pin(scores);
            release(&shared.k_empty[k_at.stage]);
            k_at.advance();
            soften(piece, at, rescale);
            pin(scores);  // the softmax is done before the outputs are waited for
            finish_outputs();
            if (!LAZY || warp_any(rescale[0] != 1.f || rescale[1] != 1.f)) rescale_rows(out, rescale);
            pack_weights();
        }
        release(&shared.q_empty[q_at.stage]);
        q_at.advance();
        barrier_wait(&shared.v_full[v_at.stage], v_at.parity);
        issue_outputs();
        finish_outputs();
    }

    DEVICE void write(const Piece& piece) {
        float normalise[2], lse[2];
        softmax.finish(scale, normalise, lse);
        rescale_rows(out, normalise);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = piece.work.first_row + group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
            if (row < piece.task.queries) write_row<HD>(to, shape, piece.task.first_query + row, piece.head, out, half, lse[half]);
        }
    }

    // A row tile that sees no key at all: outputs 0, LSEs -inf.
    DEVICE void write_nothing(const Piece& piece) {
        softmax = Softmax();
#pragma unroll
        for (int i = 0; i < HD / 2; ++i) out[i] = 0.f;
        write(piece);
    }

    DEVICE void run() {
        give_first_turn();
        for (RingPosition<2> at;; at.advance()) {
            barrier_wait(&shared.work_full[at.stage], at.parity);
            const int number = shared.work[at.stage];
            sync_warp();  // every lane has read it
            release(&shared.work_empty[at.stage]);
            if (number < 0) break;
            const Piece piece(plan, shape, number);
            if (piece.work.tiles == 0) {
                write_nothing(piece);
            } else {
                attend(piece);
                write(piece);
            }
        }
        take_last_turn();
    }
};

template <class T, bool PING_PONG, bool LAZY>
DEVICE void attend(const Maps& maps, const Shape& shape, const Plan& plan, int pieces, uint32_t* counter, const Output& to) {
    Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        lower_registers<T::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            Producer<T> producer{shared, maps, shape, plan};
            producer.run(counter, pieces);
        }
    } else {
        raise_registers<T::CONSUMER_REGISTERS>();
        Consumer<T, PING_PONG, LAZY> consumer(shared, shape, plan, to);
        consumer.run();
    }
}

#define KERNEL(NAME, PING_PONG, LAZY, ...)                                                                                              \
    extern "C" __global__ void __launch_bounds__(Tiling<__VA_ARGS__>::THREADS, 1) NAME(                                                 \
        const __grid_constant__ Maps maps, const __grid_constant__ Shape shape, const __grid_constant__ Plan plan, int pieces,          \
        uint32_t* counter, const __grid_constant__ Output to) {                                                                         \
        attend<Tiling<__VA_ARGS__>, PING_PONG, LAZY>(maps, shape, plan, pieces, counter, to);                                           \
    }

// Head dimension, consumers, keys a tile, stages, stages of queries.
KERNEL(attention_hopper_128, true, true, 128, 3, 80)
KERNEL(attention_hopper_64, true, true, 64, 3, 128)
#ifdef VARIANTS
KERNEL(hopper_128_3x80_3_stages, true, true, 128, 3, 80, 3)
KERNEL(hopper_128_3x80_next_q, true, true, 128, 3, 80, 2, 2)
KERNEL(hopper_128_2x128_pp_eager, true, false, 128, 2, 128)
KERNEL(hopper_128_2x176_pp_lazy, true, true, 128, 2, 176)
KERNEL(hopper_64_2x128, true, true, 64, 2, 128)
KERNEL(hopper_64_3x96, true, true, 64, 3, 96)
KERNEL(hopper_64_2x160, true, true, 64, 2, 160)
#endif
