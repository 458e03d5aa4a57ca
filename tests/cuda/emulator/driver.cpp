// A CUDA driver (libcuda.so) whose one device is the emulator: what the CUDA backend calls of it, with host memory as device memory and
// streams that are always up to date.
//
// The device calls itself of compute capability APBD_EMULATED_CAPABILITY (90 unless set). Launches draw their seeds from APBD_EMULATED_SEED.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "registry.h"
#include "simt.h"

using Result = int;
static constexpr Result OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719;
static constexpr size_t MEMORY_BYTES = size_t(2) << 30;

static std::mutex one_launch;
static std::map<std::string, emulator::Kernel>& kernels() {
    static std::map<std::string, emulator::Kernel> all;
    return all;
}
static std::string last_failure;

emulator::Registration::Registration(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }

static long setting(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atol(value) : otherwise;
}

extern "C" {

Result cuInit(unsigned) { return OK; }
Result cuDriverGetVersion(int* version) { return *version = setting("APBD_EMULATED_DRIVER", 13000), OK; }
Result cuDeviceGetCount(int* count) { return *count = 1, OK; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? OK : INVALID; }
Result cuDeviceGetName(char* name, int bytes, int) { return std::strncpy(name, "emulator", bytes), OK; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY_BYTES, OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    const long capability = setting("APBD_EMULATED_CAPABILITY", 90);
    switch (attribute) {
        case 16: return *value = 3, OK;                 // multiprocessors
        case 75: return *value = capability / 10, OK;   // capability, major
        case 76: return *value = capability % 10, OK;   // capability, minor
        case 97: return *value = 227 << 10, OK;         // shared memory of a block
        default: return INVALID;
    }
}
Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = context, OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxSetCurrent(void*) { return OK; }
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
    return *at ? OK : OUT_OF_MEMORY;
}
Result cuMemFreeHost(void* at) { return std::free(at), OK; }
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) { return std::memmove(reinterpret_cast<void*>(to), from, bytes), OK; }
Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) { return std::memmove(to, reinterpret_cast<void*>(from), bytes), OK; }
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    return std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), OK;
}
Result cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void*) { return std::memset(reinterpret_cast<void*>(at), value, bytes), OK; }

Result cuStreamCreate(void** stream, unsigned) { return *stream = stream, OK; }
Result cuStreamDestroy_v2(void*) { return OK; }
Result cuStreamSynchronize(void*) { return OK; }
Result cuStreamWaitEvent(void*, void*, unsigned) { return OK; }
Result cuEventCreate(void** event, unsigned) { return *event = event, OK; }
Result cuEventDestroy_v2(void*) { return OK; }
Result cuEventRecord(void*, void*) { return OK; }
Result cuEventSynchronize(void*) { return OK; }
Result cuEventElapsedTime_v2(float* milliseconds, void*, void*) { return *milliseconds = 0.f, OK; }

Result cuModuleLoadData(void** module, const void*) { return *module = module, OK; }
Result cuModuleUnload(void*) { return OK; }
Result cuModuleGetFunction(void** function, void*, const char* name) {
    const auto at = kernels().find(name);
    if (at == kernels().end()) return NOT_FOUND;
    *function = &at->second;
    return OK;
}
Result cuFuncSetAttribute(void*, int, int) { return OK; }
Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes, void*, void** parameters, void**) {
    static std::atomic<uint64_t> launches{0};
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || bx * by * bz % 32) return INVALID;
    const std::lock_guard<std::mutex> lock(one_launch);
    const auto& kernel = *static_cast<emulator::Kernel*>(function);
    const uint64_t seed = setting("APBD_EMULATED_SEED", 0) + ++launches;
    last_failure = emulator::run({gx, gy, gz}, {bx, by, bz}, shared_bytes, seed, [&] { kernel(parameters); });
    return last_failure.empty() ? OK : LAUNCH_FAILED;
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
};
// Attributes let launches overlap; here they never do.
Result cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void** extra) {
    return cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared_bytes, c->stream, parameters, extra);
}

Result cuGetErrorName(Result result, const char** name) {
    *name = result == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : result == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return OK;
}
Result cuGetErrorString(Result result, const char** text) { return *text = result == LAUNCH_FAILED ? last_failure.c_str() : "emulated error", OK; }

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
