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
using Lock = std::unique_lock<std::mutex>;

thread_local int current = -1;  // none yet

// Never destroyed, because streams may outlive main.
struct Failures {
    std::mutex lock;
    std::map<int, std::string> of;
};
Failures& failures() {
    static auto* all = new Failures;
    return *all;
}

// How often an event has been recorded, and how many of those recordings its streams have come to.
struct Moment {
    std::mutex lock;
    std::condition_variable changed;
    uint64_t recorded = 0, reached = 0;
    Clock::time_point at;
};

void wait_until_reached(Moment& moment, uint64_t turn) {
    Lock lock(moment.lock);
    moment.changed.wait(lock, [&] { return moment.reached >= turn; });
}

}  // namespace

struct Stream {
    int device;
    std::mutex lock;
    std::condition_variable more, idle;
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
    Lock lock(stream->lock);
    for (;;) {
        stream->more.wait(lock, [&] { return stream->closing || !stream->issued.empty(); });
        if (stream->issued.empty()) return;
        Work work = std::move(stream->issued.front());
        stream->issued.pop_front();
        stream->busy = true;
        lock.unlock();
        const std::string failure = work();
        work = nullptr;
        if (!failure.empty()) {
            const Lock all(failures().lock);
            failures().of.try_emplace(stream->device, failure);
        }
        lock.lock();
        stream->busy = false;
        if (stream->issued.empty()) stream->idle.notify_all();
    }
}

Stream* open_stream(int device) {
    auto* stream = new Stream{device};
    stream->thread = std::thread(run, stream);
    return stream;
}

void close_stream(Stream* stream) {
    {
        const Lock lock(stream->lock);
        stream->closing = true;
        stream->more.notify_all();
    }
    stream->thread.join();
    delete stream;
}

int device_of(const Stream* stream) { return stream->device; }

void issue(Stream* stream, Work work) {
    const Lock lock(stream->lock);
    stream->issued.push_back(std::move(work));
    stream->more.notify_all();
}

void synchronize(Stream* stream) {
    Lock lock(stream->lock);
    stream->idle.wait(lock, [&] { return stream->issued.empty() && !stream->busy; });
}

Event* open_event(int device) { return new Event{device}; }
void close_event(Event* event) { delete event; }
int device_of(const Event* event) { return event->device; }

void record(Event* event, Stream* stream) {
    const auto moment = event->moment;
    uint64_t turn;
    {
        const Lock lock(moment->lock);
        turn = ++moment->recorded;
    }
    issue(stream, [moment, turn] {
        const Lock lock(moment->lock);
        moment->reached = turn;
        moment->at = Clock::now();
        moment->changed.notify_all();
        return std::string();
    });
}

static uint64_t last_recording(Moment& moment) {
    const Lock lock(moment.lock);
    return moment.recorded;
}

void wait_for(Stream* stream, Event* event) {
    const auto moment = event->moment;
    issue(stream, [moment, turn = last_recording(*moment)] { return wait_until_reached(*moment, turn), std::string(); });
}

bool has_passed(Event* event) {
    const Lock lock(event->moment->lock);
    return event->moment->reached >= event->moment->recorded;
}

void synchronize(Event* event) {
    const auto moment = event->moment;
    wait_until_reached(*moment, last_recording(*moment));
}

float milliseconds_between(Event* start, Event* end) {
    const auto at = [](const Event* event) {
        const Lock lock(event->moment->lock);
        return event->moment->at;
    };
    return std::chrono::duration<float, std::milli>(at(end) - at(start)).count();
}

std::string failure_of(int device) {
    const Lock lock(failures().lock);
    const auto found = failures().of.find(device);
    return found == failures().of.end() ? std::string() : found->second;
}

int current_device() { return current; }
void make_current(int device) { current = device; }

}  // namespace emulator
