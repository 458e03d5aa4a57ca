// Sum of stacked partial results into the residual: x[i] += partials[0, i] + partials[1, i] + …, summed in f32, in their order.
//
// partials [count, elements] f32, x [elements] bf16; elements a multiple of 8. A thread takes eight elements.
#include <device.cuh>

// Two 16-byte accesses.
struct alignas(16) Eight {
    float value[8];
};

extern "C" __global__ void add_partials(int count, int elements, const float* partials, bf16* x) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    if (at >= elements) return;
    float sum[8] = {}, value[8];
    for (int p = 0; p < count; ++p) {
        const Eight part = *reinterpret_cast<const Eight*>(partials + size_t(p) * elements + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += part.value[i];
    }
    unpack(load8(x + at), value);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += sum[i];
    store8(x + at, pack(value));
}
