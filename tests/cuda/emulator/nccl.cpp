// The part of NCCL (libnccl.so.2) that the communicator between GPUs calls, among threads of one process: sends wait on the sender's stream until the
// receiver has taken what they offer, receives until it is offered.
//
// Communicators are non-blocking: what a group holds is issued some polls after its end, and initialisation ends when all ranks have come. Transfers are
// late by a random time, so that what does not wait for them has a fair chance to show.
// Invariant: a peer that never comes leaves the stream waiting until the communicator is aborted, as on GPUs.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "streams.h"

using Result = int;
static constexpr Result OK = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7;
static constexpr int UINT8 = 1;

struct UniqueId {
    char bytes[128];
};
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

// What a rank has for another, until it is taken.
struct Offer {
    const void* from;
    size_t bytes;
    bool taken = false;
};

struct Communicator;

// All ranks of one unique id.
struct World {
    std::mutex lock;
    std::condition_variable changed;
    std::vector<Communicator*> ranks;
    int come = 0;
    std::map<std::pair<int, int>, std::deque<std::shared_ptr<Offer>>> offers;
};

struct Transfer {
    bool sends;
    void* at;
    size_t bytes;
    int peer;
};
struct Group {
    emulator::Stream* stream = nullptr;
    std::vector<Transfer> transfers;
};
struct Communicator {
    std::shared_ptr<World> world;
    int rank, device;
    Result failure = OK;
    bool aborted = false;
    // Ended groups that have not been issued yet, and how many polls they still wait.
    std::deque<Group> ended;
    int polls = 0;
};

static std::mutex worlds_lock;
static std::map<std::string, std::shared_ptr<World>>& worlds() {
    static auto* all = new std::map<std::string, std::shared_ptr<World>>;
    return *all;
}
static thread_local int depth = 0;
static thread_local std::map<Communicator*, Group> groups;

static unsigned random_below(unsigned bound) {
    static thread_local std::mt19937 generator(std::random_device{}());
    return generator() % bound;
}

static void take(std::unique_lock<std::mutex>& lock, Communicator* comm, const Transfer& transfer) {
    World& world = *comm->world;
    auto& offers = world.offers[{transfer.peer, comm->rank}];
    world.changed.wait(lock, [&] { return comm->aborted || !offers.empty(); });
    if (comm->aborted) return;
    const auto offer = offers.front();
    offers.pop_front();
    if (offer->bytes != transfer.bytes) {
        comm->failure = INVALID_USAGE;
    } else {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(random_below(300)));
        std::memmove(transfer.at, offer->from, offer->bytes);
        lock.lock();
    }
    offer->taken = true;
    world.changed.notify_all();
}

static void run(Communicator* comm, const Group& group) {
    World& world = *comm->world;
    std::unique_lock<std::mutex> lock(world.lock);
    std::vector<std::shared_ptr<Offer>> offered;
    for (const Transfer& transfer : group.transfers) {
        if (!transfer.sends) continue;
        offered.push_back(std::make_shared<Offer>(Offer{transfer.at, transfer.bytes}));
        world.offers[{comm->rank, transfer.peer}].push_back(offered.back());
    }
    world.changed.notify_all();
    for (const Transfer& transfer : group.transfers)
        if (!transfer.sends) take(lock, comm, transfer);
    world.changed.wait(lock, [&] {
        if (comm->aborted) return true;
        for (const auto& offer : offered)
            if (!offer->taken) return false;
        return true;
    });
}

static Result end_group(Communicator* comm, Group group) {
    if (emulator::device_of(group.stream) != comm->device || emulator::current_device() != comm->device) return INVALID_ARGUMENT;
    const std::lock_guard<std::mutex> lock(comm->world->lock);
    if (comm->aborted || !comm->ended.empty()) return INVALID_USAGE;
    comm->ended.push_back(std::move(group));
    comm->polls = random_below(4);
    return IN_PROGRESS;
}

static Result add(Communicator* comm, emulator::Stream* stream, Transfer transfer) {
    if (!depth) return INVALID_USAGE;
    Group& group = groups[comm];
    if (group.stream && group.stream != stream) return INVALID_USAGE;
    group.stream = stream;
    group.transfers.push_back(transfer);
    return OK;
}

extern "C" {

Result ncclGetVersion(int* version) { return *version = 22800, OK; }

Result ncclGetUniqueId(UniqueId* id) {
    static std::atomic<int> made{0};
    *id = {};
    const int number = ++made;
    std::memcpy(id->bytes, &number, sizeof number);
    return OK;
}

Result ncclCommInitRankConfig(Communicator** comm, int size, UniqueId id, int rank, const Config* config) {
    if (config->magic != 0xcafebeef || config->blocking != 0 || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    const std::lock_guard<std::mutex> all(worlds_lock);
    auto& world = worlds()[std::string(id.bytes, sizeof id.bytes)];
    if (!world) world = std::make_shared<World>();
    const std::lock_guard<std::mutex> lock(world->lock);
    world->ranks.resize(size);
    *comm = new Communicator{world, rank, emulator::current_device()};
    for (const Communicator* other : world->ranks)
        if (other && other->device == (*comm)->device) (*comm)->failure = INVALID_USAGE;
    world->ranks[rank] = *comm;
    ++world->come;
    return IN_PROGRESS;
}

Result ncclCommGetAsyncError(Communicator* comm, Result* failure) {
    const std::lock_guard<std::mutex> lock(comm->world->lock);
    *failure = comm->failure;
    if (*failure != OK) return OK;
    if (comm->world->come < int(comm->world->ranks.size()) || comm->polls-- > 0) {
        *failure = IN_PROGRESS;
        return OK;
    }
    for (; !comm->ended.empty(); comm->ended.pop_front())
        emulator::issue(comm->ended.front().stream, [comm, group = comm->ended.front()] { return run(comm, group), std::string(); });
    return OK;
}

// The communicator itself stays: a stream may still be at it.
Result ncclCommAbort(Communicator* comm) {
    const std::lock_guard<std::mutex> lock(comm->world->lock);
    comm->aborted = true;
    comm->ended.clear();
    comm->world->changed.notify_all();
    return OK;
}

Result ncclGroupStart() { return ++depth, OK; }
Result ncclGroupEnd() {
    if (--depth > 0) return OK;
    Result result = OK;
    for (auto& [comm, group] : groups) {
        const Result ended = end_group(comm, std::move(group));
        if (result == OK || result == IN_PROGRESS) result = ended;
    }
    groups.clear();
    return result;
}

Result ncclSend(const void* from, size_t count, int type, int peer, Communicator* comm, emulator::Stream* stream) {
    return type == UINT8 ? add(comm, stream, {true, const_cast<void*>(from), count, peer}) : INVALID_ARGUMENT;
}
Result ncclRecv(void* to, size_t count, int type, int peer, Communicator* comm, emulator::Stream* stream) {
    return type == UINT8 ? add(comm, stream, {false, to, count, peer}) : INVALID_ARGUMENT;
}
// In place.
Result ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* comm, emulator::Stream* stream) {
    auto* const place = static_cast<uint8_t*>(to);
    if (type != UINT8 || from != place + comm->rank * count) return INVALID_ARGUMENT;
    for (int peer = 0; peer < int(comm->world->ranks.size()); ++peer) {
        if (peer == comm->rank) continue;
        add(comm, stream, {true, const_cast<void*>(from), count, peer});
        add(comm, stream, {false, place + peer * count, count, peer});
    }
    // Alone there is nothing to do, and the group is not empty all the same.
    groups[comm].stream = stream;
    return depth ? OK : INVALID_USAGE;
}

const char* ncclGetErrorString(Result result) { return result == INVALID_USAGE ? "invalid usage" : result == INVALID_ARGUMENT ? "invalid argument" : "error"; }
const char* ncclGetLastError(Communicator*) { return ""; }

}  // extern "C"
