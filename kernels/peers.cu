// Partial results of several devices that become one on each of them: a device writes its own into a mailbox in the memory of every other, takes theirs from
// its own mailbox as they come, and combines all in the order of the ranks. So every device has the same, bit for bit.
//
// Data goes in lines of 16 bytes: eight of data, and after each four of them the number of the turn. A line has come when both numbers are those of the turn;
// nothing else has to be said, and nothing has to be in order. A mailbox has room for two turns: a device that begins one has had all of the turn before
// from all others, which so have ended the one before that. Whoever waits for a line has written its own before, and so has everybody with a lower index:
// blocks that are started in their order never wait in a circle.
// Invariant: a wait ends when the host writes `ended`, whatever the other devices do; what is there then is no result.
#include <merged.cuh>

static constexpr int MOST_RANKS = 8;
static constexpr int TURNS_A_LOOK = 64;  // a look at the host's memory takes as long as many at the device's own

struct Peers {
    Line* mailboxes[MOST_RANKS];
    uint64_t slot_lines;  // of a rank in a turn
    const uint32_t* ended;
    uint32_t turn;
    int rank, ranks;

    // Where in the mailbox of `whose` lies what `of` writes in this turn.
    DEVICE Line* slot(int whose, int of) const { return mailboxes[whose] + (size_t(turn % 2) * ranks + of) * slot_lines; }

    DEVICE void post(size_t line, uint32_t first, uint32_t second) const {
        for (int step = 1; step < ranks; ++step) {
            const int peer = rank + step < ranks ? rank + step : rank + step - ranks;
            store_line(slot(peer, rank) + line, first, second, turn);
        }
    }
};

// One line of every rank: this rank's as it is given, the others' as they come. All are asked for before the first is looked at.
struct Lines {
    uint32_t first[MOST_RANKS], second[MOST_RANKS];

    DEVICE Lines(const Peers& peers, size_t line, uint32_t own_first, uint32_t own_second) {
        for (int look = 1;; ++look) {
            bool all_have_come = true;
#pragma unroll
            for (int r = 0; r < MOST_RANKS; ++r) {
                if (r >= peers.ranks || r == peers.rank) continue;
                all_have_come &= load_line(peers.slot(peers.rank, r) + line, peers.turn, first[r], second[r]);
            }
            if (all_have_come || (look % TURNS_A_LOOK == 0 && load_volatile(peers.ended) != 0)) break;
            pause();
        }
#pragma unroll
        for (int r = 0; r < MOST_RANKS; ++r) {
            if (r == peers.rank) first[r] = own_first, second[r] = own_second;
        }
    }
};

// x[i] += own sums of rank 0 [i] + those of rank 1 [i] + …, in f32; sums [elements] f32, x [elements] bf16. A thread takes two elements, which are a line.
extern "C" __global__ void add_from_peers(const __grid_constant__ Peers peers, int elements, const float* sums, bf16* x) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    if (at >= elements) return;
    const uint32_t own[2] = {float_to_bits(sums[at]), float_to_bits(sums[at + 1])};
    peers.post(at / 2, own[0], own[1]);
    uint32_t* to = reinterpret_cast<uint32_t*>(x + at);
    const uint32_t before = *to;
    const Lines lines(peers, at / 2, own[0], own[1]);
    float first = 0.f, second = 0.f;
#pragma unroll
    for (int r = 0; r < MOST_RANKS; ++r) {
        if (r >= peers.ranks) continue;
        first += bits_to_float(lines.first[r]);
        second += bits_to_float(lines.second[r]);
    }
    *to = pack_bf16(low(before) + first, high(before) + second);
}

// Partial attention results of all ranks, merged (merged.cuh): parts [rows, heads * head_dim] bf16 and lse [rows, heads] f32 (natural log) are this rank's,
// out [rows, heads * head_dim]. A thread takes four elements, which are a line; log-sum-exps go in lines behind them, each by the first thread of its head.
extern "C" __global__ void merge_from_peers(const __grid_constant__ Peers peers, int rows, int heads, int head_dim, const bf16* parts, const float* lse, bf16* out) {
    const int width = heads * head_dim, line = blockIdx.x * blockDim.x + threadIdx.x, at = line * 4;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    if (at >= rows * width) return;
    const int head = at / head_dim, lse_line = rows * width / 4 + head;  // of all heads of all rows
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(parts + at);
    const uint32_t own[2] = {pairs[0], pairs[1]}, own_lse = float_to_bits(lse[head]);
    if (at % head_dim == 0) peers.post(lse_line, own_lse, 0);
    peers.post(line, own[0], own[1]);
    const Lines log_sums(peers, lse_line, own_lse, 0), lines(peers, line, own[0], own[1]);
    float largest = -INFINITY;
#pragma unroll
    for (int r = 0; r < MOST_RANKS; ++r)
        if (r < peers.ranks) largest = fmaxf(largest, bits_to_float(log_sums.first[r]));
    Merged<4> merged(largest);
#pragma unroll
    for (int r = 0; r < MOST_RANKS; ++r) {
        if (r >= peers.ranks) continue;
        const float part[4] = {low(lines.first[r]), high(lines.first[r]), low(lines.second[r]), high(lines.second[r])};
        merged.add(bits_to_float(log_sums.first[r]), part);
    }
    merged.normalise();
    uint32_t* to = reinterpret_cast<uint32_t*>(out + at);
    to[0] = pack_bf16(merged.value[0], merged.value[1]);
    to[1] = pack_bf16(merged.value[2], merged.value[3]);
}

// Columns of all ranks side by side (join_columns.cu): part [rows, width] f32 is this rank's, out [rows, cols]. A thread takes two elements of a part, which are
// a line.
extern "C" __global__ void join_from_peers(const __grid_constant__ Peers peers, int rows, int cols, int width, const float* part, float* out) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 2, elements = rows * width;
    let_the_next_grid_start();
    wait_for_earlier_grids();
    if (at >= elements) return;
    const bool has_second = at + 1 < elements;
    const uint32_t own[2] = {float_to_bits(part[at]), has_second ? float_to_bits(part[at + 1]) : 0};
    peers.post(at / 2, own[0], own[1]);
    const Lines lines(peers, at / 2, own[0], own[1]);
#pragma unroll
    for (int r = 0; r < MOST_RANKS; ++r) {
        if (r >= peers.ranks) continue;
        const int first = min(r * width, cols - width);
        const auto put = [&](int element, uint32_t bits) {
            const int row = element / width, col = first + element % width;
            // What an earlier rank has too is that one's.
            if (col >= r * width) out[size_t(row) * cols + col] = bits_to_float(bits);
        };
        put(at, lines.first[r]);
        if (has_second) put(at + 1, lines.second[r]);
    }
}
