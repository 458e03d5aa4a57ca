#include "streams.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace emulator {

namespace {

using Clock = std::chrono::steady_clock;

thread_local int current = 0;

// One for all: what streams do takes far longer than the lock is held. Never destroyed, because streams may outlive main.
std::mutex& lock_of_all() {
    static auto* mutex = new std::mutex;
    return *mutex;
}
std::condition_variable& changed() {
    static auto* condition = new std::condition_variable;
    return *condition;
}
std::map<int, std::string>& failures() {
    static auto* all = new std::map<int, std::string>;
    return *all;
}

struct Moment {
    uint64_t recorded = 0, reached = 0;
    Clock::time_point at;
};

}  // namespace

struct Stream {
    int device;
    std::deque<Work> issued;
    bool busy = false, closing = false;
    std::thread thread;
};

// What a stream still needs of an event outlives it.
struct Event {
    int device;
    std::shared_ptr<Moment> moment = std::make_shared<Moment>();
};

static void run(Stream* stream) {
    std::unique_lock<std::mutex> lock(lock_of_all());
    for (;;) {
        changed().wait(lock, [&] { return stream->closing || !stream->issued.empty(); });
        if (stream->issued.empty()) return;
        Work work = std::move(stream->issued.front());
        stream->issued.pop_front();
        stream->busy = true;
        lock.unlock();
        const std::string failure = work();
        work = nullptr;
        lock.lock();
        if (!failure.empty()) failures().try_emplace(stream->device, failure);
        stream->busy = false;
        changed().notify_all();
    }
}

Stream* open_stream(int device) {
    auto* stream = new Stream{device};
    stream->thread = std::thread(run, stream);
    return stream;
}

void close_stream(Stream* stream) {
    {
        const std::lock_guard<std::mutex> lock(lock_of_all());
        stream->closing = true;
        changed().notify_all();
    }
    stream->thread.join();
    delete stream;
}

int device_of(const Stream* stream) { return stream->device; }

void issue(Stream* stream, Work work) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    stream->issued.push_back(std::move(work));
    changed().notify_all();
}

void synchronize(Stream* stream) {
    std::unique_lock<std::mutex> lock(lock_of_all());
    changed().wait(lock, [&] { return stream->issued.empty() && !stream->busy; });
}

Event* open_event(int device) { return new Event{device}; }
void close_event(Event* event) { delete event; }
int device_of(const Event* event) { return event->device; }

void record(Event* event, Stream* stream) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    const auto moment = event->moment;
    const uint64_t turn = ++moment->recorded;
    stream->issued.push_back([moment, turn] {
        const std::lock_guard<std::mutex> lock(lock_of_all());
        moment->reached = turn;
        moment->at = Clock::now();
        changed().notify_all();
        return std::string();
    });
    changed().notify_all();
}

void wait_for(Stream* stream, Event* event) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    const auto moment = event->moment;
    const uint64_t turn = moment->recorded;
    stream->issued.push_back([moment, turn] {
        std::unique_lock<std::mutex> lock(lock_of_all());
        changed().wait(lock, [&] { return moment->reached >= turn; });
        return std::string();
    });
    changed().notify_all();
}

bool has_passed(Event* event) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    return event->moment->reached >= event->moment->recorded;
}

void synchronize(Event* event) {
    std::unique_lock<std::mutex> lock(lock_of_all());
    const auto moment = event->moment;
    const uint64_t turn = moment->recorded;
    changed().wait(lock, [&] { return moment->reached >= turn; });
}

float milliseconds_between(Event* start, Event* end) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    return std::chrono::duration<float, std::milli>(end->moment->at - start->moment->at).count();
}

std::string failure_of(int device) {
    const std::lock_guard<std::mutex> lock(lock_of_all());
    const auto at = failures().find(device);
    return at == failures().end() ? std::string() : at->second;
}

int current_device() { return current; }
void make_current(int device) { current = device; }

}  // namespace emulator
