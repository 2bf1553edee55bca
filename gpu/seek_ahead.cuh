/// Beside the rows of a decode step, blocks that find the cells of keys which leave the
/// window in later steps. Device code.
///
/// When the last of kMostAhead keys whose cells are known has left, those of the next ones
/// must be known. The steps until then compare them with the cells one part after the other, so
/// that none has more to do than others; of a sequence for which they did not come that far,
/// the rows' blocks find the cells when they need them (find_cells.cuh). Where processors that
/// have time for this are few, a step visits some of the sequences only (seek_schedule.h) and
/// does several parts for these at once: DecodeGrid::visits.
///
/// Rows of the same step may read and change the sequence meanwhile. Where cells are sought
/// here, the rows of the step find none and leave `assigned` alone, or have changed it before
/// it was read, as one word with the parts; and the keys are older than the step's token. Parts
/// that not all KV heads have been through are done again, with the same outcome.
#pragma once

#include "decode_begin.cuh"
#include "seek_schedule.h"

namespace faiss_saap::gpu {

namespace {

constexpr int kSeekWarps = 2, kSeekThreads = 32 * kSeekWarps; ///< of a group, for a row

/// Groups of a block.
FAISS_SAAP_HOST_DEVICE constexpr int seek_groups(int threads) {
    return threads / kSeekThreads;
}

/// What a visit of a row begins with; it may change meanwhile.
struct SeekVisit {
    int2 ahead; ///< assigned and sought_parts
    SeekRow row;
    ListProgress* progress;
    uint16_t* cells; ///< ListState::cells
};

template <int D>
struct SeekGroup {
    DecodeRow row;
    alignas(16) uint32_t keys[kMostAhead * D]; ///< by split_float
    unsigned long long best[kSeekWarps][kMostAhead];
    TileRing<D> rings[kSeekWarps];
    uint32_t bits[kSeekWarps]; ///< one for each thread
    int rows[kSeekThreads];    ///< the group's, each looked at by a thread
    SeekVisit visits[kSeekThreads];
    int order[kSeekThreads]; ///< those that can be visited, by the steps that they can wait for
};

/// A barrier of a group.
__device__ __forceinline__ void sync_group() {
    constexpr int kFirst = 1; // no other barriers are used in these blocks but the block's
    static_assert(kFirst + seek_groups(kThreads + 32 * kWindowWarps) <= 16);
    asm volatile("bar.sync %0, %1;" ::"r"(
                         kFirst + static_cast<int>(threadIdx.x) / kSeekThreads),
                 "n"(kSeekThreads)
                 : "memory");
}

/// Cells of each part but the last, in whole tiles.
FAISS_SAAP_HOST_DEVICE inline int cells_of_part(int ncell) {
    return kTileRows * DecodeLayout::share(DecodeLayout::share(ncell, kTileRows), kSeekParts);
}

/// The rows of some parts of the cells, for kMostAhead keys.
__device__ __forceinline__ RowProducts products_of_parts(
        const DeviceAssigner& key,
        int part,
        int parts) {
    const int each = cells_of_part(key.ncell);
    RowProducts p;
    p.bf16 = key.bf16;
    p.matrix = p.bias_matrix = key.ncell;
    p.cols = key.padded_cols;
    p.n = kMostAhead;
    p.first = min(key.ncell, part * each);
    p.end = min(key.ncell, (part + parts) * each);
    p.rows = static_cast<const char*>(key.rows) + int64_t(p.first) * p.bytes_of_row();
    p.bias = key.bias ? key.bias + p.first : nullptr;
    p.share_out(kSeekWarps, /*splits=*/false);
    return p;
}

/// Whether the keys from `assigned` on can be sought now.
__device__ __forceinline__ bool are_sought(
        const DecodeParams& p,
        const DecodeRow& row,
        int64_t length,
        int assigned) {
    const int64_t leaving = leaving_slot(length, p.sink, p.window);
    return leaving >= 0 && leaving < assigned && assigned <= leaving + kMostLeft &&
            assigned + kMostAhead < length && // the last one may be this step's
            assigned + kMostAhead <= row.row.view_length &&
            keys_that_are_there(row.kv, assigned, kMostAhead) == kMostAhead;
}

/// The last KV head of a sequence knows whether all have been through the visit's parts. What
/// they have found is read by later kernels alone, so nobody waits for it.
__device__ __forceinline__ void note_visit(
        const DecodeParams& p,
        const BatchRow& row,
        bool visited,
        const int2& ahead) {
    BatchItem& item = p.items[row.item];
    const int one = 1 + (visited << 16);
    const int heads = atomicAdd(&item.sought, one) + one;
    if ((heads & 0xffff) == p.heads_kv) {
        item.sought = 0;
        if (heads >> 16 == p.heads_kv) {
            const int parts = ahead.y + parts_of_visit(p.grid.visits);
            const bool last = parts >= kSeekParts;
            note_assigned(
                    *row.sequence, ahead.x + (last ? kMostAhead : 0), last ? 0 : parts);
        }
    }
}

/// Whether the row can be visited, and what a visit begins with.
__device__ __forceinline__ bool find_visit(
        const DecodeParams& p,
        const DecodeRow& row,
        SeekVisit& visit) {
    const SequenceState& sequence = *row.row.sequence;
    const int64_t length = __ldcg(&sequence.length);
    visit.ahead = __ldcg(reinterpret_cast<const int2*>(&sequence.assigned));
    visit.progress = row.row.lists->progress; // arrays may have moved
    visit.cells = row.row.lists->cells;
    visit.row.steps_left =
            visit.ahead.x - static_cast<int>(leaving_slot(length, p.sink, p.window));
    visit.row.visits_left = visits_of_parts(p.grid.visits, visit.ahead.y);
    return are_sought(p, row, length, visit.ahead.x);
}

/// Compares the row's keys with the cells of some parts. By a group, which has its description.
template <int D>
__device__ __forceinline__ void compare_parts(
        const DecodeParams& p,
        SeekGroup<D>& s,
        const SeekVisit& visit) {
    const int thread = threadIdx.x % kSeekThreads, lane = threadIdx.x % 32;
    const int2 ahead = visit.ahead;
    const int parts = parts_of_visit(p.grid.visits);
    const RowProducts product = products_of_parts(s.row.list.key, ahead.y, parts);
    prefetch_bytes(
            static_cast<const char*>(product.rows), product.bytes(), thread, kSeekThreads);
    unsigned long long* sought = visit.progress->sought;
    unsigned long long most =
            thread < kMostAhead && ahead.y ? __ldcg(sought + thread) : 0;
    load_sought<D>(p, s.row, s.keys, ahead.x, kMostAhead, thread, kSeekThreads);
    sync_group();
    unsigned long long best[2] = {}; // of the keys that the lane has products of
    const auto keep_best = [&](int v, int r, float value) {
        best[v % 2] = max(best[v % 2], scored_cell(value, r));
    };
    if (product.bf16 && product.cols == D) {
        multiply_streamed_rows<D, kSeekWarps>(
                product, s.keys, D, s.rings[thread / 32], keep_best);
    } else {
        multiply_rows<kSeekWarps>(product, s.keys, D, ProductRoom(), keep_best);
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            best[j] = max(best[j], __shfl_xor_sync(0xffffffffu, best[j], step));
        }
        if (lane < 4) {
            s.best[thread / 32][2 * lane + j] = best[j];
        }
    }
    sync_group();
    if (thread < kMostAhead) {
#pragma unroll
        for (int w = 0; w < kSeekWarps; w++) {
            most = max(most, s.best[w][thread]);
        }
        sought[thread] = most;
        if (ahead.y + parts >= kSeekParts) {
            visit.cells[ahead.x + thread - p.sink] =
                    static_cast<uint16_t>(cell_of_scored(most));
        }
    }
}

/// Reads a row's description, all words at once. By a group.
template <int D>
__device__ __forceinline__ void describe_row(SeekGroup<D>& s, const DecodeRow& row) {
    constexpr int kWords = sizeof(DecodeRow) / 8;
    constexpr int kEach = (kWords + kSeekThreads - 1) / kSeekThreads;
    static_assert(sizeof(DecodeRow) % 8 == 0);
    const auto* from = reinterpret_cast<const unsigned long long*>(&row);
    auto* to = reinterpret_cast<unsigned long long*>(&s.row);
    unsigned long long words[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int at = threadIdx.x % kSeekThreads + i * kSeekThreads;
        words[i] = at < kWords ? from[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int at = threadIdx.x % kSeekThreads + i * kSeekThreads;
        if (at < kWords) {
            to[at] = words[i];
        }
    }
}

/// A bit for each of the group's threads. Before it is called again, all have come to another
/// barrier.
template <int D>
__device__ __forceinline__ unsigned long long bits_of_group(SeekGroup<D>& s, bool x) {
    static_assert(kSeekWarps == 2);
    const uint32_t bits = __ballot_sync(0xffffffffu, x);
    if (threadIdx.x % 32 == 0) {
        s.bits[threadIdx.x % kSeekThreads / 32] = bits;
    }
    sync_group();
    return static_cast<unsigned long long>(s.bits[1]) << 32 | s.bits[0];
}

/// Finds the rows that the group has, of all.
/// @return  how many
template <int D>
__device__ __forceinline__ int find_rows(
        const DecodeParams& p,
        SeekGroup<D>& s,
        int group,
        int groups) {
    const int thread = threadIdx.x % kSeekThreads;
    int n = 0;
#pragma unroll 1
    for (int begin = 0; begin < p.nrow; begin += kSeekThreads) {
        const int row = begin + thread;
        const BatchRow* of = row < p.nrow ? &p.rows[row].row : nullptr;
        const bool own =
                of && group_of_row(of->item, of->kv_head, p.heads_kv, groups) == group;
        const unsigned long long bits = bits_of_group(s, own);
        if (own) {
            s.rows[n + __popcll(bits & ((1ull << thread) - 1))] = row;
        }
        n += __popcll(bits);
        sync_group();
    }
    return n;
}

/// Puts those of the group's n rows that can be visited in order.
/// @return  how many
template <int D>
__device__ __forceinline__ int order_visits(SeekGroup<D>& s, int n, bool can_visit) {
    const int thread = threadIdx.x % kSeekThreads;
    const unsigned long long rows = bits_of_group(s, can_visit);
    if (can_visit) {
        const int wait = s.visits[thread].row.can_wait();
        int before = 0;
        for (int i = 0; i < n; i++) {
            const int other = s.visits[i].row.can_wait();
            before += rows >> i & 1 && (other < wait || (other == wait && i < thread));
        }
        s.order[before] = thread;
    }
    sync_group();
    return __popcll(rows);
}

/// By the clusters behind those of rows. Groups share these out, as many as have something to do
/// in a step each in a block of its own, if there are so many: a processor does not read faster
/// for more of them.
/// @param first  where the clusters begin, along the grid's y
template <int D>
static __device__ __noinline__ void seek_ahead(
        const DecodeParams& p,
        char* shared,
        int first) {
    const int of_block = seek_groups(static_cast<int>(blockDim.x));
    const int in_block = threadIdx.x / kSeekThreads, thread = threadIdx.x % kSeekThreads;
    const int block = (blockIdx.y - first) * gridDim.x + blockIdx.x;
    const int blocks = (gridDim.y - first) * gridDim.x;
    SeekGroup<D>& s = reinterpret_cast<SeekGroup<D>*>(shared)[in_block];
    const int n = find_rows(p, s, in_block * blocks + block, of_block * blocks);
    if (n == 1) {
        describe_row(s, p.rows[s.rows[0]]);
    }
    wait_for_previous();
    sync_group();
    bool can_visit = false;
    if (thread < n) {
        const DecodeRow& row = p.rows[s.rows[thread]];
        can_visit = find_visit(p, row, s.visits[thread]);
        if (!can_visit) {
            note_visit(p, row.row, false, s.visits[thread].ahead);
        }
    }
    const int rows = order_visits(s, n, can_visit);
    SeekPace pace;
    for (int r = 0; r < rows; r++) {
        pace.add(s.visits[s.order[r]].row);
    }
#pragma unroll 1
    for (int r = 0; r < rows; r++) {
        const int i = s.order[r];
        const SeekVisit& visit = s.visits[i];
        const bool now = r < pace.visits;
        if (now) {
            if (n > 1) {
                describe_row(s, p.rows[s.rows[i]]);
                sync_group();
            }
            compare_parts<D>(p, s, visit);
        }
        if (thread == 0) {
            note_visit(p, p.rows[s.rows[i]].row, now, visit.ahead);
        }
        sync_group(); // the row is done with
    }
}

} // namespace

} // namespace faiss_saap::gpu
