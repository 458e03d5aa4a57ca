// Combines the partial results of row tiles whose keys were split: o = sum_s e^(lse_s - lse) o_s, lse = ln sum_s e^(lse_s).
//
// Grid (x: merges, y: KV heads, z: rows of the row tile); a block of head_dim / 2 threads at least 32 takes one packed row.
// Partials as in output.cuh, `rows` rows a row tile; lse natural log.
#include <attention/output.cuh>

extern "C" __global__ void attention_combine(
    const __grid_constant__ Shape shape, const __grid_constant__ Plan plan, const Merge* merges, int rows, int head_dim,
    const __grid_constant__ Output to) {
    let_the_next_grid_start();
    const Merge merge = merges[blockIdx.x];
    const Task task = plan.tasks[merge.task];
    const int kv_head = blockIdx.y, packed = merge.first_row + blockIdx.z;
    if (packed >= task.queries * shape.group) return;
    const PackedRow at(packed, kv_head, shape.group);
    const size_t first = (size_t(merge.slot) * shape.kv_heads + kv_head) * rows + blockIdx.z, step = size_t(shape.kv_heads) * rows;

    wait_for_earlier_grids();
    const int lane = threadIdx.x % 32, column = threadIdx.x * 2;
    float largest = -INFINITY;
    for (int s = lane; s < merge.slots; s += 32) largest = fmaxf(largest, to.partial_lse[first + s * step]);
    for (int distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, shuffle_xor(largest, distance));
    const float shift = largest == -INFINITY ? 0.f : largest;
    float sum = 0.f, even = 0.f, odd = 0.f;
    // 32 slots at a time: a lane has the weight of one, and hands it to the others. Many values are on their way at once.
    for (int some = 0; some < merge.slots; some += 32) {
        const float lse = some + lane < merge.slots ? to.partial_lse[first + (some + lane) * step] : -INFINITY;
        const float weight = exp2_approx((lse - shift) * 1.4426950408889634f);
        sum += weight;
        const float* values = to.partial + (first + some * step) * head_dim + (column < head_dim ? column : 0);
        const int here = min(32, merge.slots - some);
#pragma unroll 16
        for (int s = 0; s < here; ++s) {
            const float of_slot = bits_to_float(shuffle(float_to_bits(weight), s));
            even += of_slot * values[s * step * head_dim];
            odd += of_slot * values[s * step * head_dim + 1];
        }
    }
    sum = warp_sum(sum);
    const float norm = sum > 0.f ? 1.f / sum : 0.f;
    const size_t row = task.first_query + at.query;
    if (column < head_dim)
        *reinterpret_cast<uint32_t*>(to.out + row * shape.out_stride + at.head * head_dim + column) = pack_bf16(even * norm, odd * norm);
    if (to.lse && threadIdx.x == 0) to.lse[row * shape.heads + at.head] = sum > 0.f ? largest + logf(sum) : -INFINITY;
}
