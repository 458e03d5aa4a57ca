// Query-aware scores: out[h, i] = mean over the query rows and the heads of group h of q · k[i, h] / sqrt(head_dim).
//
// The mean is taken of the queries first (the product is linear), so the keys are read once.
//   query_mean    mean [kv_heads, head_dim] f32, scaled by 1/sqrt(head_dim); q rows of `stride` elements, bf16. One block a KV head.
//   query_scores  out [kv_heads, stride] f32; k [rows, kv_heads * head_dim] bf16. One warp a row and head: grid.y is the head.
#include <device.cuh>

extern "C" __global__ void query_mean(const bf16* q, int queries, int stride, int group, int head_dim, float* mean) {
    const int head = blockIdx.x;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float sum = 0.f;
        for (int i = 0; i < queries; ++i)
            for (int g = 0; g < group; ++g) sum += to_float(q[size_t(i) * stride + (head * group + g) * head_dim + d]);
        mean[head * head_dim + d] = sum / (float(queries * group) * sqrtf(float(head_dim)));
    }
}

extern "C" __global__ void query_scores(const float* mean, const bf16* k, int rows, int kv_heads, int head_dim, int stride, float* out) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32, head = blockIdx.y;
    if (row >= rows) return;
    const bf16* key = k + (size_t(row) * kv_heads + head) * head_dim;
    float sum = 0.f;
    for (int d = lane; d < head_dim; d += 32) sum += mean[head * head_dim + d] * to_float(key[d]);
    sum = warp_sum(sum);
    if (lane == 0) out[size_t(head) * stride + row] = sum;
}
