// Streams and events of the emulated devices.
//
// A stream is a thread that does what was issued on it, in order and late: nothing has happened when a call returns, as on a GPU. What fails on a stream
// is found by the next call that waits for the device.
// Invariant: streams wait for each other by events alone; a device that has failed does nothing more.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Stream;
struct Event;

// Work on a stream. Returns an empty string, or why it failed.
using Work = std::function<std::string()>;

Stream* open_stream(int device);
// Waits for what has been issued.
void close_stream(Stream* stream);
int device_of(const Stream* stream);
void issue(Stream* stream, Work work);
void synchronize(Stream* stream);

Event* open_event(int device);
void close_event(Event* event);
int device_of(const Event* event);
void record(Event* event, Stream* stream);
// What is issued on the stream from here on waits for the event as it was last recorded.
void wait_for(Stream* stream, Event* event);
bool has_passed(Event* event);
void synchronize(Event* event);
float milliseconds_between(Event* start, Event* end);

// Why a device failed; empty while it has not.
std::string failure_of(int device);

// The device that is current on this thread.
int current_device();
void make_current(int device);

}  // namespace emulator
