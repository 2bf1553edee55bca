#include "route.h"

#include <algorithm>

#include "device_vectors.cuh"
#include "far_keys.cuh"
#include "launch.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCellsPerBlock = 8 * kWarps;
constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / 32;

__device__ const char* query_row(
        const RouteParams& p,
        const BatchItem& item,
        int token,
        int head) {
    return static_cast<const char*>(p.queries) +
            (int64_t(item.first_token + token) * p.heads_q + head) * p.d * 2;
}

/// Whether a token reads its far keys without a choice.
__device__ bool reads_all(
        const RouteParams& p,
        int64_t length,
        const BatchItem& item,
        int token) {
    return reach_of(length, item.q_len, token, p.sink, p.window).far_keys() <=
            p.dense_below;
}

/// The queries of a token for query heads first .. first + n - 1 of the list's
/// group, `stride` floats apart and padded with zeros; by a whole block.
__device__ void load_queries(
        const RouteParams& p,
        const BatchItem& item,
        int64_t length,
        const ListState& list,
        RowInput input,
        int token,
        int first,
        int n,
        int stride,
        float* x) {
    const int group = p.heads_q / p.heads_kv;
    const int64_t position = length - item.q_len + token + p.position_offset;
    const int half = p.d / 2;
    for (int i = threadIdx.x; i < n * half; i += blockDim.x) {
        const int g = i / half;
        load_vector(
                list.rotary,
                p.d,
                position,
                input == RowInput::pre_rope,
                query_row(p, item, token, list.kv_head * group + first + g),
                item.kv.bf16,
                i % half,
                half,
                x + g * stride);
    }
    const int padding = stride - p.d;
    for (int i = threadIdx.x; i < n * padding; i += blockDim.x) {
        x[i / padding * stride + p.d + i % padding] = 0;
    }
}

/// y = W x + bias for one layer, a warp for eight rows.
__device__ void dense(
        const DeviceAssigner& a,
        int layer,
        int network,
        int padded_cols,
        const float* x,
        const float* add,
        bool relu,
        float* y) {
    const size_t bytes = size_t(padded_cols) * (a.bf16 ? 2 : 4);
    const char* w = static_cast<const char*>(a.layer[layer]) +
            size_t(network) * a.width * bytes;
    const float* bias = a.layer_bias[layer] + size_t(network) * a.width;
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32 * 8; r < a.width; r += 8 * kWarps) {
        const int mine = r + lane / 4;
        const float s = warp_products_of_weights<1>(
                mine < a.width ? w + mine * bytes : nullptr,
                a.bf16,
                padded_cols,
                x,
                0);
        if (lane % 4 == 0 && mine < a.width) {
            const float sum = s + bias[mine] + (add ? add[mine] : 0.0f);
            y[mine] = relu ? fmaxf(sum, 0.0f) : sum;
        }
    }
    __syncthreads();
}

/// Brings the layers of a network nearer.
__device__ void prefetch_layers(const DeviceAssigner& a, int g) {
    if (a.input != RowInput::hidden) {
        return;
    }
    for (int l = 0; l < 1 + 2 * a.depth; l++) {
        const int network = l == 0 || a.networks > 1 ? g : 0;
        const int bytes = a.width * (l ? a.padded_width : a.padded_d) *
                (a.bf16 ? 2 : 4);
        const char* layer =
                static_cast<const char*>(a.layer[l]) + int64_t(network) * bytes;
        for (int i = 128 * threadIdx.x; i < bytes; i += 128 * kThreads) {
            prefetch(layer + i);
        }
    }
}

/// The hidden layers of one network for one query: a block each.
__global__ void __launch_bounds__(kThreads) run_networks(RouteParams p) {
    let_next_begin();
    const BatchList at = p.lists[blockIdx.y];
    prefetch_layers(at.list->query, blockIdx.x % (p.heads_q / p.heads_kv));
    wait_for_previous();
    const BatchItem& item = p.items[at.item];
    const int group = p.heads_q / p.heads_kv;
    const int token = blockIdx.x / group, g = blockIdx.x % group;
    if (token >= item.q_len) {
        return;
    }
    const ListState& list = *at.list;
    const DeviceAssigner& a = list.query;
    const int64_t length = at.sequence->length;
    if (a.input != RowInput::hidden || reads_all(p, length, item, token)) {
        return;
    }
    extern __shared__ __align__(16) float shared[];
    float* h = shared;
    float* other = shared + max(a.padded_width, a.padded_d);
    load_queries(
            p,
            item,
            length,
            list,
            RowInput::pre_rope,
            token,
            g,
            1,
            a.padded_d,
            other);
    for (int j = a.width + threadIdx.x; j < a.padded_width; j += kThreads) {
        h[j] = 0;
    }
    __syncthreads();
    dense(a, 0, g, a.padded_d, other, nullptr, false, h);
    for (int j = a.width + threadIdx.x; j < a.padded_width; j += kThreads) {
        other[j] = 0;
    }
    const int network = a.networks > 1 ? g : 0;
    for (int b = 0; b < a.depth; b++) {
        dense(a, 1 + 2 * b, network, a.padded_width, h, nullptr, true, other);
        // Row r of the sum reads row r of h alone, and its thread writes it.
        dense(a, 2 + 2 * b, network, a.padded_width, other, h, false, h);
    }
    float* out = p.hidden + at.hidden +
            (int64_t(token) * group + g) * a.padded_width;
    for (int j = threadIdx.x; j < a.padded_width; j += kThreads) {
        out[j] = h[j];
    }
}

/// log of the mean of exp(scale * q.k) over a cell, its newest key taken as it
/// is and the others at their mean (BlendAssigner.h).
__device__ float newest_feature(float scale, float n, float mean, float newest) {
    if (n <= 1) {
        return newest;
    }
    const float x = scale * newest;
    const float y = scale * (n * mean - newest) / (n - 1) + logf(n - 1);
    return (fmaxf(x, y) + log1pf(expf(-fabsf(x - y))) - logf(n)) / scale;
}

/// Scores of a tile of cells for the query heads of a group: a warp for eight
/// cells, whose rows it reads once for four heads.
__global__ void __launch_bounds__(kThreads) score_cells(RouteParams p) {
    let_next_begin();
    const BatchList at = p.lists[blockIdx.y];
    for (int n = 0; n < at.list->query.networks; n++) {
        prefetch_rows(
                at.list->query, n, int(blockIdx.x) * kCellsPerBlock, kCellsPerBlock);
    }
    wait_for_previous();
    const BatchItem& item = p.items[at.item];
    const int token = blockIdx.z;
    const ListState& list = *at.list;
    if (token >= item.q_len || int(blockIdx.x) * kCellsPerBlock >= list.ncell) {
        return;
    }
    const int64_t length = at.sequence->length;
    if (reads_all(p, length, item, token)) {
        return;
    }
    const DeviceAssigner& a = list.query;
    const int group = p.heads_q / p.heads_kv;
    extern __shared__ __align__(16) float shared[];
    const int cols = a.padded_cols;
    // Vectors are multiplied four at a time, of which the last may be none.
    const int padded_group = (group + 3) / 4 * 4;
    float* linear = shared;                     // padded_group * cols
    float* post = shared + padded_group * cols; // padded_group * d
    const int lane = threadIdx.x % 32;
    const int cell = int(blockIdx.x) * kCellsPerBlock +
            static_cast<int>(threadIdx.x) / 4; // eight for each warp
    const bool there = cell < list.ncell;
    const int count = there ? list.count[cell] : 0;
    const size_t row_bytes = size_t(cols) * (a.bf16 ? 2 : 4);
    if (a.input == RowInput::hidden) {
        const float* h = p.hidden + at.hidden + int64_t(token) * group * cols;
        for (int j = threadIdx.x; j < group * cols; j += kThreads) {
            linear[j] = h[j];
        }
    } else if (a.input != RowInput::none) {
        load_queries(
                p, item, length, list, a.input, token, 0, group, cols, linear);
    }
    if (a.blend) {
        load_queries(
                p,
                item,
                length,
                list,
                RowInput::post_rope,
                token,
                0,
                group,
                p.d,
                post);
    }
    __syncthreads();
    const int32_t newest_slot =
            a.reads_newest && count ? list.newest[cell] : 0;
    float* scores = p.scores + at.scores + int64_t(token) * group * list.ncell;
    const bool per_head = a.networks > 1;
    for (int g0 = 0; g0 < group; g0 += per_head ? 1 : 4) {
        const int nx = per_head ? 1 : min(4, group - g0);
        const int g = g0 + lane % 4;
        float score = 0;
        if (a.input != RowInput::none) {
            const int network = per_head ? g0 : 0;
            const int64_t r = int64_t(network) * list.ncell + cell;
            const char* row = there
                    ? static_cast<const char*>(a.rows) + r * row_bytes
                    : nullptr;
            const float* x = linear + g0 * cols;
            score = nx == 1
                    ? warp_products_of_weights<1>(row, a.bf16, cols, x, cols)
                    : warp_products_of_weights<4>(row, a.bf16, cols, x, cols);
            score += a.bias && there ? a.bias[r] : 0.0f;
        }
        if (a.blend) {
            const float* q = post + g0 * p.d;
            const float mean = warp_products<RowType::float32, 4>(
                    there ? list.means + int64_t(cell) * p.d : nullptr, p.d, q, p.d);
            float newest = 0;
            if (a.reads_newest) {
                const char* key =
                        count ? key_row(item.kv, list.kv_head, newest_slot) : nullptr;
                newest = item.kv.bf16
                        ? warp_products<RowType::bfloat16, 4>(key, p.d, q, p.d)
                        : warp_products<RowType::float16, 4>(key, p.d, q, p.d);
            }
            if (lane % 4 < nx && there) {
                const float* w = a.blend + 5 * g;
                score = w[0] * score + w[1] * mean;
                if (a.reads_newest) {
                    const auto n = static_cast<float>(count);
                    const int64_t query = length - item.q_len + token;
                    const float age = -log1pf(static_cast<float>(
                            max(int64_t(0), query - newest_slot)));
                    score += w[2] * newest_feature(a.scale, n, mean, newest) +
                            w[3] * age + w[4] * (count ? logf(n) : 0.0f);
                }
                score = count ? score : -INFINITY;
            }
        }
        if (lane % 4 < nx && there) {
            if (!(score < INFINITY)) {
                raise(p.flag, Fault::route_query, item.first_token + token);
            }
            scores[int64_t(g) * list.ncell + cell] = score;
        }
    }
}

// --- Selection ---------------------------------------------------------------

/// log of the sum over all cells of count * exp(scale * score), for each head of
/// a group, into `norm`; -inf for none. By a block, each head by some of its
/// warps; `scratch` has room for two values
/// of each warp or head.
__device__ void find_norms(
        const float* scores,
        const int32_t* counts,
        int ncell,
        int heads,
        float scale,
        float* scratch,
        float* norm) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int each = max(1, kSelectWarps / heads);
    const int part = warp % each;
    for (int g = warp / each; g < heads; g += kSelectWarps / each) {
        const float* s = scores + int64_t(g) * ncell;
        const int first = part * 32 + lane, step = 32 * each;
        float largest = -INFINITY;
#pragma unroll 4
        for (int c = first; c < ncell; c += step) {
            const float x = scale * s[c];
            largest = counts[c] ? fmaxf(largest, x) : largest;
        }
        for (int i = 16; i; i /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, i));
        }
        float sum = 0;
        if (largest > -INFINITY) {
#pragma unroll 4
            for (int c = first; c < ncell; c += step) {
                const float n = counts[c];
                sum += n > 0 ? n * __expf(scale * s[c] - largest) : 0.0f;
            }
        }
        for (int i = 16; i; i /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, i);
        }
        if (lane == 0) {
            scratch[2 * (g * each + part)] = largest;
            scratch[2 * (g * each + part) + 1] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < heads) {
        const float* parts = scratch + 2 * each * threadIdx.x;
        float most = -INFINITY, all = 0;
        for (int i = 0; i < each; i++) {
            most = fmaxf(most, parts[2 * i]);
        }
        for (int i = 0; i < each; i++) {
            all += parts[2 * i] > -INFINITY
                    ? parts[2 * i + 1] * __expf(parts[2 * i] - most)
                    : 0.0f;
        }
        norm[threadIdx.x] = most + __logf(all);
    }
    __syncthreads();
}

/// The largest value of a block's threads.
__device__ unsigned long long block_max(
        unsigned long long x,
        unsigned long long* scratch) {
    for (int step = 16; step; step /= 2) {
        x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = scratch[0];
    for (int w = 1; w < kSelectWarps; w++) {
        x = max(x, scratch[w]);
    }
    return x;
}

/// Sorts n = 2^k keys, largest first.
__device__ void sort_descending(unsigned long long* keys, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int stride = size / 2; stride; stride /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += kSelectThreads) {
                const int low = 2 * i - (i & (stride - 1));
                const int high = low + stride;
                const bool descending = (low & size) == 0;
                const auto a = keys[low], b = keys[high];
                if ((a < b) == descending) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

/// Keys and cells, counted together.
struct Tally {
    uint64_t packed; ///< cells, of which there are at most kMaxCells, below keys

    static constexpr int kCellBits = 14;
    static_assert(kMaxCells < 1 << kCellBits);

    __device__ static Tally of(int keys, int cells) {
        return {static_cast<uint64_t>(keys) << kCellBits | cells};
    }
    __device__ int keys() const {
        return static_cast<int>(packed >> kCellBits);
    }
    __device__ int cells() const {
        return static_cast<int>(packed & ((1 << kCellBits) - 1));
    }
};

/// Sums of the threads before this one in a block, and of all.
struct BlockScan {
    Tally before, total;
};

/// `scratch` has room for a value of each warp; free again after the next barrier.
__device__ BlockScan block_scan(Tally x, uint64_t* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto scan = [&](uint64_t end, int n) {
        for (int step = 1; step < n; step *= 2) {
            const uint64_t y = __shfl_up_sync(0xffffffffu, end, step);
            end += lane >= step ? y : 0;
        }
        return end;
    };
    const uint64_t end = scan(x.packed, 32);
    if (lane == 31) {
        scratch[warp] = end;
    }
    __syncthreads();
    const uint64_t warps = scan(lane < kSelectWarps ? scratch[lane] : 0, kSelectWarps);
    const uint64_t before = __shfl_sync(0xffffffffu, warps, max(0, warp - 1));
    return {{end - x.packed + (warp ? before : 0)},
            {__shfl_sync(0xffffffffu, warps, kSelectWarps - 1)}};
}

/// What take_cells keeps in shared memory.
struct TakeCells {
    static constexpr int kBits = 10;
    static constexpr int kBins = 1 << kBits;
    static constexpr int kRanked = 256; ///< cells put in order without a sort
    unsigned long long scratch[kSelectWarps];
    unsigned long long ranked[kRanked];
    uint32_t taken[kMaxCells / 32]; ///< a bit per cell
    int keys_of[kBins], cells_of[kBins];
    uint64_t sums[kSelectWarps];
    int ntaken, crossing, keys_above, cells_above;
};

/// Where, from the largest down, the bins' keys exceed `limit` or their cells
/// `nprobe`; t.crossing stays -1 if nowhere.
__device__ void find_crossing(TakeCells& t, int limit, int nprobe) {
    constexpr int kEach = TakeCells::kBins / kSelectThreads;
    const int high = TakeCells::kBins - 1 - kEach * static_cast<int>(threadIdx.x);
    int keys = 0, cells = 0;
    for (int i = 0; i < kEach; i++) {
        keys += t.keys_of[high - i];
        cells += t.cells_of[high - i];
    }
    const Tally before = block_scan(Tally::of(keys, cells), t.sums).before;
    int keys_above = before.keys(), cells_above = before.cells();
    const auto crosses = [&](int keys, int cells) {
        return keys > limit || cells > nprobe;
    };
    if (crosses(keys_above, cells_above) ||
        !crosses(keys_above + keys, cells_above + cells)) {
        return;
    }
    int i = 0;
    while (!crosses(
            keys_above + t.keys_of[high - i], cells_above + t.cells_of[high - i])) {
        keys_above += t.keys_of[high - i];
        cells_above += t.cells_of[high - i];
        i++;
    }
    t.crossing = high - i;
    t.keys_above = keys_above;
    t.cells_above = cells_above;
}

/// take_cells (ProbePolicy.h), by a block. keys[i] is the score of cell i above
/// ~i, 0 for a cell that is never taken; n is a power of two. Most cells are found
/// by a radix search for the score at which a limit is crossed, the few beyond it
/// that still fit one by one. Changes the keys.
/// @return how many cells were written to `out`, best first
__device__ int take_cells(
        TakeCells& t,
        unsigned long long* keys,
        int n,
        const int32_t* counts,
        int nprobe,
        int limit,
        bool at_least_one,
        int32_t first_cell,
        int32_t* out) {
    const auto cell_of = [](unsigned long long key) {
        return static_cast<int32_t>(~static_cast<uint32_t>(key));
    };
    const auto is_taken = [&](int32_t cell) {
        return t.taken[cell / 32] >> (cell % 32) & 1;
    };
    unsigned long long most = 0, least_inverted = 0;
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
        if (keys[i]) {
            most = max(most, keys[i]);
            least_inverted = max(least_inverted, ~keys[i]);
        }
    }
    for (int i = threadIdx.x; i < kMaxCells / 32; i += kSelectThreads) {
        t.taken[i] = 0;
    }
    if (threadIdx.x == 0) {
        t.ntaken = 0;
    }
    most = block_max(most, t.scratch);
    const auto least = static_cast<uint32_t>(
            ~block_max(least_inverted, t.scratch) >> 32);
    if (most == 0) {
        return 0;
    }
    // The class holds the scores whose bits from `low` on are `prefix`. Bits that
    // all scores share are no use to the search.
    int low = 32 - __clz(static_cast<int>(static_cast<uint32_t>(most >> 32) ^ least));
    uint64_t prefix = most >> 32 >> low;
    bool all = false;
    int in_class = 0;
    do {
        const int shift = max(0, low - TakeCells::kBits);
        for (int i = threadIdx.x; i < TakeCells::kBins; i += kSelectThreads) {
            t.keys_of[i] = t.cells_of[i] = 0;
        }
        if (threadIdx.x == 0) {
            t.crossing = -1;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += kSelectThreads) {
            const uint64_t score = keys[i] >> 32;
            if (keys[i] && score >> low == prefix) {
                const auto bin = static_cast<int>(
                        (score >> shift) - (prefix << (low - shift)));
                atomicAdd(&t.keys_of[bin], counts[i]);
                atomicAdd(&t.cells_of[bin], 1);
            }
        }
        __syncthreads();
        find_crossing(t, limit, nprobe);
        __syncthreads();
        const int crossing = t.crossing;
        if (crossing < 0) { // in the first round alone
            all = true;
            break;
        }
        in_class = t.cells_of[crossing];
        limit -= t.keys_above;
        nprobe -= t.cells_above;
        prefix = (prefix << (low - shift)) + crossing;
        low = shift;
        __syncthreads(); // before the next round clears what was read
    } while (low > 0 && in_class > 1);
    const auto take = [&](unsigned long long key) {
        const int32_t cell = cell_of(key);
        atomicOr(&t.taken[cell / 32], 1u << (cell % 32));
        const int at = atomicAdd(&t.ntaken, 1);
        if (at < TakeCells::kRanked) {
            t.ranked[at] = key;
        }
    };
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
        if (keys[i] && (all || keys[i] >> 32 >> low > prefix)) {
            take(keys[i]);
        }
    }
    __syncthreads();
    while (!all && nprobe > 0) {
        const bool must = at_least_one && t.ntaken == 0;
        unsigned long long best = 0;
        for (int i = threadIdx.x; i < n; i += kSelectThreads) {
            if (keys[i] && (must || counts[i] <= limit) && !is_taken(i)) {
                best = max(best, keys[i]);
            }
        }
        best = block_max(best, t.scratch);
        if (best == 0) {
            break;
        }
        limit -= counts[cell_of(best)];
        nprobe--;
        if (threadIdx.x == 0) {
            take(best);
        }
        __syncthreads();
    }
    const int ntaken = t.ntaken;
    if (ntaken <= TakeCells::kRanked) {
        // A warp for each cell counts those before it.
        for (int i = threadIdx.x / 32; i < ntaken; i += kSelectWarps) {
            int rank = 0;
            for (int j = threadIdx.x % 32; j < ntaken; j += 32) {
                rank += t.ranked[j] > t.ranked[i];
            }
            for (int step = 16; step; step /= 2) {
                rank += __shfl_xor_sync(0xffffffffu, rank, step);
            }
            out[rank] = first_cell + cell_of(t.ranked[i]);
        }
    } else {
        for (int i = threadIdx.x; i < n; i += kSelectThreads) {
            keys[i] = keys[i] && is_taken(i) ? keys[i] : 0;
        }
        sort_descending(keys, n);
        for (int i = threadIdx.x; i < ntaken; i += kSelectThreads) {
            out[i] = first_cell + cell_of(keys[i]);
        }
    }
    return ntaken;
}

/// A block takes the cells of one row: of a token and a KV head, or of one
/// query head of it.
__global__ void __launch_bounds__(kSelectThreads) select_cells(RouteParams p) {
    let_next_begin();
    const BatchRow row = p.rows[blockIdx.x];
    const BatchItem& item = p.items[row.item];
    wait_for_previous();
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int64_t r = int64_t(blockIdx.x) * choices + blockIdx.y;
    int32_t* out = p.cells + r * p.stride;
    const int64_t length = row.sequence->length;
    const Reach reach =
            reach_of(length, item.q_len, row.token, p.sink, p.window);
    const int64_t far = reach.far_keys();
    extern __shared__ __align__(16) unsigned long long keys[];
    __shared__ float scratch[2 * (kSelectWarps > kMaxGroup ? kSelectWarps : kMaxGroup)];
    __shared__ float norm[kMaxGroup];
    __shared__ TakeCells taking;
    RowPlan plan;
    const bool plans = p.work.plans;
    if (plans && threadIdx.x == 0) {
        plan = plan_dense(
                reach, length, item.kv.length, p.attend_dense, row.item, p.flag);
    }
    const bool shares_keys = plans && row.nlist > 1;
    uint32_t* probed = p.work.probed + r * p.work.probed_words;
    for (int64_t i = threadIdx.x; shares_keys && i < p.work.probed_words;
         i += kSelectThreads) {
        probed[i] = 0;
    }
    int taken = 0, taken_keys = 0;
    for (int i = 0; i < row.nlist && far > 0; i++) {
        const BatchList& at = p.lists[row.first_list + i];
        const ListState& list = row.lists[i];
        const int n = list.ncell;
        int padded = 32;
        while (padded < n) {
            padded *= 2;
        }
        auto* counts = reinterpret_cast<int32_t*>(keys + padded);
        __syncthreads(); // the partition before is done with both
        far_counts(list, length, reach, p.sink, p.window, counts);
        const bool all = far <= p.dense_below;
        const double share = p.nsplit ? p.split[i] : 1.0 / row.nlist;
        if (all ? i > 0 : share == 0) {
            continue;
        }
        const float* scores = p.scores + at.scores +
                int64_t(row.token) * group * n +
                (p.share_group ? 0 : int64_t(blockIdx.y) * n);
        // log of the mass per key, of which the group's heads are summed.
        if (p.share_group && !all) {
            find_norms(scores, counts, n, group, p.scale, scratch, norm);
        }
        for (int c = threadIdx.x; c < padded; c += kSelectThreads) {
            float score = -INFINITY;
            if (c < n && counts[c]) {
                if (all) {
                    score = 0;
                } else if (!p.share_group) {
                    score = scores[c];
                } else {
                    const auto of_head = [&](int g) {
                        return p.scale * scores[int64_t(g) * n + c] - norm[g];
                    };
#pragma unroll 4
                    for (int g = 0; g < group; g++) {
                        score = fmaxf(score, of_head(g)); // passes over NaN
                    }
                    float sum = 0;
#pragma unroll 4
                    for (int g = 0; g < group; g++) {
                        const float s = of_head(g);
                        sum += s > -INFINITY ? __expf(s - score) : 0.0f;
                    }
                    score = score > -INFINITY ? score + __logf(sum) : score;
                }
            }
            keys[c] = score > -INFINITY
                    ? static_cast<unsigned long long>(ordered(score)) << 32 |
                            ~static_cast<uint32_t>(c)
                    : 0ull;
        }
        const int64_t limit_of_head = min(
                p.max_keys, static_cast<int64_t>(p.max_selectivity * far));
        const int64_t limit = all || limit_of_head >= far
                ? far
                : static_cast<int64_t>(share * limit_of_head + 1e-9);
        __syncthreads();
        const int here = take_cells(
                taking,
                keys,
                padded,
                counts,
                all ? n : p.nprobe,
                static_cast<int>(limit),
                /*at_least_one=*/taken == 0,
                list.first_cell,
                out + taken);
        __syncthreads();
        for (int first = 0; plans && first < here; first += kSelectThreads) {
            const int k = first + static_cast<int>(threadIdx.x);
            const int cell = k < here ? out[taken + k] : -1;
            const int c = cell - list.first_cell;
            const int count = k < here ? counts[c] : 0;
            const BlockScan scan = block_scan(Tally::of(count, 0), taking.sums);
            if (k < here) {
                const int begin = taken_keys + scan.before.keys();
                p.work.cells[r * p.work.stride + taken + k] = {
                        i, c, begin, begin + count};
                if (shares_keys) {
                    atomicOr(&probed[cell / 32], 1u << (cell % 32));
                }
            }
            taken_keys += scan.total.keys();
            __syncthreads(); // the scan's scratch memory is free
        }
        taken += here;
    }
    if (threadIdx.x == 0) {
        p.count[r] = taken;
        if (plans) {
            const bool readable = length <= item.kv.length;
            plan.cells = readable ? taken : 0;
            plan.keys = readable ? taken_keys : 0;
            p.work.plans[r] = plan;
        }
    }
}

} // namespace

cudaError_t route(const RouteParams& p, bool any_network, cudaStream_t stream) {
    const int group = p.heads_q / p.heads_kv;
    constexpr int kMaxCols = 1024; // widths and dimensions are at most this
    if (p.nlist && p.most_q_len) {
        if (any_network) {
            const cudaError_t error =
                    launch(run_networks,
                           dim3(p.most_q_len * group, p.nlist),
                           kThreads,
                           2 * kMaxCols * sizeof(float),
                           stream,
                           p);
            if (error != cudaSuccess) {
                return error;
            }
        }
        const size_t shared =
                size_t(group + 3) / 4 * 4 * p.most_cols * sizeof(float);
        cudaError_t error = cudaFuncSetAttribute(
                score_cells,
                cudaFuncAttributeMaxDynamicSharedMemorySize,
                static_cast<int>(shared));
        if (error != cudaSuccess) {
            return error;
        }
        error = launch(
                score_cells,
                dim3((p.most_cells + kCellsPerBlock - 1) / kCellsPerBlock,
                     p.nlist,
                     p.most_q_len),
                kThreads,
                shared,
                stream,
                p);
        if (error != cudaSuccess) {
            return error;
        }
    }
    if (p.nrow) {
        int padded = 32;
        while (padded < p.most_cells) {
            padded *= 2;
        }
        const int shared = padded * 8 + p.most_cells * 4;
        const cudaError_t error = cudaFuncSetAttribute(
                select_cells, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) {
            return error;
        }
        return launch(
                select_cells,
                dim3(p.nrow, p.share_group ? 1 : group),
                kSelectThreads,
                shared,
                stream,
                p);
    }
    return cudaSuccess;
}

} // namespace faiss_saap::gpu
