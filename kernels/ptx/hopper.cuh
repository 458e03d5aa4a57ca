// Hopper (sm_90a): mbarriers, bulk tensor copies, warpgroup products, register hand-over.
//
// Invariant: the emulator of the tests has a file of the same name with the same functions.
#pragma once

#include <ptx/mma.cuh>

// A tensor map as the driver encodes it (CUtensorMap).
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

// ---- mbarriers: a phase ends when all arrivals and all expected bytes have come; phases have alternating parity, the first is 0.

DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; before the block's first barrier.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` of bulk copies too.
DEVICE void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Returns once the phase of this parity has ended.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- bulk tensor copies

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Starts copying the map's box at (x, y, z) to shared memory; its bytes count on `barrier`. By one thread.
DEVICE void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// ---- hand-over between warpgroups

// Named barriers 1 .. 15: `threads` threads in all sync or arrive.
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int REGISTERS>
DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- warpgroup products: d [64, N] f32 over the four warps, in the fragment layout of mma.sync, warp w holding rows 16 w .. + 16.

// Orders register accesses before the products issued next.
DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed groups are under way.
template <int PENDING>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving accesses to `values` over this point: products write them behind its back.
template <int N>
DEVICE void pin(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// multiply_shared: d = a bᵀ (+ d if `add`), a [64, 16] and b [N, 16] in shared memory, 16 columns each.
// multiply_registers: d += a b, a [64, 16] in registers (fragments of mma.sync), b [16, N] in shared memory.
template <int N>
struct Product;

#define LIST_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_40 \
    LIST_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define LIST_48 \
    LIST_40 ", " \
    "%40, %41, %42, %43, %44, %45, %46, %47"
#define LIST_64 \
    LIST_48 ", " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST_80 \
    LIST_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define LIST_88 \
    LIST_80 ", " \
    "%80, %81, %82, %83, %84, %85, %86, %87"
#define OUT_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT_16(d, i) OUT_8(d, i), OUT_8(d, i + 8)
#define OUT_32(d) OUT_16(d, 0), OUT_16(d, 16)
#define OUT_40(d) OUT_32(d), OUT_8(d, 32)
#define OUT_48(d) OUT_32(d), OUT_16(d, 32)
#define OUT_64(d) OUT_48(d), OUT_16(d, 48)
#define OUT_80(d) OUT_64(d), OUT_16(d, 64)
#define OUT_88(d) OUT_80(d), OUT_8(d, 80)

// N columns, R = N / 2 registers of d; A .. F number the operands after them.
#define PRODUCT(N, R, A, B, C, D, E, F)                                                                                  \
    template <>                                                                                                          \
    struct Product<N> {                                                                                                  \
        DEVICE static void multiply_shared(float (&d)[R], uint64_t a, uint64_t b, bool add) {                            \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #C ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST_##R "}, %" #A ", %" #B         \
                         ", add, 1, 1, 0, 0;\n}"                                                                         \
                         : OUT_##R(d)                                                                                    \
                         : "l"(a), "l"(b), "r"(int(add)));                                                               \
        }                                                                                                                \
        DEVICE static void multiply_registers(float (&d)[R], const uint32_t* a, uint64_t b) {                            \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #F ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST_##R "}, {%" #A ", %" #B        \
                         ", %" #C ", %" #D "}, %" #E ", add, 1, 1, 1;\n}"                                                \
                         : OUT_##R(d)                                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                  \
        }                                                                                                                \
    };

PRODUCT(64, 32, 32, 33, 34, 35, 36, 37)
PRODUCT(80, 40, 40, 41, 42, 43, 44, 45)
PRODUCT(96, 48, 48, 49, 50, 51, 52, 53)
PRODUCT(128, 64, 64, 65, 66, 67, 68, 69)
PRODUCT(160, 80, 80, 81, 82, 83, 84, 85)
PRODUCT(176, 88, 88, 89, 90, 91, 92, 93)
