// The part of cuBLASLt (libcublasLt.so) that the CUDA backend calls, computed plainly: D = alpha op(A) op(B) + beta C (+ bias), column-major, bf16 or
// f32 elements, sums in f32.
#include <cstdint>
#include <cstring>

#include "streams.h"

using Status = int;
static constexpr Status OK = 0, NOT_SUPPORTED = 15;
static constexpr int F32 = 0, BF16 = 14;

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t stride;
};
struct Product {
    int transposed[2] = {};
    int epilogue = 1;
    const void* bias = nullptr;
};

static float read(const void* at, int type, size_t i) {
    if (type == F32) return static_cast<const float*>(at)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(at)[i]) << 16;
    float value;
    return std::memcpy(&value, &bits, 4), value;
}
static void write(void* at, int type, size_t i, float value) {
    if (type == F32) {
        static_cast<float*>(at)[i] = value;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(at)[i] = value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

extern "C" {

Status cublasLtCreate(void** handle) { return *handle = handle, OK; }
Status cublasLtDestroy(void*) { return OK; }
size_t cublasLtGetVersion() { return 130000; }

Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    *layout = new Layout{type, rows, cols, stride};
    return type == F32 || type == BF16 ? OK : NOT_SUPPORTED;
}
Status cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, OK; }

Status cublasLtMatmulDescCreate(Product** product, int compute, int scale) { return *product = new Product, compute == 68 && scale == F32 ? OK : NOT_SUPPORTED; }
Status cublasLtMatmulDescDestroy(Product* product) { return delete product, OK; }
Status cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 3: return std::memcpy(&product->transposed[0], value, 4), OK;
        case 4: return std::memcpy(&product->transposed[1], value, 4), OK;
        case 7: return std::memcpy(&product->epilogue, value, 4), OK;
        case 8: return std::memcpy(&product->bias, value, 8), OK;
        default: return NOT_SUPPORTED;
    }
}

Status cublasLtMatmulPreferenceCreate(void** preference) { return *preference = preference, OK; }
Status cublasLtMatmulPreferenceDestroy(void*) { return OK; }
Status cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return OK; }

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
Status cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* results, int* count) {
    results[0] = Heuristic{};
    results[0].algorithm[0] = 1;
    return *count = 1, OK;
}

Status cublasLtMatmul(void*, const Product* product, const float* alpha, const void* a, const Layout* la, const void* b, const Layout* lb, const float* beta,
                      const void* c, const Layout* lc, void* d, const Layout* ld, const void*, void*, size_t, emulator::Stream* stream) {
    if (emulator::device_of(stream) != emulator::current_device()) return NOT_SUPPORTED;
    // Descriptors and scalars are the caller's again when this returns.
    emulator::issue(stream, [=, product = *product, alpha = *alpha, beta = *beta, la = *la, lb = *lb, lc = *lc, ld = *ld] {
        const uint64_t inner = product.transposed[0] ? la.rows : la.cols;
        for (uint64_t col = 0; col < ld.cols; ++col)
            for (uint64_t row = 0; row < ld.rows; ++row) {
                float sum = 0.f;
                for (uint64_t k = 0; k < inner; ++k)
                    sum += read(a, la.type, product.transposed[0] ? row * la.stride + k : k * la.stride + row) *
                           read(b, lb.type, product.transposed[1] ? k * lb.stride + col : col * lb.stride + k);
                sum *= alpha;
                if (beta != 0.f) sum += beta * read(c, lc.type, col * lc.stride + row);
                if (product.epilogue == 4) sum += read(product.bias, BF16, row);
                write(d, ld.type, col * ld.stride + row, sum);
            }
        return std::string();
    });
    return OK;
}

}  // extern "C"
