// A block of GPU threads on one CPU thread: each is a fiber that runs until it has to wait for another.
//
// The order in which fibers run, and when asynchronous copies happen, are drawn from a seeded generator, so that a missing barrier has a fair chance to
// show. A round in which no fiber gets any further is a deadlock, reported as a failed launch.
// Invariant: an OS thread runs one block at a time, beside those of other OS threads; fibers never leave theirs. Nothing here knows of any kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Index {
    unsigned x, y, z;
};

struct Thread {
    Index index;
    int lane, warp;
};

// Lanes of a warp hand each other up to 64 bytes.
struct Exchange {
    int arrived = 0;
    unsigned generation = 0;
    alignas(16) uint8_t slots[2][32][64];
};

struct NamedBarrier {
    int arrived = 0;
    unsigned generation = 0;
};

// Of the block that runs on this OS thread.
extern constinit thread_local Thread* current;  // the thread whose fiber runs
extern constinit thread_local Index block_index, block_size, grid_size;
extern constinit thread_local uint8_t* block_shared;  // dynamic shared memory, 1024-byte aligned

// Gives way to other fibers until `ready()`.
void wait_until(const std::function<bool()>& ready);
// The warp's exchange area once all 32 lanes have left `bytes` bytes in it.
const uint8_t (*exchange(const void* mine, size_t bytes))[64];
void sync_block();
void named_barrier(int id, int threads, bool wait);
// Gives way once to other fibers and other OS threads. Counts as progress: what is waited for may be done by another device. Not by a later block of the
// same grid, because blocks run one after another.
void pause();
// Does `action` some time later, before a wait would have to be called a deadlock.
void later(std::function<void()> action);
unsigned random_below(unsigned bound);

// Runs `kernel` over the grid. Returns an empty string, or why it failed.
std::string run(Index grid, Index block, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel);

}  // namespace emulator
