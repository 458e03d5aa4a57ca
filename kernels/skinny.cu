// Products of a few rows with a weight matrix, as decodes need them: bound by the bandwidth of the weights.
//
//   skinny         out[i, j] = x[i] · w[j] (+ bias[j]) (+ out[i, j])          bf16
//   skinny_f32     out[i, j] = x[i] · w[j]                                     f32 (logits)
//   skinny_swiglu  out[i, j] = silu(x[i] · w[j]) * (x[i] · w[up + j])          bf16
// x [rows, cols], w [rows of out (twice that), cols], out [rows, width]; bf16, sums in f32; cols a multiple of 8; at most 8, 16 or 32 rows by the kernel's name.
// w may be a part of a wider and longer matrix: its rows are `stride` elements apart (a multiple of 8), and those of up begin `up` rows after those of gate.
//
// A block takes two tiles of 16 rows of w, its warps every WARPS-th step of columns each; their sums are added in the order of the warps. A lane copies to
// shared memory what it multiplies itself, so that no lane waits for another; since a sum over columns may take them in any order, the eight columns of a
// 16-byte piece are two products' share of that lane. The first weights are on their way before the kernel that makes x has ended.
// Invariant: a row's result depends neither on the other rows nor on how many there are.
#include <device.cuh>
#include <ptx/mma.cuh>

static constexpr int WARPS = 8;
static constexpr int THREADS = WARPS * 32;
static constexpr int STAGES = 3;
static constexpr int STEP = 64;                            // columns: a line of 128 bytes of every row
static constexpr int PIECES = 8;                           // of a lane in a step: [row of 4][half of the line]
static constexpr int STAGE_BYTES = PIECES * 32 * 16;
static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
static constexpr int SUM_STRIDE = 36;                      // of a row's 32 sums; the fragments' lanes hit all banks

enum class Into { BF16, F32, SWIGLU };

// The rows of w that a lane has a share of: lane / 4 and that plus 8 of both tiles.
template <Into INTO>
struct Weights {
    static constexpr int OUTPUTS = INTO == Into::SWIGLU ? 16 : 32;  // of a block

    const bf16* row[4];  // null beyond the matrix
    const bf16* w;
    int cols;
    uint8_t* slots;      // this lane's

    DEVICE Weights(const bf16* w, int cols, int stride, int width, int up) : w(w), cols(cols) {
        const int lane = threadIdx.x % 32;
        slots = dynamic_shared() + threadIdx.x / 32 * WARP_BYTES + lane * 16;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int within = lane / 4 + r % 2 * 8 + (INTO == Into::SWIGLU ? 0 : r / 2 * 16), j = blockIdx.x * OUTPUTS + within;
            const int first = INTO == Into::SWIGLU ? r / 2 * up : 0;
            row[r] = j < width ? w + size_t(first + j) * stride : nullptr;
        }
    }

    DEVICE void load(int stage, int step) const {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int col = step * STEP + p % 2 * 32 + threadIdx.x % 4 * 8;
            const bool valid = row[p / 2] && col < cols;
            copy_async16(slots + stage * STAGE_BYTES + p * 512, valid ? row[p / 2] + col : w, valid);
        }
    }

    DEVICE Vec8 piece(int stage, int row, int half) const { return *reinterpret_cast<const Vec8*>(slots + stage * STAGE_BYTES + (row * 2 + half) * 512); }
};

// What a lane has of x in a step: row lane / 4 of each tile of eight rows.
template <int TILES>
struct Inputs {
    Vec8 piece[TILES][2];

    DEVICE Inputs(const bf16* x, int rows, int cols, int step) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = n * 8 + threadIdx.x % 32 / 4, col = step * STEP + half * 32 + threadIdx.x % 4 * 8;
                piece[n][half] = row < rows && col < cols ? load8(x + size_t(row) * cols + col) : Vec8{};
            }
        }
    }
};

// A warp's sums: [tile of w][tile of x][fragment].
template <int TILES>
struct Sums {
    float value[2][TILES][4] = {};

    template <Into INTO>
    DEVICE void add(const Weights<INTO>& weights, int stage, const Inputs<TILES>& inputs) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Vec8 upper = weights.piece(stage, 2 * t, half), lower = weights.piece(stage, 2 * t + 1, half);
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    const uint32_t a[4] = {upper.pair[2 * p], lower.pair[2 * p], upper.pair[2 * p + 1], lower.pair[2 * p + 1]};
#pragma unroll
                    for (int n = 0; n < TILES; ++n)
                        multiply_add(value[t][n], a, inputs.piece[n][half].pair[2 * p], inputs.piece[n][half].pair[2 * p + 1]);
                }
            }
        }
    }

    // To the warp's own shared memory, which nobody else uses until the block has met: [row of x][row of w].
    DEVICE void leave(float* to) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    to[(n * 8 + lane % 4 * 2 + i % 2) * SUM_STRIDE + t * 16 + lane / 4 + i / 2 * 8] = value[t][n][i];
    }
};

DEVICE float sum_of_warps(int row, int output) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += reinterpret_cast<const float*>(dynamic_shared() + warp * WARP_BYTES)[row * SUM_STRIDE + output];
    return sum;
}

template <int TILES, Into INTO>
DEVICE void product(const bf16* x, const bf16* w, const bf16* bias, int accumulate, int rows, int cols, int stride, int width, int up, void* out) {
    static_assert(TILES * 8 * SUM_STRIDE * 4 <= WARP_BYTES);
    const int warp = threadIdx.x / 32, steps = (cols + STEP - 1) / STEP, mine = (steps - warp + WARPS - 1) / WARPS;
    const Weights<INTO> weights(w, cols, stride, width, up);
    let_the_next_grid_start();
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < mine) weights.load(i, warp + i * WARPS);
        copy_async_commit();
    }
    wait_for_earlier_grids();
    Sums<TILES> sums;
    Inputs<TILES> ahead(x, rows, cols, warp);
    for (int i = 0, stage = 0, into = STAGES - 1; i < mine; ++i) {
        if (i + STAGES - 1 < mine) weights.load(into, warp + (i + STAGES - 1) * WARPS);
        copy_async_commit();
        const Inputs<TILES> inputs = ahead;
        if (i + 1 < mine) ahead = Inputs<TILES>(x, rows, cols, warp + (i + 1) * WARPS);
        copy_async_wait<STAGES - 1>();
        sums.add(weights, stage, inputs);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        into = into + 1 == STAGES ? 0 : into + 1;
    }
    copy_async_wait<0>();
    sync_warp();  // every lane is done with its pieces
    sums.leave(reinterpret_cast<float*>(dynamic_shared() + warp * WARP_BYTES));
    __syncthreads();

    constexpr int OUTPUTS = Weights<INTO>::OUTPUTS;
    for (int i = threadIdx.x; i < rows * OUTPUTS; i += THREADS) {
        const int row = i / OUTPUTS, output = i % OUTPUTS, j = blockIdx.x * OUTPUTS + output;
        if (j >= width) continue;
        const size_t at = size_t(row) * width + j;
        float sum = sum_of_warps(row, output);
        if constexpr (INTO == Into::F32) {
            static_cast<float*>(out)[at] = sum;
            continue;
        }
        bf16* to = static_cast<bf16*>(out) + at;
        if constexpr (INTO == Into::SWIGLU) {
            *to = to_bf16(silu(sum) * sum_of_warps(row, output + 16));
            continue;
        }
        if (bias) sum += to_float(bias[j]);
        if (accumulate) sum += to_float(*to);
        *to = to_bf16(sum);
    }
}

#define KERNEL(NAME, TILES, INTO)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                             \
        NAME(const bf16* x, const bf16* w, const bf16* bias, int accumulate, int rows, int cols, int stride, int width, int up, void* out) { \
        product<TILES, INTO>(x, w, bias, accumulate, rows, cols, stride, width, up, out);                                                \
    }

KERNEL(skinny_8, 1, Into::BF16)
KERNEL(skinny_16, 2, Into::BF16)
KERNEL(skinny_32, 4, Into::BF16)
KERNEL(skinny_f32_8, 1, Into::F32)
KERNEL(skinny_f32_16, 2, Into::F32)
KERNEL(skinny_f32_32, 4, Into::F32)
KERNEL(skinny_swiglu_8, 1, Into::SWIGLU)
KERNEL(skinny_swiglu_16, 2, Into::SWIGLU)
KERNEL(skinny_swiglu_32, 4, Into::SWIGLU)
