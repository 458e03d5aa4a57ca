#include "simt.h"

#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <ucontext.h>
#include <vector>

namespace emulator {

constinit thread_local Thread* current = nullptr;
constinit thread_local Index block_index{}, block_size{}, grid_size{};
constinit thread_local uint8_t* block_shared = nullptr;

namespace {

constexpr size_t STACK_BYTES = 128 << 10;

struct Abandoned {};

}  // namespace

struct Fiber {
    Thread thread;
    ucontext_t beginning;
    // Where it has given way. Not a context: switching to one asks the kernel for the signal mask every time.
    jmp_buf place;
    std::unique_ptr<uint8_t[]> stack;
    bool begun = false, done = false;
};

namespace {

// Of the block that runs on this OS thread, and what the next one needs again.
struct State {
    std::mt19937_64 generator;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Exchange> exchanges;
    NamedBarrier named[16];
    std::vector<std::function<void()>> delayed;
    jmp_buf scheduler;
    Fiber* running;
    const std::function<void()>* body;
    size_t live;
    unsigned long progress = 0;
    std::string failure;  // not empty: the launch has failed, waits unwind their fibers
};

// Stays from launch to launch, because stacks are costly to make.
constinit thread_local State* state = nullptr;

// Lets the scheduler go on; returns when it comes back to this fiber.
void give_way(Fiber& self) {
    if (!_setjmp(self.place)) _longjmp(state->scheduler, 1);
}

void enter() {
    Fiber* self = state->running;
    try {
        (*state->body)();
    } catch (const Abandoned&) {
    } catch (const std::exception& error) {
        state->failure = error.what();
    }
    self->done = true;
    --state->live;
    ++state->progress;
    give_way(*self);
}

void resume(Fiber& fiber) {
    state->running = &fiber;
    current = &fiber.thread;
    if (_setjmp(state->scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.beginning);
}

void start(Fiber& fiber, unsigned number) {
    fiber.thread.index = {number % block_size.x, number / block_size.x % block_size.y, number / (block_size.x * block_size.y)};
    fiber.thread.lane = number % 32;
    fiber.thread.warp = number / 32;
    fiber.begun = fiber.done = false;
    if (!fiber.stack) fiber.stack.reset(new uint8_t[STACK_BYTES]);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = STACK_BYTES;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, enter, 0);
}

void do_delayed(bool all) {
    std::vector<std::function<void()>> now;
    now.swap(state->delayed);
    for (auto& action : now) {
        if (all || random_below(2)) {
            action();
            ++state->progress;
        } else {
            state->delayed.push_back(std::move(action));
        }
    }
}

void run_block(unsigned threads) {
    while (state->fibers.size() < threads) state->fibers.push_back(std::make_unique<Fiber>());
    state->exchanges.assign((threads + 31) / 32, Exchange());
    for (auto& barrier : state->named) barrier = NamedBarrier();
    state->delayed.clear();
    state->live = threads;
    for (unsigned i = 0; i < threads; ++i) start(*state->fibers[i], i);
    while (state->live > 0) {
        const unsigned long before = state->progress;
        const unsigned first = random_below(threads), stride = random_below(2) ? 1 : threads - 1;
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = *state->fibers[(first + i * stride) % threads];
            if (!fiber.done) resume(fiber);
        }
        do_delayed(false);
        if (state->progress != before) continue;
        do_delayed(true);
        if (state->progress == before) state->failure = "deadlock";
    }
}

}  // namespace

unsigned random_below(unsigned bound) { return state->generator() % bound; }

void later(std::function<void()> action) { state->delayed.push_back(std::move(action)); }

void wait_until(const std::function<bool()>& ready) {
    Fiber* self = state->running;
    while (!ready()) {
        if (!state->failure.empty()) throw Abandoned();
        give_way(*self);
    }
    ++state->progress;
}

const uint8_t (*exchange(const void* mine, size_t bytes))[64] {
    Exchange& area = state->exchanges[current->warp];
    const unsigned generation = area.generation;
    std::memcpy(area.slots[generation % 2][current->lane], mine, bytes);
    ++state->progress;
    if (++area.arrived == 32) {
        area.arrived = 0;
        ++area.generation;
    } else {
        wait_until([&] { return area.generation != generation; });
    }
    return area.slots[generation % 2];
}

void named_barrier(int id, int threads, bool wait) {
    NamedBarrier& barrier = state->named[id];
    const unsigned generation = barrier.generation;
    ++state->progress;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else if (wait) {
        wait_until([&] { return barrier.generation != generation; });
    }
}

void sync_block() {
    NamedBarrier& barrier = state->named[0];
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    ++state->progress;
    wait_until([&] {
        if (barrier.generation != generation) return true;
        if (size_t(barrier.arrived) < state->live) return false;
        barrier.arrived = 0;
        ++barrier.generation;
        return true;
    });
}

void pause() {
    if (!state->failure.empty()) throw Abandoned();
    ++state->progress;
    std::this_thread::yield();
    give_way(*state->running);
}

std::string run(Index grid, Index block, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel) {
    static thread_local const auto mine = std::make_unique<State>();
    state = mine.get();
    state->generator.seed(seed);
    block_size = block;
    grid_size = grid;
    state->body = &kernel;
    state->failure.clear();
    const size_t bytes = (shared_bytes + 2048) / 1024 * 1024;
    block_shared = static_cast<uint8_t*>(std::aligned_alloc(1024, bytes));
    for (unsigned z = 0; z < grid.z && state->failure.empty(); ++z)
        for (unsigned y = 0; y < grid.y && state->failure.empty(); ++y)
            for (unsigned x = 0; x < grid.x && state->failure.empty(); ++x) {
                std::memset(block_shared, 0xff, bytes);  // NaN to whoever reads what nobody wrote
                block_index = {x, y, z};
                run_block(block.x * block.y * block.z);
            }
    std::free(block_shared);
    return state->failure;
}

}  // namespace emulator
