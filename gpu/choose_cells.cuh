/// Which cells a row of decode() reads: those that take_cells of ProbePolicy.h takes, by a
/// block. Device code.
///
/// Most of them need no order: those of the bins of masses that are within the limits
/// together are taken as they come, which makes them the first ones. The best of the
/// others are candidates, of which what fits is taken, best first. What still fits then is
/// looked for among all that are left.
#pragma once

#include "bin_counts.cuh"
#include "decode_threads.cuh"
#include "device_vectors.cuh"

namespace faiss_saap::gpu {

/// What a block keeps of its choice, beside the cells' masses and keys.
struct CellChoice {
    static constexpr int kCandidates = 32; ///< one for each lane

    static_assert(BinCounts::kBins <= kThreads); // those that choose clear all of them
    BinCounts bins;
    /// Of each warp's cells: how many are taken as they come, and their keys; keys of the
    /// smallest other one.
    int4 of_warp[kWarps];
    unsigned long long candidate[kCandidates]; ///< as scored_cell has it
    int candidate_keys[kCandidates];
    uint8_t in_order[kWarps][kCandidates]; ///< candidates from the best one on
    int ncandidate;
    unsigned long long candidates_end; ///< candidates are above; 0: they are all others
    unsigned long long best[2][kWarps];
    /// Cells, and in y keys, before and with those that are taken as they come, and before
    /// and with the others. Where other warps take these, each side has its own.
    int2 taken[2][2];
    static constexpr int kFirst = 0, kOthers = 1; ///< of the first index
    static constexpr int kBefore = 0, kWith = 1;  ///< of the second
};

/// Calls what is to be done with each of four cells: their number, order and keys.
template <class Each>
__device__ __forceinline__ void for_four_cells(
        const float4& mass,
        const int4& keys,
        int first,
        const Each& each) {
    each(first, scored_cell(mass.x, first), keys.x);
    each(first + 1, scored_cell(mass.y, first + 1), keys.y);
    each(first + 2, scored_cell(mass.z, first + 2), keys.z);
    each(first + 3, scored_cell(mass.w, first + 3), keys.w);
}

/// The cells to choose from, in shared memory. A cell without keys is none.
struct WeighedCells {
    const float* mass; ///< per key, 0 to 16
    const int32_t* keys;
    int n; ///< a multiple of 4; each thread has four at a time

    __device__ __forceinline__ float4 masses_at(int c) const {
        return *reinterpret_cast<const float4*>(mass + c);
    }
    __device__ __forceinline__ int4 keys_at(int c) const {
        return *reinterpret_cast<const int4*>(keys + c);
    }
    /// for_four_cells of all; by some warps of a block.
    template <int kFirstWarp = 0, int kOfThem = kWarps, class Each>
    __device__ __forceinline__ void for_each(const Each& each) const {
        const int thread = static_cast<int>(threadIdx.x) - 32 * kFirstWarp;
#pragma unroll 1
        for (int c = 4 * thread; c < n; c += 4 * 32 * kOfThem) {
            for_four_cells(masses_at(c), keys_at(c), c, each);
        }
    }
};

/// Bins of scored cells: the first one has all above `top` too, the last one all the rest.
struct CellBins {
    unsigned long long highest, top, end; ///< orders; of those above `end`
    int log_width;

    /// Of masses, sixteen for each factor of two. The limit is hardly crossed above the
    /// mass that as many keys may have at most: all keys of a head have 1 together.
    __device__ __forceinline__ static CellBins of_masses(int heads, int keys) {
        const float most = static_cast<float>(heads) / static_cast<float>(max(1, keys));
        return {~0ull, scored_cell(most, 0), 0, 51};
    }
    __device__ __forceinline__ int operator()(unsigned long long order) const {
        return static_cast<int>(
                min((top - min(top, order)) >> log_width, BinCounts::kBins - 1ull));
    }
    /// The first order of a bin; of the one after the last, the end.
    __device__ __forceinline__ unsigned long long top_of(int bin) const {
        return bin == 0 ? highest
                : bin < BinCounts::kBins
                ? top - (static_cast<unsigned long long>(bin) << log_width)
                : end;
    }
    /// A bin's own bins.
    __device__ __forceinline__ CellBins within(int bin) const {
        // Neither above all cells nor below.
        const unsigned long long from = min(top_of(bin), scored_cell(16, 0)),
                                 to = max(top_of(bin + 1), scored_cell(0, 0x7fffffff) - 1);
        const int bits = 64 - __clzll(static_cast<long long>(from - to));
        return {from, from, to, max(0, bits - 8)};
    }
};

/// Makes room; a barrier follows.
__device__ __forceinline__ void clear_choice(CellChoice& s) {
    s.bins.clear();
    if (threadIdx.x == 0) {
        s.ncandidate = 0;
    }
}

/// Counts a cell in its bin, if it has one.
__device__ __forceinline__ void bin_cell(
        CellChoice& s,
        const CellBins& bins,
        unsigned long long order,
        int keys) {
    if (keys && order <= bins.highest && order > bins.end) {
        s.bins.add(bins(order), keys);
    }
}

/// Bins that are within the limits together, and those that follow up to so many cells
/// as may be candidates: ends of both. By each warp for itself.
/// @param cells, keys  that may be taken
__device__ __forceinline__ int2 bins_within(const CellChoice& s, int cells, int keys) {
    constexpr int kEach = BinSums::kEach;
    const BinSums sums(s.bins);
    int within = 0, of_them = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const bool is = sums.keys[i] <= keys && sums.cells[i] <= cells;
        within += is;
        of_them = is ? sums.cells[i] : of_them;
    }
    const int taken = __reduce_max_sync(0xffffffffu, of_them);
    int near = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        near += sums.cells[i] <= taken + CellChoice::kCandidates;
    }
    return make_int2(
            __reduce_add_sync(0xffffffffu, within),
            __reduce_add_sync(0xffffffffu, near));
}

/// Where the cells that are taken as they come end, and where the candidates do.
struct ChoiceEnds {
    unsigned long long taken, candidates; ///< orders: of those above
};

/// Finds them from the bins in which cells have been counted; where too many cells are in
/// one bin, from bins of that one. By all that choose.
__device__ __forceinline__ ChoiceEnds find_ends(
        CellChoice& s,
        const WeighedCells& all,
        CellBins bins,
        int cells,
        int keys) {
#pragma unroll 1
    while (true) {
        const int2 ends = bins_within(s, cells, keys);
        if (ends.x < ends.y || ends.x == BinCounts::kBins) {
            return {bins.top_of(ends.x), bins.top_of(ends.y)};
        }
        // Of cells before the bin nothing more is asked than how many there are.
        int cells_before = 0, keys_before = 0;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < ends.x; i += 32) {
            cells_before += s.bins.cells[i];
            keys_before += s.bins.keys[i];
        }
        cells -= __reduce_add_sync(0xffffffffu, cells_before);
        keys -= __reduce_add_sync(0xffffffffu, keys_before);
        bins = bins.within(ends.x);
        sync_choosers();
        clear_choice(s);
        sync_choosers();
        all.for_each([&](int, unsigned long long order, int n) {
            bin_cell(s, bins, order, n);
        });
        sync_choosers();
    }
}

/// The best cell below `below` that has at most `keys` keys; 0: none. By some warps of a
/// block; `round` counts the calls.
template <int kFirstWarp, int kOfThem, class Sync>
__device__ __forceinline__ unsigned long long best_that_fits(
        CellChoice& s,
        const WeighedCells& all,
        int keys,
        unsigned long long below,
        int round,
        const Sync& sync) {
    unsigned long long best = 0;
    all.for_each<kFirstWarp, kOfThem>([&](int, unsigned long long order, int n) {
        best = n && n <= keys && order < below ? max(best, order) : best;
    });
    return largest_of_warps<kFirstWarp, kOfThem>(s.best, best, round, sync);
}

struct CellCandidate {
    int cell, keys;
};

/// The candidate of a lane, if they are put in order, the best one first; without keys:
/// none. By each warp for itself.
/// @param warp  among those that do
__device__ __forceinline__ CellCandidate candidate_of_lane(CellChoice& s, int warp) {
    const int lane = threadIdx.x % 32;
    const int n = s.ncandidate;
    const unsigned long long mine = lane < n ? s.candidate[lane] : 0;
    int rank = 0;
#pragma unroll 8
    for (int i = 0; i < n; i++) {
        rank += s.candidate[i] > mine;
    }
    if (lane < n) {
        s.in_order[warp][rank] = static_cast<uint8_t>(lane);
    }
    __syncwarp();
    const int from = lane < n ? s.in_order[warp][lane] : 0;
    return {cell_of_scored(__shfl_sync(0xffffffffu, mine, from)),
            lane < n ? s.candidate_keys[from] : 0};
}

/// The cells that are taken as they come: how many they and their keys are, and the keys of
/// the smallest other one.
struct FirstCells {
    int cells, keys, least;

    /// Of all warps. By each warp for itself, after take_first() has counted.
    __device__ __forceinline__ static FirstCells of(const int4& of_warp) {
        return {__reduce_add_sync(0xffffffffu, of_warp.x),
                __reduce_add_sync(0xffffffffu, of_warp.y),
                __reduce_min_sync(0xffffffffu, of_warp.z)};
    }
    __device__ __forceinline__ static FirstCells of(const CellChoice& s) {
        return of(of_lane(s));
    }
    /// What the warp that has a lane's number has counted.
    __device__ __forceinline__ static int4 of_lane(const CellChoice& s) {
        const int lane = threadIdx.x % 32;
        return lane < kWarps ? s.of_warp[lane] : make_int4(0, 0, INT32_MAX, 0);
    }
};

/// Takes the cells that are taken as they come. How many cells and keys these are is in
/// `s` after the next barrier. By all that choose.
/// @param bins         in which the cells have been counted; a barrier has followed
/// @param cells, keys  that may be taken
/// @param counted      called by all when what take_others() needs is in `s`
/// @param take         take(i, cell, n, begin) is called for each cell that is taken, the
///                     i-th one, whose n keys are the row's from `begin` on; by any
///                     thread, the same for the same cells in all blocks
template <class Counted, class Take>
__device__ __forceinline__ FirstCells take_first(
        CellChoice& s,
        const WeighedCells& all,
        const CellBins& bins,
        int cells,
        int keys,
        const Counted& counted,
        const Take& take) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const ChoiceEnds ends = find_ends(s, all, bins, cells, keys);
    int3 mine = make_int3(0, 0, INT32_MAX); // as of_warp has it
    all.for_each([&](int, unsigned long long order, int n) {
        if (!n) {
            return;
        }
        if (order > ends.taken) {
            mine.x++;
            mine.y += n;
            return;
        }
        mine.z = min(mine.z, n);
        if (order > ends.candidates) {
            const int i = atomicAdd(&s.ncandidate, 1);
            s.candidate[i] = order;
            s.candidate_keys[i] = n;
        }
    });
    mine.x = __reduce_add_sync(0xffffffffu, mine.x);
    mine.y = __reduce_add_sync(0xffffffffu, mine.y);
    mine.z = __reduce_min_sync(0xffffffffu, mine.z);
    if (lane == 0) {
        s.of_warp[warp] = make_int4(mine.x, mine.y, mine.z, 0);
    }
    if (threadIdx.x == 0) {
        s.candidates_end = ends.candidates;
    }
    sync_choosers();
    const int4 other = FirstCells::of_lane(s);
    const FirstCells all_of_them = FirstCells::of(other);
    if (threadIdx.x == 0) {
        s.taken[CellChoice::kFirst][CellChoice::kWith] =
                make_int2(all_of_them.cells, all_of_them.keys);
    }
    counted();
    // In the order of warps, lanes and cells.
    int at = __reduce_add_sync(0xffffffffu, lane < warp ? other.x : 0);
    int begin = __reduce_add_sync(0xffffffffu, lane < warp ? other.y : 0);
#pragma unroll 1
    for (int c0 = 128 * warp; mine.x && c0 < all.n; c0 += 4 * kThreads) {
        const int c = c0 + 4 * lane;
        const bool is = c < all.n;
        const float4 mass = is ? all.masses_at(c) : make_float4(0, 0, 0, 0);
        const int4 n_of = is ? all.keys_at(c) : make_int4(0, 0, 0, 0);
        int2 own = make_int2(0, 0);
        for_four_cells(mass, n_of, c, [&](int, unsigned long long order, int n) {
            const bool takes = n && order > ends.taken;
            own.x += takes;
            own.y += takes ? n : 0;
        });
        int2 end = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int x = __shfl_up_sync(0xffffffffu, end.x, step);
            const int y = __shfl_up_sync(0xffffffffu, end.y, step);
            end.x += lane >= step ? x : 0;
            end.y += lane >= step ? y : 0;
        }
        int2 to = make_int2(at + end.x - own.x, begin + end.y - own.y);
        for_four_cells(mass, n_of, c, [&](int cell, unsigned long long order, int n) {
            if (n && order > ends.taken) {
                take(to.x++, cell, n, to.y);
                to.y += n;
            }
        });
        at += __shfl_sync(0xffffffffu, end.x, 31);
        begin += __shfl_sync(0xffffffffu, end.y, 31);
    }
    return all_of_them;
}

/// Takes the others; the best cell of all has all its keys taken, if there is any. How many
/// cells and keys are taken in all is in `s` after the next barrier. By some warps of a
/// block, after take_first() has counted.
/// @param first              those that were
/// @param cells, keys, take  as for take_first()
/// @param sync               a barrier of these warps
template <int kFirstWarp, int kOfThem, class Take, class Sync>
__device__ __forceinline__ void take_others(
        CellChoice& s,
        const WeighedCells& all,
        const FirstCells& first,
        int cells,
        int keys,
        const Take& take,
        const Sync& sync) {
    const int warp = threadIdx.x / 32 - kFirstWarp, lane = threadIdx.x % 32;
    int ncell = first.cells, nkey = first.keys;
    // Candidates, in order, a lane's each: those that fit one after the other.
    const CellCandidate mine_of = candidate_of_lane(s, warp);
    int left = keys - nkey, to = -1, to_begin = 0;
    unsigned open = __ballot_sync(0xffffffffu, mine_of.keys > 0);
#pragma unroll 1
    while (ncell < cells) {
        const unsigned fits =
                open & __ballot_sync(0xffffffffu, mine_of.keys <= left || ncell == 0);
        if (!fits) {
            break;
        }
        const int who = __ffs(static_cast<int>(fits)) - 1;
        const int n = __shfl_sync(0xffffffffu, mine_of.keys, who);
        to = lane == who ? ncell : to;
        to_begin = lane == who ? nkey : to_begin;
        open &= ~1u << who;
        ncell++;
        nkey += n;
        left -= n;
    }
    if (warp == 0 && to >= 0) {
        take(to, mine_of.cell, mine_of.keys, to_begin);
    }
    unsigned long long below = s.candidates_end + 1;
#pragma unroll 1
    for (int round = 0; below > 1 && ncell < cells && first.least <= left; round++) {
        below = best_that_fits<kFirstWarp, kOfThem>(s, all, left, below, round, sync);
        if (!below) {
            break;
        }
        const int cell = cell_of_scored(below), n = all.keys[cell];
        if (warp == 0 && lane == 0) {
            take(ncell, cell, n, nkey);
        }
        ncell++;
        nkey += n;
        left -= n;
    }
    if (warp == 0 && lane == 0) {
        s.taken[CellChoice::kOthers][CellChoice::kBefore] =
                make_int2(first.cells, first.keys);
        s.taken[CellChoice::kOthers][CellChoice::kWith] = make_int2(ncell, nkey);
    }
}

} // namespace faiss_saap::gpu
