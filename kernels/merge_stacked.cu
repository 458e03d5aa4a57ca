// Merge of many partial attention results: out[i] = sum_p e^(lse[p, i] - m) part[p, i] / sum_p e^(lse[p, i] - m), m = max_p lse[p, i].
//
// parts [count * rows, heads * head_dim] bf16 and part_lse [count * rows, heads] f32 (natural log), partial p in rows p * rows ..;
// out [rows, heads * head_dim]. Partials are summed in their order. One that saw nothing has LSE -inf and counts nothing; if all are so, out is 0.
// One block a row; head_dim a multiple of 8.
#include <device.cuh>

extern "C" __global__ void merge_stacked(int count, int rows, int heads, int head_dim, const bf16* parts, const float* part_lse, bf16* out) {
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const int width = heads * head_dim;
    for (int col = threadIdx.x * 8; col < width; col += blockDim.x * 8) {
        const float* lse = part_lse + size_t(blockIdx.x) * heads + col / head_dim;
        const size_t lse_step = size_t(rows) * heads;
        float largest = -INFINITY;
        for (int p = 0; p < count; ++p) largest = fmaxf(largest, lse[p * lse_step]);
        float sum = 0.f, merged[8] = {};
        for (int p = 0; p < count; ++p) {
            if (lse[p * lse_step] == -INFINITY) continue;
            const float weight = exp2_approx((lse[p * lse_step] - largest) * 1.4426950408889634f);
            float value[8];
            unpack(load8(parts + (size_t(p) * rows + blockIdx.x) * width + col), value);
            sum += weight;
#pragma unroll
            for (int i = 0; i < 8; ++i) merged[i] += weight * value[i];
        }
        const float norm = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) merged[i] *= norm;
        store8(out + size_t(blockIdx.x) * width + col, pack(merged));
    }
}
