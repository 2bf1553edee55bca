#include "route.h"

#include <algorithm>

#include "device_vectors.cuh"
#include "far_keys.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;

__device__ const char* query_row(
        const RouteParams& p,
        const BatchItem& item,
        int token,
        int head) {
    return static_cast<const char*>(p.queries) +
            (int64_t(item.first_token + token) * p.heads_q + head) * p.d * 2;
}

__device__ void load_query(
        const RouteParams& p,
        const BatchItem& item,
        const ListState& list,
        RowInput input,
        int token,
        int g,
        int padded,
        float* x) {
    const int group = p.heads_q / p.heads_kv;
    const char* row = query_row(p, item, token, list.kv_head * group + g);
    const int64_t position =
            item.sequence->length - item.q_len + token + p.position_offset;
    const auto read = [&](int k) { return element(row, item.kv.bf16, k); };
    for (int j = threadIdx.x; j < padded; j += blockDim.x) {
        x[j] = j >= p.d                       ? 0.0f
                : input == RowInput::post_rope ? read(j)
                                               : derotated(
                                                         list.rotary,
                                                         p.d,
                                                         position,
                                                         j,
                                                         read);
    }
}

/// y = W x + bias for one layer, a warp for each row.
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
    for (int r = threadIdx.x / 32; r < a.width; r += kWarps) {
        const float s = warp_dot(w + r * bytes, a.bf16, padded_cols, x);
        if (threadIdx.x % 32 == 0) {
            const float sum = s + bias[r] + (add ? add[r] : 0.0f);
            y[r] = relu ? fmaxf(sum, 0.0f) : sum;
        }
    }
    __syncthreads();
}

/// The hidden layers of one network for one query: a block each.
__global__ void __launch_bounds__(kThreads) run_networks(RouteParams p) {
    const BatchList& at = p.lists[blockIdx.y];
    const BatchItem& item = p.items[at.item];
    const int group = p.heads_q / p.heads_kv;
    const int token = blockIdx.x / group, g = blockIdx.x % group;
    if (token >= item.q_len) {
        return;
    }
    const ListState& list = item.sequence->lists[at.list];
    const DeviceAssigner& a = list.query;
    if (a.input != RowInput::hidden) {
        return;
    }
    extern __shared__ __align__(16) float shared[];
    float* h = shared;
    float* other = shared + max(a.padded_width, a.padded_d);
    load_query(p, item, list, RowInput::pre_rope, token, g, a.padded_d, other);
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

/// Inner product of a cache row with x in shared memory, by a warp.
__device__ float warp_dot_key(const char* row, int bf16, int d, const float* x) {
    float sum = 0;
    for (int j = threadIdx.x % 32; row && j < d; j += 32) {
        sum += element(row, bf16, j) * x[j];
    }
    for (int step = 16; step; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    return sum;
}

/// Scores of a tile of cells for the query heads of a group: a warp for each
/// cell, which reads its row once for all heads.
__global__ void __launch_bounds__(kThreads)
        score_cells(RouteParams p, int cells_per_block) {
    const BatchList& at = p.lists[blockIdx.y];
    const BatchItem& item = p.items[at.item];
    const int token = blockIdx.z;
    const ListState& list = item.sequence->lists[at.list];
    const int begin = blockIdx.x * cells_per_block;
    if (token >= item.q_len || begin >= list.ncell) {
        return;
    }
    const int end = min(begin + cells_per_block, list.ncell);
    const DeviceAssigner& a = list.query;
    const int group = p.heads_q / p.heads_kv;
    extern __shared__ __align__(16) float shared[];
    const int cols = a.padded_cols, padded_d = (p.d + 7) / 8 * 8;
    float* linear = shared; // group * cols
    float* post = shared + group * cols;
    for (int g = 0; g < group; g++) {
        if (a.input == RowInput::hidden) {
            const float* h =
                    p.hidden + at.hidden + (int64_t(token) * group + g) * cols;
            for (int j = threadIdx.x; j < cols; j += kThreads) {
                linear[g * cols + j] = h[j];
            }
        } else if (a.input != RowInput::none) {
            load_query(p, item, list, a.input, token, g, cols, linear + g * cols);
        }
        if (a.blend) {
            load_query(
                    p,
                    item,
                    list,
                    RowInput::post_rope,
                    token,
                    g,
                    padded_d,
                    post + g * padded_d);
        }
    }
    __syncthreads();
    const size_t row_bytes = size_t(cols) * (a.bf16 ? 2 : 4);
    float* scores = p.scores + at.scores + int64_t(token) * group * list.ncell;
    for (int c = begin + threadIdx.x / 32; c < end; c += kWarps) {
        const int count = list.count[c];
        const char* newest_key = nullptr;
        float age = 0;
        if (a.reads_newest && count) {
            const int64_t slot = list.newest[c];
            newest_key = key_row(item.kv, list.kv_head, slot);
            const int64_t query = item.sequence->length - item.q_len + token;
            age = -log1pf(static_cast<float>(max(int64_t(0), query - slot)));
        }
        for (int g = 0; g < group; g++) {
            float score = 0;
            if (a.input != RowInput::none) {
                const int network = a.networks > 1 ? g : 0;
                const size_t r = size_t(network) * list.ncell + c;
                score = warp_dot(
                        static_cast<const char*>(a.rows) + r * row_bytes,
                        a.bf16,
                        cols,
                        linear + g * cols);
                score += a.bias ? a.bias[r] : 0.0f;
            }
            if (a.blend) {
                const float* w = a.blend + 5 * g;
                const float* q = post + g * padded_d;
                float mean = 0;
                for (int j = threadIdx.x % 32; j < p.d; j += 32) {
                    mean += list.means[int64_t(c) * p.d + j] * q[j];
                }
                for (int step = 16; step; step /= 2) {
                    mean += __shfl_xor_sync(0xffffffffu, mean, step);
                }
                score = w[0] * score + w[1] * mean;
                if (a.reads_newest) {
                    const auto n = static_cast<float>(count);
                    const float newest = newest_feature(
                            a.scale,
                            n,
                            mean,
                            warp_dot_key(newest_key, item.kv.bf16, p.d, q));
                    score += w[2] * newest + w[3] * age +
                            w[4] * (count ? logf(n) : 0.0f);
                }
                score = count ? score : -INFINITY;
            }
            if (threadIdx.x % 32 == 0) {
                if (!(score < INFINITY)) {
                    raise(p.flag, Fault::route_query, item.first_token + token);
                }
                scores[int64_t(g) * list.ncell + c] = score;
            }
        }
    }
}

// --- Selection ---------------------------------------------------------------

/// Maxima or sums over a block of some values of each thread, at most kMaxGroup.
__device__ void block_reduce(float* x, int n, bool sum, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads(); // the scratch memory is no longer read
    for (int i = 0; i < n; i++) {
        for (int step = 16; step; step /= 2) {
            const float y = __shfl_xor_sync(0xffffffffu, x[i], step);
            x[i] = sum ? x[i] + y : fmaxf(x[i], y);
        }
        if (lane == 0) {
            scratch[i * kSelectWarps + warp] = x[i];
        }
    }
    __syncthreads();
    for (int i = 0; i < n; i++) {
        x[i] = scratch[i * kSelectWarps];
        for (int w = 1; w < kSelectWarps; w++) {
            const float y = scratch[i * kSelectWarps + w];
            x[i] = sum ? x[i] + y : fmaxf(x[i], y);
        }
    }
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

/// What take_cells keeps in shared memory.
struct TakeCells {
    static constexpr int kBins = 256;
    static constexpr int kRanked = 256; ///< cells put in order without a sort
    unsigned long long scratch[kSelectWarps];
    unsigned long long ranked[kRanked];
    uint32_t taken[kMaxCells / 32]; ///< a bit per cell
    int keys_of[kBins], cells_of[kBins];
    int ntaken, crossing, cells_above;
    int64_t keys_above;
};

/// Where, from the largest down, the bins' keys exceed `limit` or their cells
/// `nprobe`; -1: nowhere. By one warp.
__device__ void find_crossing(TakeCells& t, int64_t limit, int nprobe) {
    const int lane = threadIdx.x;
    int64_t keys = 0;
    int cells = 0;
    t.crossing = -1;
    for (int first = 0; first < TakeCells::kBins; first += 32) {
        const int bin = TakeCells::kBins - 1 - first - lane;
        int64_t k = t.keys_of[bin];
        int c = t.cells_of[bin];
        for (int step = 1; step < 32; step *= 2) {
            const int64_t k_before = __shfl_up_sync(0xffffffffu, k, step);
            const int c_before = __shfl_up_sync(0xffffffffu, c, step);
            k += lane >= step ? k_before : 0;
            c += lane >= step ? c_before : 0;
        }
        const bool crosses = keys + k > limit || cells + c > nprobe;
        const unsigned any = __ballot_sync(0xffffffffu, crosses);
        if (any) {
            if (lane == __ffs(static_cast<int>(any)) - 1) {
                t.crossing = bin;
                t.keys_above = keys + k - t.keys_of[bin];
                t.cells_above = cells + c - t.cells_of[bin];
            }
            break;
        }
        keys += __shfl_sync(0xffffffffu, k, 31);
        cells += __shfl_sync(0xffffffffu, c, 31);
        t.keys_above = keys;
        t.cells_above = cells;
    }
}

/// take_cells (ProbePolicy.h), by a block. A key is a score above ~cell, 0 for a
/// cell that is never taken; n is a power of two. Most cells are found by a radix
/// search for the score at which a limit is crossed, the few beyond it that still
/// fit one by one. Changes the keys.
/// @return how many cells were written to `out`, best first
__device__ int take_cells(
        TakeCells& t,
        unsigned long long* keys,
        int n,
        const int32_t* counts,
        int nprobe,
        int64_t limit,
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
    do {
        const int shift = max(0, low - 8);
        for (int i = threadIdx.x; i < TakeCells::kBins; i += kSelectThreads) {
            t.keys_of[i] = t.cells_of[i] = 0;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += kSelectThreads) {
            const uint64_t score = keys[i] >> 32;
            if (keys[i] && score >> low == prefix) {
                const auto bin = static_cast<int>(
                        (score >> shift) - (prefix << (low - shift)));
                atomicAdd(&t.keys_of[bin], counts[cell_of(keys[i])]);
                atomicAdd(&t.cells_of[bin], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            find_crossing(t, limit, nprobe);
        }
        __syncthreads();
        limit -= t.keys_above;
        nprobe -= t.cells_above;
        if (t.crossing < 0) { // in the first round alone
            all = true;
            break;
        }
        prefix = (prefix << (low - shift)) + t.crossing;
        low = shift;
    } while (low > 0 && t.cells_of[t.crossing] > 1);
    __syncthreads();
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
            const int32_t cell = cell_of(keys[i]);
            if (keys[i] && (must || counts[cell] <= limit) && !is_taken(cell)) {
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
        for (int i = threadIdx.x; i < ntaken; i += kSelectThreads) {
            int rank = 0;
            for (int j = 0; j < ntaken; j++) {
                rank += t.ranked[j] > t.ranked[i];
            }
            out[rank] = first_cell + cell_of(t.ranked[i]);
        }
    } else {
        for (int i = threadIdx.x; i < n; i += kSelectThreads) {
            keys[i] = keys[i] && is_taken(cell_of(keys[i])) ? keys[i] : 0;
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
    const BatchRow& row = p.rows[blockIdx.x];
    const BatchItem& item = p.items[row.item];
    const int group = p.heads_q / p.heads_kv;
    const int choices = p.share_group ? 1 : group;
    const int64_t r = int64_t(blockIdx.x) * choices + blockIdx.y;
    int32_t* out = p.cells + r * p.stride;
    const Reach reach = reach_of(item, row.token, p.sink, p.window);
    const int64_t far = reach.far_keys();
    extern __shared__ __align__(16) unsigned long long keys[];
    __shared__ float scratch[kMaxGroup * kSelectWarps];
    __shared__ TakeCells taking;
    int taken = 0;
    for (int i = 0; i < row.nlist && far > 0; i++) {
        const BatchList& at = p.lists[row.first_list + i];
        const ListState& list = item.sequence->lists[at.list];
        const int n = list.ncell;
        int padded = 32;
        while (padded < n) {
            padded *= 2;
        }
        auto* counts = reinterpret_cast<int32_t*>(keys + padded);
        __syncthreads(); // the partition before is done with both
        far_counts(list, item, reach, p.sink, p.window, counts);
        const bool all = far <= p.dense_below;
        const double share = p.nsplit ? p.split[i] : 1.0 / row.nlist;
        if (all ? i > 0 : share == 0) {
            continue;
        }
        const float* scores = p.scores + at.scores +
                int64_t(row.token) * group * n +
                (p.share_group ? 0 : int64_t(blockIdx.y) * n);
        // log of the mass per key, of which the group's heads are summed.
        float largest[kMaxGroup], log_sum[kMaxGroup];
        const int heads = p.share_group && !all ? group : 0;
        for (int g = 0; g < heads; g++) {
            largest[g] = -INFINITY;
            log_sum[g] = 0;
        }
        for (int c = threadIdx.x; c < n; c += kSelectThreads) {
            for (int g = 0; g < heads && counts[c]; g++) {
                largest[g] = fmaxf(largest[g], p.scale * scores[int64_t(g) * n + c]);
            }
        }
        block_reduce(largest, heads, false, scratch);
        for (int c = threadIdx.x; c < n; c += kSelectThreads) {
            for (int g = 0; g < heads && counts[c]; g++) {
                if (largest[g] > -INFINITY) {
                    log_sum[g] += counts[c] *
                            expf(p.scale * scores[int64_t(g) * n + c] - largest[g]);
                }
            }
        }
        block_reduce(log_sum, heads, true, scratch);
        for (int g = 0; g < heads; g++) {
            log_sum[g] = logf(log_sum[g]);
        }
        for (int c = threadIdx.x; c < padded; c += kSelectThreads) {
            float score = -INFINITY;
            if (c < n && counts[c]) {
                if (all) {
                    score = 0;
                } else if (!p.share_group) {
                    score = scores[c];
                } else {
                    for (int g = 0; g < group; g++) {
                        const float s = p.scale * scores[int64_t(g) * n + c] -
                                largest[g] - log_sum[g];
                        if (s > -INFINITY) { // false for NaN too
                            const float larger = fmaxf(score, s);
                            score = larger +
                                    logf(expf(score - larger) + expf(s - larger));
                        }
                    }
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
        taken += take_cells(
                taking,
                keys,
                padded,
                counts,
                all ? n : p.nprobe,
                limit,
                /*at_least_one=*/taken == 0,
                list.first_cell,
                out + taken);
    }
    if (threadIdx.x == 0) {
        p.count[r] = taken;
    }
}

} // namespace

cudaError_t route(const RouteParams& p, bool any_network, cudaStream_t stream) {
    const int group = p.heads_q / p.heads_kv;
    constexpr int kMaxCols = 1024; // widths and dimensions are at most this
    if (p.nlist && p.most_q_len) {
        if (any_network) {
            run_networks<<<
                    dim3(p.most_q_len * group, p.nlist),
                    kThreads,
                    2 * kMaxCols * sizeof(float),
                    stream>>>(p);
        }
        constexpr int kCellsPerBlock = 64;
        const size_t shared = size_t(group) * p.most_cols * sizeof(float);
        cudaError_t error = cudaFuncSetAttribute(
                score_cells,
                cudaFuncAttributeMaxDynamicSharedMemorySize,
                static_cast<int>(shared));
        if (error != cudaSuccess) {
            return error;
        }
        score_cells<<<
                dim3((p.most_cells + kCellsPerBlock - 1) / kCellsPerBlock,
                     p.nlist,
                     p.most_q_len),
                kThreads,
                shared,
                stream>>>(p, kCellsPerBlock);
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
        select_cells<<<
                dim3(p.nrow, p.share_group ? 1 : group),
                kSelectThreads,
                shared,
                stream>>>(p);
    }
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
