// The emulator's counterpart of kernels/ptx/hopper.cuh: what the manuals say of mbarriers, tensor copies with 128-byte swizzle and warpgroup
// products. Copies arrive some time after they were started; products read shared memory as late as their wait, and their
// results hold NaN until then.
#pragma once

#include <ptx/mma.cuh>

#include <stdexcept>

struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

namespace emulator {

// An mbarrier in its 64 bits. Bytes may arrive before they are expected.
struct Barrier {
    uint64_t parity : 1, arrivals : 15, left : 15;
    int64_t bytes : 33;

    void settle() {
        if (left != 0 || bytes != 0) return;
        parity = !parity;
        left = arrivals;
    }
};
inline Barrier& barrier_at(uint64_t* at) { return *reinterpret_cast<Barrier*>(at); }

// A tensor map as cuTensorMapEncodeTiled of the emulator lays it out.
struct Map {
    const uint8_t* base;
    uint64_t size[3], stride[2];
    uint32_t box[3];
};

inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_now(uint8_t* to, const Map& map, int x, int y, int z) {
    const uint32_t first = shared_address(to);
    uint32_t offset = 0;
    for (uint32_t k = 0; k < map.box[2]; ++k)
        for (uint32_t j = 0; j < map.box[1]; ++j)
            for (uint32_t i = 0; i < map.box[0]; ++i, offset += 2) {
                const uint64_t at[3] = {uint64_t(x) + i, uint64_t(y) + j, uint64_t(z) + k};
                uint16_t value = 0;
                if (at[0] < map.size[0] && at[1] < map.size[1] && at[2] < map.size[2])
                    std::memcpy(&value, map.base + at[0] * 2 + at[1] * map.stride[0] + at[2] * map.stride[1], 2);
                std::memcpy(block_shared + swizzle(first + offset), &value, 2);
            }
}

// Products of one thread that are under way: `values` stands for the registers d until their group has been waited for.
struct Product {
    float* d;
    int count;
    std::function<void(float*)> run;
};
struct Products {
    std::deque<std::vector<Product>> groups;
    std::vector<Product> open;
    std::map<float*, std::vector<float>> values;
};
inline Products& products() {
    static thread_local std::map<Thread*, Products> all;
    return all[current];
}

inline void issue(float* d, int count, std::function<void(float*)> run) {
    auto& mine = products();
    if (!mine.values.count(d)) mine.values[d].assign(d, d + count);
    std::fill(d, d + count, NAN);
    mine.open.push_back({d, count, std::move(run)});
}

inline void complete(size_t pending) {
    auto& mine = products();
    while (mine.groups.size() > pending) {
        for (auto& product : mine.groups.front()) product.run(mine.values[product.d].data());
        std::map<float*, int> finished;
        for (auto& product : mine.groups.front()) finished[product.d] = product.count;
        mine.groups.pop_front();
        for (auto& [d, count] : finished) {
            std::copy_n(mine.values[d].data(), count, d);
            mine.values.erase(d);
        }
    }
}

// An operand's element: rows of 64, eight to an atom. `row` runs over M or N, `k` over the inner dimension.
struct Operand {
    uint32_t start, column_step, row_step;
    explicit Operand(uint64_t bits) : start((bits & 0x3fff) << 4), column_step((bits >> 16 & 0x3fff) << 4), row_step((bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1) throw std::logic_error("only 128-byte swizzle is emulated");
    }
    float element(uint32_t row, uint32_t k) const {
        return bf16_at(block_shared + swizzle(start + row / 8 * row_step + row % 8 * 128 + k * 2));
    }
    float transposed(uint32_t row, uint32_t k) const {
        return bf16_at(block_shared + swizzle(start + row / 64 * column_step + k / 8 * row_step + k % 8 * 128 + row % 64 * 2));
    }
};

}  // namespace emulator

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    *barrier = 0;
    emulator::barrier_at(barrier).arrivals = emulator::barrier_at(barrier).left = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) {
    auto& b = emulator::barrier_at(barrier);
    if (b.left == 0) throw std::logic_error("more arrivals than an mbarrier expects");
    --b.left;
    b.settle();
}
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    emulator::barrier_at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    emulator::wait_until([=] { return emulator::barrier_at(barrier).parity != parity; });
}

inline void prefetch_map(const TensorMap*) {}
inline void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
    emulator::Map decoded;
    std::memcpy(&decoded, map, sizeof decoded);
    if (shared_address(to) % 1024) throw std::logic_error("a swizzled box needs 1024-byte alignment");
    emulator::later([=] {
        emulator::copy_now(static_cast<uint8_t*>(to), decoded, x, y, z);
        auto& b = emulator::barrier_at(barrier);
        b.bytes -= int64_t(decoded.box[0]) * decoded.box[1] * decoded.box[2] * 2;
        b.settle();
    });
}

inline void named_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void named_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }
template <int REGISTERS>
void raise_registers() {}
template <int REGISTERS>
void lower_registers() {}

inline void products_fence() {}
inline void products_commit() {
    auto& mine = emulator::products();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
// The warp waits as one: no lane goes on before all have their results.
template <int PENDING>
void products_wait() {
    emulator::complete(PENDING);
    const int lane = emulator::current->lane;
    emulator::exchange(&lane, sizeof lane);
}
template <int N>
void pin(float (&)[N]) {}

template <int N>
struct Product {
    static void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
        const int lane = emulator::current->lane, warp = emulator::current->warp % 4;
        emulator::issue(d, N / 2, [=](float* values) {
            const emulator::Operand x(a), y(b);
            for (int i = 0; i < N / 2; ++i) {
                const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                float sum = add ? values[i] : 0.f;
                for (int k = 0; k < 16; ++k) sum += x.element(row, k) * y.element(column, k);
                values[i] = sum;
            }
        });
    }
    static void multiply_registers(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
        const auto slots = emulator::exchange(a, 16);
        const int lane = emulator::current->lane;
        std::vector<float> rows(32);
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16; ++k) {
                uint32_t pair;
                std::memcpy(&pair, slots[lane / 4 * 4 + k % 8 / 2] + 4 * (half + k / 8 * 2), 4);
                rows[half * 16 + k] = emulator::part(pair, k % 2);
            }
        emulator::issue(d, N / 2, [=](float* values) {
            const emulator::Operand y(b);
            for (int i = 0; i < N / 2; ++i) {
                const int half = i % 4 / 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; ++k) values[i] += rows[half * 16 + k] * y.transposed(column, k);
            }
        });
    }
};
