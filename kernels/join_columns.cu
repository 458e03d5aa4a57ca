// Columns of parts side by side: out[i, c] = parts[p * rows + i, c - first of part p], where p is the first part that has column c.
//
// Every part has `width` columns of `cols`, part p those from min(p * width, cols - width) on. parts [_, width] and out [rows, cols] f32. Grid (block of columns, row).
#include <device.cuh>

extern "C" __global__ void join_columns(int rows, int cols, int width, const float* parts, float* out) {
    const int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    if (col >= cols) return;
    const int part = col / width, first = min(part * width, cols - width);
    out[size_t(row) * cols + col] = parts[(size_t(part) * rows + row) * width + (col - first)];
}
