/// Cells taken within limits, by a block: take_cells and share_scores of
/// ProbePolicy.h. Device code, and little of it: a step's kernels run once and wait
/// for their code as for data.
#pragma once

#include "bin_counts.cuh"
#include "device_vectors.cuh"
#include "route.h"

namespace faiss_saap::gpu {

constexpr int kSelectThreads = 256; ///< of a block that selects
constexpr int kSelectWarps = kSelectThreads / 32;

/// The order of cells. 0 is never taken.
__device__ inline unsigned long long cell_key(float score, int cell) {
    return score > -INFINITY ? scored_cell(score, cell) : 0ull;
}

/// What a block keeps of a selection, beside scores, keys and counts.
struct Selection {
    static constexpr int kListed = kSelectThreads; ///< cells that are ranked, at most
    // by find_norms
    float norm[kMaxGroup];
    float of_warp[kSelectWarps][4];
    uint32_t most[4];
    uint32_t highest, lowest; ///< ordered scores, by find_bins
    // by take_cells
    BinCounts bins;
    int least; ///< keys of the smallest cell
    unsigned long long listed[kListed]; ///< cells that are ranked
    int counts[kListed];                ///< and their keys
    int nlisted;                        ///< may be more than there is room for
    int taken, keys;           ///< cells and keys
    unsigned long long passed; ///< the best cell that did not fit
    unsigned long long best[2][kSelectWarps];
};

/// log of the sum over all cells of count * exp(scale * score), for each head of
/// a group, into s.norm; -inf for none. By a block.
/// @param scores  size heads * ncell
__device__ inline void find_norms(
        Selection& s,
        const float* scores,
        const int32_t* counts,
        int ncell,
        int heads,
        float scale) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Four heads at a time, so that their sums do not wait for each other.
#pragma unroll 1
    for (int g0 = 0; g0 < heads; g0 += 4) {
        const int n = min(4, heads - g0); // the last one stands for those missing
        const float* head[4];
#pragma unroll
        for (int g = 0; g < 4; g++) {
            head[g] = scores + (g0 + min(g, n - 1)) * ncell;
        }
        float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll 2
        for (int c = threadIdx.x; c < ncell; c += blockDim.x) {
            const bool there = counts[c];
#pragma unroll
            for (int g = 0; g < 4; g++) {
                const float x = scale * head[g][c];
                most[g] = there ? fmaxf(most[g], x) : most[g];
            }
        }
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const uint32_t x = __reduce_max_sync(0xffffffffu, ordered(most[g]));
            if (lane == g) {
                s.of_warp[warp][g] = of_ordered(x);
            }
        }
        __syncthreads();
        if (warp < 4) { // a head for each
            const float x = lane < kSelectWarps ? s.of_warp[lane][warp] : -INFINITY;
            const uint32_t all = __reduce_max_sync(0xffffffffu, ordered(x));
            if (lane == 0) {
                s.most[warp] = all;
            }
        }
        __syncthreads();
        float sum[4] = {};
#pragma unroll
        for (int g = 0; g < 4; g++) {
            most[g] = of_ordered(s.most[g]);
        }
#pragma unroll 2
        for (int c = threadIdx.x; c < ncell; c += blockDim.x) {
            const float keys = counts[c];
#pragma unroll
            for (int g = 0; g < 4; g++) {
                // No cell: neither has it a score.
                const float x = keys * __expf(scale * head[g][c] - most[g]);
                sum[g] += keys > 0 && most[g] > -INFINITY ? x : 0.0f;
            }
        }
#pragma unroll
        for (int step = 16; step; step /= 2) {
#pragma unroll
            for (int g = 0; g < 4; g++) {
                sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], step);
            }
        }
#pragma unroll
        for (int g = 0; g < 4; g++) {
            if (lane == g) {
                s.of_warp[warp][g] = sum[g];
            }
        }
        __syncthreads();
        if (warp < n) { // in a fixed order: the result must not depend on timing
            float x = lane < kSelectWarps ? s.of_warp[lane][warp] : 0.0f;
#pragma unroll
            for (int step = kSelectWarps / 2; step; step /= 2) {
                x += __shfl_xor_sync(0xffffffffu, x, step);
            }
            if (lane == 0) {
                s.norm[g0 + warp] = of_ordered(s.most[warp]) + __logf(x);
            }
        }
        __syncthreads();
    }
}

/// Sorts n = 2^k >= 32 keys, largest first. A warp has the pairs of one stretch of
/// keys; others are waited for only where pairs leave it.
__device__ inline void sort_descending(unsigned long long* keys, int n) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pairs = max(32, n / 2 / kSelectWarps); // of a warp
    const int begin = warp * pairs, end = min(n / 2, begin + pairs);
    __syncthreads();
#pragma unroll 1
    for (int size = 2; size <= n; size *= 2) {
#pragma unroll 1
        for (int stride = size / 2; stride; stride /= 2) {
#pragma unroll 1
            for (int i = begin + lane; i < end; i += 32) {
                const int low = 2 * i - (i & (stride - 1));
                const auto a = keys[low], b = keys[low + stride];
                if ((a < b) == ((low & size) == 0)) {
                    keys[low] = b;
                    keys[low + stride] = a;
                }
            }
            // The next pairs are as far apart, or start anew with the whole size.
            const int next = stride > 1 ? stride / 2 : size;
            if (stride > pairs || next > pairs) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

/// take_cells (ProbePolicy.h) from sorted keys, by one warp: the way where many cells
/// are taken. `take(rank, cell, count, before)` is called for each cell that is taken, by
/// any of its lanes; `before` are the keys of the cells taken before it.
/// @param least  keys of the smallest cell
/// @return cells and keys taken
template <class Take>
__device__ int2 take_sorted_cells(
        const unsigned long long* sorted,
        int n,
        const int32_t* counts,
        int nprobe,
        int limit,
        bool at_least_one,
        int least,
        const Take& take) {
    const int lane = threadIdx.x % 32;
    int cells = 0, keys = 0;
#pragma unroll 1
    for (int first = 0; first < n; first += 32) {
        const unsigned long long key = sorted[first + lane];
        const int cell = cell_of_scored(key);
        const int count = key ? counts[cell] : 0;
        int end = count; // with the lanes before
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, end, step);
            end += lane >= step ? before : 0;
        }
        // All that fit one after the other, then one by one what still fits.
        bool fits = key && keys + end <= limit && cells + lane < nprobe;
        if (at_least_one && cells == 0 && lane == 0) {
            fits = key && nprobe > 0;
        }
        const unsigned all = __ballot_sync(0xffffffffu, fits);
        const int run = __ffs(static_cast<int>(~all)) - 1; // -1: all 32
        const int taken = run < 0 ? 32 : run;
        if (lane < taken) {
            take(cells + lane, cell, count, keys + end - count);
        }
        if (taken) {
            keys += __shfl_sync(0xffffffffu, end, taken - 1);
            cells += taken;
        }
        int last = taken; // looked at up to here
#pragma unroll 1
        while (cells < nprobe) {
            const unsigned more = __ballot_sync(
                    0xffffffffu, key && lane >= last && keys + count <= limit);
            if (!more) {
                break;
            }
            const int next = __ffs(static_cast<int>(more)) - 1;
            if (lane == next) {
                take(cells, cell, count, keys);
            }
            keys += __shfl_sync(0xffffffffu, count, next);
            cells++;
            last = next + 1;
        }
        if (cells >= nprobe || keys + least > limit ||
            !__any_sync(0xffffffffu, key != 0)) {
            break;
        }
    }
    return make_int2(cells, keys);
}

/// Bins of scores of which the largest is `top`.
struct Bins {
    float top, scale;

    /// Of a cell_key; falls with the score, whatever is rounded.
    __device__ int operator()(unsigned long long key) const {
        const float x = top - of_ordered(static_cast<uint32_t>(key >> 32));
        return max(0, min(BinCounts::kBins - 1, static_cast<int>(x * scale)));
    }
};

/// Bins for scores of which nothing is known. By a block.
__device__ inline Bins find_bins(Selection& s, const unsigned long long* keys, int n) {
    if (threadIdx.x == 0) {
        s.highest = 0;
        s.lowest = UINT32_MAX;
    }
    __syncthreads();
    uint32_t high = 0, low = UINT32_MAX;
#pragma unroll 2
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
        const unsigned long long key = keys[c];
        if (key) {
            high = max(high, static_cast<uint32_t>(key >> 32));
            low = min(low, static_cast<uint32_t>(key >> 32));
        }
    }
    high = __reduce_max_sync(0xffffffffu, high);
    low = __reduce_min_sync(0xffffffffu, low);
    if (threadIdx.x % 32 == 0) {
        atomicMax(&s.highest, high);
        atomicMin(&s.lowest, low);
    }
    __syncthreads();
    const float top = of_ordered(s.highest), range = top - of_ordered(s.lowest);
    return {top, range > 0 && range < INFINITY ? BinCounts::kBins / range : 0.0f};
}

/// Makes room for take_cells; a barrier is between.
__device__ inline void clear_selection(Selection& s) {
    s.bins.clear();
    if (threadIdx.x == 0) {
        s.least = INT32_MAX;
        s.nlisted = 0;
        s.taken = INT32_MAX;
        s.keys = 0;
        s.passed = 0;
    }
}

/// The first bin with which there are more keys or cells than allowed, else the last.
/// By each warp for itself.
__device__ inline int last_bin(const Selection& s, int nprobe, int limit) {
    constexpr int kEach = BinSums::kEach;
    const BinSums sums(s.bins);
    int within = 0; // bins of this lane that are within the limits
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        within += sums.keys[i] <= limit && sums.cells[i] < nprobe;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, within < kEach);
    const int who = beyond ? __ffs(static_cast<int>(beyond)) - 1 : 31;
    return min(
            BinCounts::kBins - 1,
            kEach * who + __shfl_sync(0xffffffffu, within, who));
}

/// Lists the cells of the bins up to `last`, to be ranked. By a block.
__device__ __forceinline__ void list_cells(
        Selection& s,
        const Bins& bins,
        const unsigned long long* keys,
        int n,
        const int32_t* counts,
        int last) {
    constexpr int kEach = 4; // of a thread at once, which do not wait for each other
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < n; first += kEach * kSelectThreads) {
        unsigned long long key[kEach];
        unsigned listed[kEach];
        int all = 0;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int c = first + i * kSelectThreads + threadIdx.x;
            key[i] = c < n ? keys[c] : 0;
            listed[i] = __ballot_sync(0xffffffffu, key[i] && bins(key[i]) <= last);
            all += __popc(listed[i]);
        }
        int at = 0;
        if (lane == 0 && all) {
            at = atomicAdd(&s.nlisted, all);
        }
        at = __shfl_sync(0xffffffffu, at, 0);
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int mine = at + __popc(listed[i] & ((1u << lane) - 1));
            if ((listed[i] >> lane & 1) && mine < Selection::kListed) {
                s.listed[mine] = key[i];
                s.counts[mine] = counts[first + i * kSelectThreads + threadIdx.x];
            }
            at += __popc(listed[i]);
        }
    }
}

/// The best of the keys below `below` whose cells have at most `limit` keys; 0: none.
/// By a block; `round` counts the calls.
__device__ inline unsigned long long best_that_fits(
        Selection& s,
        const unsigned long long* keys,
        int n,
        const int32_t* counts,
        int limit,
        unsigned long long below,
        int round) {
    unsigned long long mine = 0;
#pragma unroll 4
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
        const unsigned long long key = keys[c];
        if (key && key < below && counts[c] <= limit) {
            mine = max(mine, key);
        }
    }
    return largest_of_warps<0, kSelectWarps>(s.best, mine, round, [] { __syncthreads(); });
}

/// take_cells from s.listed, which holds the best cells down to some score: they are put
/// in order by counting, for each, the better ones and their keys, and what still fits
/// beyond them is found one by one among all. By a block.
template <class Take>
__device__ __forceinline__ void take_ranked_cells(
        Selection& s,
        const unsigned long long* keys,
        int n,
        const int32_t* counts,
        int nprobe,
        int limit,
        bool at_least_one,
        const Take& take) {
    const int m = s.nlisted;
    // Some threads for each cell.
    int each = 1;
    while (each < 32 && 2 * each * m <= kSelectThreads) {
        each *= 2;
    }
    const int i = static_cast<int>(threadIdx.x) / each;
    const unsigned long long mine = i < m ? s.listed[i] : 0;
    int rank = 0, before = 0;
#pragma unroll 4
    for (int j = threadIdx.x % each; j < m; j += each) {
        const bool better = s.listed[j] > mine;
        rank += better;
        before += better ? s.counts[j] : 0;
    }
#pragma unroll 1
    for (int step = each / 2; step; step /= 2) {
        rank += __shfl_xor_sync(0xffffffffu, rank, step);
        before += __shfl_xor_sync(0xffffffffu, before, step);
    }
    const bool speaks = mine && threadIdx.x % each == 0;
    const int count = speaks ? s.counts[i] : 0;
    const bool fits = rank < nprobe &&
            (before + count <= limit || (at_least_one && rank == 0));
    if (speaks && !fits) {
        atomicMin(&s.taken, rank);
    }
    __syncthreads();
    const int run = min(s.taken, m); // taken one after the other
    if (speaks && rank < run) {
        take(rank, cell_of_scored(mine), count, before);
    }
    if (speaks && rank == run - 1) {
        s.keys = before + count;
    }
    if (speaks && rank == run) {
        s.passed = mine;
    }
    __syncthreads();
    int taken = run, taken_keys = s.keys;
    unsigned long long below = s.passed;
#pragma unroll 1
    for (int round = 0; below && taken < nprobe && taken_keys + s.least <= limit;
         round++) {
        below = best_that_fits(
                s, keys, n, counts, limit - taken_keys, below, round);
        if (below) {
            const int cell = cell_of_scored(below);
            if (threadIdx.x == 0) {
                take(taken, cell, counts[cell], taken_keys);
            }
            taken++;
            taken_keys += counts[cell];
        }
    }
    __syncthreads(); // all have read what was
    if (threadIdx.x == 0) {
        s.taken = taken;
        s.keys = taken_keys;
    }
}

/// Counts a cell in its bin.
/// @param least  keys of the smallest cell that this thread has counted
__device__ __forceinline__ void bin_cell(
        Selection& s,
        const Bins& bins,
        unsigned long long key,
        int count,
        int& least) {
    if (key) {
        s.bins.add(bins(key), count);
        least = min(least, count);
    }
}

/// take_cells (ProbePolicy.h), by a block. keys[i] is the cell_key of cell i; n is their
/// number, 2^k >= 32. The histogram of the scores, which bin_cell has made, says where
/// the limit is crossed, and cells down to there are ranked; where they are too many,
/// `keys` are sorted instead. `take` is as in take_sorted_cells; what was taken is in
/// s.taken and s.keys after the next barrier. clear_selection and a barrier come before
/// bin_cell.
/// @param least  as bin_cell has left it
template <class Take>
__device__ __forceinline__ void take_cells(
        Selection& s,
        const Bins& bins,
        unsigned long long* keys,
        int n,
        const int32_t* counts,
        int nprobe,
        int limit,
        bool at_least_one,
        int least,
        const Take& take) {
    const int lane = threadIdx.x % 32;
    least = __reduce_min_sync(0xffffffffu, least);
    if (lane == 0) {
        atomicMin(&s.least, least);
    }
    __syncthreads();
    list_cells(s, bins, keys, n, counts, last_bin(s, nprobe, limit));
    __syncthreads();
    if (s.nlisted <= Selection::kListed) {
        take_ranked_cells(s, keys, n, counts, nprobe, limit, at_least_one, take);
        return;
    }
    sort_descending(keys, n);
    if (threadIdx.x < 32) {
        const int2 taken = take_sorted_cells(
                keys, n, counts, nprobe, limit, at_least_one, s.least, take);
        if (lane == 0) {
            s.taken = taken.x;
            s.keys = taken.y;
        }
    }
}

} // namespace faiss_saap::gpu
