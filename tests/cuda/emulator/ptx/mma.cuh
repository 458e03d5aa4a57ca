// The emulator's counterpart of kernels/ptx/mma.cuh. Copies happen at once or when they are waited for, at random.
#pragma once

#include <ptx/simt.cuh>

#include <deque>
#include <map>
#include <vector>

namespace emulator {

struct Copies {
    std::deque<std::vector<std::function<void()>>> groups;
    std::vector<std::function<void()>> open;
};
inline Copies& copies() {
    static thread_local std::map<Thread*, Copies> all;
    return all[current];
}

inline float bf16_at(const void* at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return bits_to_float(uint32_t(bits) << 16);
}
inline float part(uint32_t pair, int i) { return bits_to_float(i ? pair & 0xffff0000u : pair << 16); }
inline float half_part(uint32_t pair, int i) { return half_to_float(uint16_t(pair >> (16 * i))); }

}  // namespace emulator

inline uint32_t shared_address(const void* pointer) { return uint32_t(static_cast<const uint8_t*>(pointer) - emulator::block_shared); }

template <int BYTES>
void copy_async(void* to, const void* from, bool valid) {
    auto copy = [=] {
        if (valid) std::memcpy(to, from, BYTES);
        else std::memset(to, 0, BYTES);
    };
    if (emulator::random_below(2)) copy();
    else emulator::copies().open.push_back(copy);
}
inline void copy_async16(void* to, const void* from, bool valid) { copy_async<16>(to, from, valid); }
inline void copy_async4(void* to, const void* from, bool valid) { copy_async<4>(to, from, valid); }
inline void copy_async_commit() {
    auto& mine = emulator::copies();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int PENDING>
void copy_async_wait() {
    auto& groups = emulator::copies().groups;
    while (groups.size() > PENDING) {
        for (auto& copy : groups.front()) copy();
        groups.pop_front();
    }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const auto slots = emulator::exchange(&row, sizeof row);
    const int lane = emulator::current->lane;
    for (int m = 0; m < 4; ++m) {
        const uint8_t* from;
        std::memcpy(&from, slots[m * 8 + lane / 4], sizeof from);
        std::memcpy(&to[m], from + lane % 4 * 4, 4);
    }
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    const auto slots = emulator::exchange(&row, sizeof row);
    const int lane = emulator::current->lane;
    for (int m = 0; m < 4; ++m) {
        uint32_t pair[2] = {};
        for (int i = 0; i < 2; ++i) {
            const uint8_t* from;
            std::memcpy(&from, slots[m * 8 + lane % 4 * 2 + i], sizeof from);
            std::memcpy(&pair[i], from + lane / 4 * 2, 2);
        }
        to[m] = pair[0] | pair[1] << 16;
    }
}

// `element` takes an operand's element out of its pair.
inline void multiply_add_of(float (*element)(uint32_t, int), float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto slots = emulator::exchange(mine, sizeof mine);
    const int lane = emulator::current->lane;
    auto word = [&](int of, int i) {
        uint32_t value;
        std::memcpy(&value, slots[of] + 4 * i, 4);
        return value;
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const float x = element(word(row * 4 + k % 8 / 2, half + k / 8 * 2), k % 2);
            const float y = element(word(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
            sum += x * y;
        }
        d[i] = sum;
    }
}
inline void multiply_add(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_add_of(emulator::part, d, a, b0, b1); }
inline void multiply_add_half(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_add_of(emulator::half_part, d, a, b0, b1); }
