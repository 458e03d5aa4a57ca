// Combines the partial results of row tiles whose keys were split: o = sum_s e^(lse_s - lse) o_s, lse = ln sum_s e^(lse_s).
//
// Grid (x: merges, y: KV heads, z: rows of the row tile); a block of head_dim / 2 threads at least 32 takes one packed row.
// Partials as in output.cuh, `rows` rows a row tile; lse natural log.
#include <attention/output.cuh>

extern "C" __global__ void attention_combine(
    const __grid_constant__ Shape shape, const __grid_constant__ Plan plan, const Merge* merges, int rows, int head_dim,
    const __grid_constant__ Output to) {
    let_the_next_grid_start();
    wait_for_earlier_grids();
    const Merge merge = merges[blockIdx.x];
    const Task task = plan.tasks[merge.task];
    const int kv_head = blockIdx.y, packed = merge.first_row + blockIdx.z;
    if (packed >= task.queries * shape.group) return;
    const PackedRow at(packed, kv_head, shape.group);
    const size_t first = (size_t(merge.slot) * shape.kv_heads + kv_head) * rows + blockIdx.z, step = size_t(shape.kv_heads) * rows;

    float largest = -INFINITY, sum = 0.f;
    for (int s = 0; s < merge.slots; ++s) largest = fmaxf(largest, to.partial_lse[first + s * step]);
    const float shift = largest == -INFINITY ? 0.f : largest;
    const int column = threadIdx.x * 2;
    float even = 0.f, odd = 0.f;
    for (int s = 0; s < merge.slots; ++s) {
        const size_t index = first + s * step;
        const float weight = exp2_approx((to.partial_lse[index] - shift) * 1.4426950408889634f);
        sum += weight;
        if (column >= head_dim) continue;
        even += weight * to.partial[index * head_dim + column];
        odd += weight * to.partial[index * head_dim + column + 1];
    }
    const float norm = sum > 0.f ? 1.f / sum : 0.f;
    const size_t row = task.first_query + at.query;
    if (column < head_dim)
        *reinterpret_cast<uint32_t*>(to.out + row * shape.out_stride + at.head * head_dim + column) = pack_bf16(even * norm, odd * norm);
    if (to.lse && threadIdx.x == 0) to.lse[row * shape.heads + at.head] = sum > 0.f ? largest + logf(sum) : -INFINITY;
}
