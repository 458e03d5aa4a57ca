// Groups of columns put below each other, or back beside each other: queries, keys and values by head, on their way between ranks.
//
//   dst[g * to_group + i * to_row ..] = src[g * from_group + i * from_row ..]   `width` elements of bf16 for each row i and group g
//
// Strides in elements; all of them and the width multiples of 8. Grid (row and unit of 8 elements, group).
#include <device.cuh>

extern "C" __global__ void move_columns(
    const bf16* src, int from_row, uint64_t from_group, bf16* dst, int to_row, uint64_t to_group, int rows, int width) {
    const size_t unit = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int units = width / 8;
    const size_t row = unit / units, col = unit % units * 8;
    if (row >= rows) return;
    store8(dst + blockIdx.y * to_group + row * to_row + col, load8(src + blockIdx.y * from_group + row * from_row + col));
}
