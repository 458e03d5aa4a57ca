#include "simt.h"

#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {

Thread* current;
Index block_index, block_size, grid_size;
uint8_t* block_shared;

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

std::mt19937_64 generator;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Exchange> exchanges;
NamedBarrier named[16];
std::vector<std::function<void()>> delayed;
jmp_buf scheduler;
Fiber* running;
const std::function<void()>* body;
size_t live;
unsigned long progress;
std::string failure;  // not empty: the launch has failed, waits unwind their fibers

// Lets the scheduler go on; returns when it comes back to this fiber.
void give_way(Fiber& self) {
    if (!_setjmp(self.place)) _longjmp(scheduler, 1);
}

void enter() {
    Fiber* self = running;
    try {
        (*body)();
    } catch (const Abandoned&) {
    } catch (const std::exception& error) {
        failure = error.what();
    }
    self->done = true;
    --live;
    ++progress;
    give_way(*self);
}

void resume(Fiber& fiber) {
    running = &fiber;
    current = &fiber.thread;
    if (_setjmp(scheduler)) return;
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
    now.swap(delayed);
    for (auto& action : now) {
        if (all || random_below(2)) {
            action();
            ++progress;
        } else {
            delayed.push_back(std::move(action));
        }
    }
}

void run_block(unsigned threads) {
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    exchanges.assign((threads + 31) / 32, Exchange());
    for (auto& barrier : named) barrier = NamedBarrier();
    delayed.clear();
    live = threads;
    for (unsigned i = 0; i < threads; ++i) start(*fibers[i], i);
    while (live > 0) {
        const unsigned long before = progress;
        const unsigned first = random_below(threads), stride = random_below(2) ? 1 : threads - 1;
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = *fibers[(first + i * stride) % threads];
            if (!fiber.done) resume(fiber);
        }
        do_delayed(false);
        if (progress != before) continue;
        do_delayed(true);
        if (progress == before) failure = "deadlock";
    }
}

}  // namespace

unsigned random_below(unsigned bound) { return generator() % bound; }

void later(std::function<void()> action) { delayed.push_back(std::move(action)); }

void wait_until(const std::function<bool()>& ready) {
    Fiber* self = running;
    while (!ready()) {
        if (!failure.empty()) throw Abandoned();
        give_way(*self);
    }
    ++progress;
}

const uint8_t (*exchange(const void* mine, size_t bytes))[64] {
    Exchange& area = exchanges[current->warp];
    const unsigned generation = area.generation;
    std::memcpy(area.slots[generation % 2][current->lane], mine, bytes);
    ++progress;
    if (++area.arrived == 32) {
        area.arrived = 0;
        ++area.generation;
    } else {
        wait_until([&] { return area.generation != generation; });
    }
    return area.slots[generation % 2];
}

void named_barrier(int id, int threads, bool wait) {
    NamedBarrier& barrier = named[id];
    const unsigned generation = barrier.generation;
    ++progress;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else if (wait) {
        wait_until([&] { return barrier.generation != generation; });
    }
}

void sync_block() {
    NamedBarrier& barrier = named[0];
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    ++progress;
    wait_until([&] {
        if (barrier.generation != generation) return true;
        if (size_t(barrier.arrived) < live) return false;
        barrier.arrived = 0;
        ++barrier.generation;
        return true;
    });
}

std::string run(Index grid, Index block, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel) {
    generator.seed(seed);
    block_size = block;
    grid_size = grid;
    body = &kernel;
    failure.clear();
    const size_t bytes = (shared_bytes + 2048) / 1024 * 1024;
    block_shared = static_cast<uint8_t*>(std::aligned_alloc(1024, bytes));
    for (unsigned z = 0; z < grid.z && failure.empty(); ++z)
        for (unsigned y = 0; y < grid.y && failure.empty(); ++y)
            for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
                std::memset(block_shared, 0xff, bytes);  // NaN to whoever reads what nobody wrote
                block_index = {x, y, z};
                run_block(block.x * block.y * block.z);
            }
    std::free(block_shared);
    return failure;
}

}  // namespace emulator
