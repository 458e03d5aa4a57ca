// A CUDA driver (libcuda.so) whose devices are emulated: what the CUDA backend calls of it, with host memory as device memory.
//
// There are APBD_EMULATED_DEVICES devices (8 unless set) of compute capability APBD_EMULATED_CAPABILITY (90 unless set), in two halves that are joined
// by NVLink within. Launches draw their seeds from APBD_EMULATED_SEED.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "registry.h"
#include "simt.h"
#include "streams.h"

using emulator::Event;
using emulator::Stream;
using Result = int;
static constexpr Result OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
                        NOT_READY = 600, ALREADY_ENABLED = 704, LAUNCH_FAILED = 719;
static constexpr size_t MEMORY_BYTES = size_t(2) << 30;

// These are never destroyed, because streams may outlive main.
static std::map<std::string, emulator::Kernel>& kernels() {
    static auto* all = new std::map<std::string, emulator::Kernel>;
    return *all;
}
// Page-locked memory, from its start to its size.
static std::map<uintptr_t, size_t>& pinned() {
    static auto* all = new std::map<uintptr_t, size_t>;
    return *all;
}
static std::mutex pinned_lock;
// Which devices may reach into the memory of which contexts.
static std::set<std::pair<int, void*>>& reached() {
    static auto* all = new std::set<std::pair<int, void*>>;
    return *all;
}
static std::mutex reached_lock;

emulator::Registration::Registration(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }

static long setting(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atol(value) : otherwise;
}

static int devices() { return setting("APBD_EMULATED_DEVICES", 8); }

static bool is_pinned(const void* at) {
    const std::lock_guard<std::mutex> lock(pinned_lock);
    auto after = pinned().upper_bound(reinterpret_cast<uintptr_t>(at));
    if (after == pinned().begin()) return false;
    --after;
    return reinterpret_cast<uintptr_t>(at) < after->first + after->second;
}

// A failed device does nothing any more, and says so at every call.
static Result health(int device) { return emulator::failure_of(device).empty() ? OK : LAUNCH_FAILED; }

// Work may be issued on a stream of the current device alone.
static Result enqueue(Stream* stream, emulator::Work work) {
    if (emulator::device_of(stream) != emulator::current_device()) return INVALID_CONTEXT;
    if (health(emulator::device_of(stream)) != OK) return LAUNCH_FAILED;
    emulator::issue(stream, std::move(work));
    return OK;
}

static Result copy(Stream* stream, void* to, const void* from, size_t bytes) {
    return enqueue(stream, [=] { return std::memmove(to, from, bytes), std::string(); });
}

extern "C" {

Result cuInit(unsigned) { return OK; }
Result cuDriverGetVersion(int* version) { return *version = setting("APBD_EMULATED_DRIVER", 13000), OK; }
Result cuDeviceGetCount(int* count) { return *count = devices(), OK; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < devices() ? OK : INVALID_DEVICE; }
Result cuDeviceGetName(char* name, int bytes, int) { return std::strncpy(name, "emulator", bytes), OK; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY_BYTES, OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    const long capability = setting("APBD_EMULATED_CAPABILITY", 90);
    switch (attribute) {
        case 16: return *value = 3, OK;                 // multiprocessors
        case 75: return *value = capability / 10, OK;   // capability, major
        case 76: return *value = capability % 10, OK;   // capability, minor
        case 81: return *value = 228 << 10, OK;         // shared memory of a multiprocessor
        case 97: return *value = 227 << 10, OK;         // shared memory of a block
        default: return INVALID;
    }
}
Result cuDeviceGetP2PAttribute(int* value, int attribute, int from, int to) {
    const bool near = (from < devices() / 2) == (to < devices() / 2);
    switch (attribute) {
        case 1: return *value = near ? 0 : 1, OK;  // rank of the link's speed, 0 the best
        case 2: return *value = 1, OK;             // whether there is one
        default: return INVALID;
    }
}
Result cuDeviceCanAccessPeer(int* can, int device, int peer) {
    if (device < 0 || peer < 0 || device >= devices() || peer >= devices()) return INVALID_DEVICE;
    return *can = device != peer, OK;
}
// A context is told from others by its device.
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(uintptr_t(device) + 1), OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxSetCurrent(void* context) { return emulator::make_current(int(reinterpret_cast<uintptr_t>(context)) - 1), OK; }
// All memory is the host's: this only keeps count.
Result cuCtxEnablePeerAccess(void* context, unsigned) {
    const std::lock_guard<std::mutex> lock(reached_lock);
    return reached().emplace(emulator::current_device(), context).second ? OK : ALREADY_ENABLED;
}
Result cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = MEMORY_BYTES, OK; }

Result cuMemAlloc_v2(uint64_t* at, size_t bytes) {
    void* memory = bytes > MEMORY_BYTES ? nullptr : std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!memory) return OUT_OF_MEMORY;
    *at = reinterpret_cast<uint64_t>(memory);
    return OK;
}
Result cuMemFree_v2(uint64_t at) { return std::free(reinterpret_cast<void*>(at)), OK; }
Result cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    *at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*at) return OUT_OF_MEMORY;
    const std::lock_guard<std::mutex> lock(pinned_lock);
    pinned()[reinterpret_cast<uintptr_t>(*at)] = bytes;
    return OK;
}
Result cuMemFreeHost(void* at) {
    const std::lock_guard<std::mutex> lock(pinned_lock);
    pinned().erase(reinterpret_cast<uintptr_t>(at));
    return std::free(at), OK;
}
Result cuMemHostGetDevicePointer_v2(uint64_t* at, void* host, unsigned) {
    return *at = reinterpret_cast<uint64_t>(host), emulator::current_device() < 0 ? INVALID_CONTEXT : OK;
}
// Pinned memory is read when the copy's turn comes, other memory at once.
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    if (is_pinned(from)) return copy(stream, reinterpret_cast<void*>(to), from, bytes);
    const auto* first = static_cast<const uint8_t*>(from);
    return enqueue(stream, [to, taken = std::vector<uint8_t>(first, first + bytes)] {
        return std::memcpy(reinterpret_cast<void*>(to), taken.data(), taken.size()), std::string();
    });
}
Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) { return copy(stream, to, reinterpret_cast<void*>(from), bytes); }
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    return copy(stream, reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
}
Result cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, Stream* stream) {
    return enqueue(stream, [=] { return std::memset(reinterpret_cast<void*>(at), value, bytes), std::string(); });
}

Result cuStreamCreate(Stream** stream, unsigned) { return *stream = emulator::open_stream(emulator::current_device()), OK; }
Result cuStreamDestroy_v2(Stream* stream) { return emulator::close_stream(stream), OK; }
Result cuStreamSynchronize(Stream* stream) { return emulator::synchronize(stream), health(emulator::device_of(stream)); }
Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) { return emulator::wait_for(stream, event), health(emulator::device_of(stream)); }
Result cuEventCreate(Event** event, unsigned) { return *event = emulator::open_event(emulator::current_device()), OK; }
Result cuEventDestroy_v2(Event* event) { return emulator::close_event(event), OK; }
Result cuEventRecord(Event* event, Stream* stream) {
    if (emulator::device_of(event) != emulator::device_of(stream)) return INVALID_HANDLE;
    return emulator::record(event, stream), health(emulator::device_of(stream));
}
Result cuEventQuery(Event* event) {
    if (health(emulator::device_of(event)) != OK) return LAUNCH_FAILED;
    return emulator::has_passed(event) ? OK : NOT_READY;
}
Result cuEventSynchronize(Event* event) { return emulator::synchronize(event), health(emulator::device_of(event)); }
Result cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    return *milliseconds = emulator::milliseconds_between(start, end), emulator::has_passed(start) && emulator::has_passed(end) ? OK : NOT_READY;
}

Result cuModuleLoadData(void** module, const void*) { return *module = module, OK; }
Result cuModuleUnload(void*) { return OK; }
Result cuModuleGetFunction(void** function, void*, const char* name) {
    const auto at = kernels().find(name);
    if (at == kernels().end()) return NOT_FOUND;
    *function = &at->second;
    return OK;
}
Result cuFuncSetAttribute(void*, int, int) { return OK; }

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Stream* stream;
    void* attributes;
    unsigned attribute_count;
};
// Attributes let launches overlap; here those of one stream never do.
Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
    static std::atomic<uint64_t> launches{0};
    const LaunchConfig c = *config;
    const unsigned threads = c.block[0] * c.block[1] * c.block[2];
    if (!c.grid[0] || !c.grid[1] || !c.grid[2] || c.grid[1] > 65535 || c.grid[2] > 65535 || threads > 1024 || threads % 32) return INVALID;
    const uint64_t seed = setting("APBD_EMULATED_SEED", 0) + ++launches;
    return enqueue(c.stream, [c, seed, run = (*static_cast<emulator::Kernel*>(function))(parameters)] {
        return emulator::run({c.grid[0], c.grid[1], c.grid[2]}, {c.block[0], c.block[1], c.block[2]}, c.shared_bytes, seed, run);
    });
}

Result cuGetErrorName(Result result, const char** name) {
    switch (result) {
        case OUT_OF_MEMORY: return *name = "CUDA_ERROR_OUT_OF_MEMORY", OK;
        case INVALID_CONTEXT: return *name = "CUDA_ERROR_INVALID_CONTEXT", OK;
        case INVALID_HANDLE: return *name = "CUDA_ERROR_INVALID_HANDLE", OK;
        case ALREADY_ENABLED: return *name = "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", OK;
        case LAUNCH_FAILED: return *name = "CUDA_ERROR_LAUNCH_FAILED", OK;
        default: return *name = "CUDA_ERROR", OK;
    }
}
Result cuGetErrorString(Result result, const char** text) {
    static thread_local std::string failure;
    failure = result == LAUNCH_FAILED ? emulator::failure_of(emulator::current_device()) : "emulated error";
    return *text = failure.c_str(), OK;
}

// The map is read by copy_box of the emulator.
Result cuTensorMapEncodeTiled(void* map, int, unsigned rank, void* base, const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                              const uint32_t* steps, int, int swizzle, int, int) {
    struct {
        void* base;
        uint64_t size[3], stride[2];
        uint32_t box[3];
    } encoded;
    if (rank != 3 || swizzle != 3 || reinterpret_cast<uint64_t>(base) % 16 || box[0] * 2 > 128) return INVALID;
    for (int i = 0; i < 3; ++i)
        if (!size[i] || !box[i] || box[i] > 256 || steps[i] != 1) return INVALID;
    for (int i = 0; i < 2; ++i)
        if (stride[i] % 16 || stride[i] >= uint64_t(1) << 40) return INVALID;
    encoded.base = base;
    std::memcpy(encoded.size, size, sizeof encoded.size);
    std::memcpy(encoded.stride, stride, sizeof encoded.stride);
    std::memcpy(encoded.box, box, sizeof encoded.box);
    std::memcpy(map, &encoded, sizeof encoded);
    return OK;
}

}  // extern "C"
