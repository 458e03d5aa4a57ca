// Merge of two partial attention results: with m = max(lse, lse_p),
//   out = (e^(lse - m) out + e^(lse_p - m) part) / (e^(lse - m) + e^(lse_p - m)),  lse = m + ln(e^(lse - m) + e^(lse_p - m)).
//
// out, part [rows, heads * head_dim] bf16; lse, part_lse [rows, heads] f32, natural log; head_dim a multiple of 8. Pointers are at the
// first row. A side whose LSE is -inf saw nothing and counts nothing; if both are, out is 0. One block a row.
#include <device.cuh>

DEVICE float weight_of(float lse, float m) { return lse == -INFINITY ? 0.f : exp2_approx((lse - m) * 1.4426950408889634f); }

extern "C" __global__ void merge(int heads, int head_dim, bf16* out, float* lse, const bf16* part, const float* part_lse) {
    const int width = heads * head_dim;
    out += size_t(blockIdx.x) * width;
    part += size_t(blockIdx.x) * width;
    lse += size_t(blockIdx.x) * heads;
    part_lse += size_t(blockIdx.x) * heads;
    for (int col = threadIdx.x * 8; col < width; col += blockDim.x * 8) {
        const float a = lse[col / head_dim], b = part_lse[col / head_dim];
        const float m = fmaxf(a, b);
        const float wa = weight_of(a, m), wb = weight_of(b, m);
        const float norm = wa + wb > 0.f ? 1.f / (wa + wb) : 0.f;
        float x[8], y[8];
        unpack(load8(out + col), x);
        unpack(load8(part + col), y);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = (wa > 0.f ? wa * x[i] : 0.f) * norm + (wb > 0.f ? wb * y[i] : 0.f) * norm;
        store8(out + col, pack(x));
    }
    __syncthreads();
    for (int head = threadIdx.x; head < heads; head += blockDim.x) {
        const float a = lse[head], b = part_lse[head];
        const float m = fmaxf(a, b);
        lse[head] = m == -INFINITY ? m : m + logf(weight_of(a, m) + weight_of(b, m));
    }
}
