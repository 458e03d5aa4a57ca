// Merge of many partial attention results (merged.cuh), in the order of their stack.
//
// parts [count * rows, heads * head_dim] bf16 and part_lse [count * rows, heads] f32 (natural log), partial p in rows p * rows ..;
// out [rows, heads * head_dim]. One block a row; head_dim a multiple of 8.
#include <merged.cuh>

extern "C" __global__ void merge_stacked(int count, int rows, int heads, int head_dim, const bf16* parts, const float* part_lse, bf16* out) {
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const int width = heads * head_dim;
    for (int col = threadIdx.x * 8; col < width; col += blockDim.x * 8) {
        const float* lse = part_lse + size_t(blockIdx.x) * heads + col / head_dim;
        const size_t lse_step = size_t(rows) * heads;
        float largest = -INFINITY;
        for (int p = 0; p < count; ++p) largest = fmaxf(largest, lse[p * lse_step]);
        Merged<8> merged(largest);
        for (int p = 0; p < count; ++p) {
            float part[8];
            unpack(load8(parts + (size_t(p) * rows + blockIdx.x) * width + col), part);
            merged.add(lse[p * lse_step], part);
        }
        merged.normalise();
        store8(out + size_t(blockIdx.x) * width + col, pack(merged.value));
    }
}
