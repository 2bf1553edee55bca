/// Beside the rows of a decode step, blocks that find the cells of keys which leave the
/// window in later steps. Device code.
///
/// When the last of kMostAhead keys whose cells are known has left, those of the next ones
/// must be known. Steps compare them with the cells one part after the other, so that none has
/// more to do than others; of a sequence for which they did not come that far, the rows'
/// blocks find the cells when they need them (find_cells.cuh).
///
/// Rows of the same step may read and change the sequence meanwhile. Where cells are sought
/// here, the rows of the step find none and leave `assigned` alone, or have changed it before
/// it was read, as one word with the parts; and the keys are older than the step's token. A
/// part that not all KV heads have been through is done again, with the same outcome.
#pragma once

#include "decode_begin.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kSeekWarps = 2, kSeekThreads = 32 * kSeekWarps; ///< of a group, for a row
constexpr int kSeekGroups = (kThreads + 32 * kWindowWarps) / kSeekThreads; ///< of a block
/// Of the cells. In the step that has to find cells because there are none ahead, the next
/// ones cannot be sought yet.
constexpr int kSeekParts = kMostAhead - 1;

template <int D>
struct SeekGroup {
    DecodeRow row;
    alignas(16) uint32_t keys[kMostAhead * D]; ///< by split_float
    unsigned long long best[kSeekWarps][kMostAhead];
    /// Of the sequence, read by one thread: they may change meanwhile.
    int64_t length;
    int2 ahead; ///< assigned and sought_parts
};

/// A barrier of a group.
__device__ __forceinline__ void sync_group() {
    constexpr int kFirst = 1; // no other barriers are used in these blocks but the block's
    asm volatile("bar.sync %0, %1;" ::"r"(
                         kFirst + static_cast<int>(threadIdx.x) / kSeekThreads),
                 "n"(kSeekThreads)
                 : "memory");
}

/// Cells of each part but the last, in whole tiles.
FAISS_SAAP_HOST_DEVICE inline int cells_of_part(int ncell) {
    return kTileRows * DecodeLayout::share(DecodeLayout::share(ncell, kTileRows), kSeekParts);
}

/// The rows of a part of the cells, for kMostAhead keys.
__device__ __forceinline__ RowProducts products_of_part(const DeviceAssigner& key, int part) {
    const int each = cells_of_part(key.ncell);
    RowProducts p;
    p.bf16 = key.bf16;
    p.matrix = p.bias_matrix = key.ncell;
    p.cols = key.padded_cols;
    p.n = kMostAhead;
    p.first = min(key.ncell, part * each);
    p.end = min(key.ncell, p.first + each);
    p.rows = static_cast<const char*>(key.rows) + int64_t(p.first) * p.bytes_of_row();
    p.bias = key.bias ? key.bias + p.first : nullptr;
    p.share_out(kSeekWarps, /*splits=*/false);
    return p;
}

/// Whether the keys from `assigned` on are to be sought now.
__device__ __forceinline__ bool are_sought(
        const DecodeParams& p,
        const DecodeRow& row,
        int64_t length,
        int assigned) {
    const int64_t leaving = leaving_slot(length, p.sink, p.window);
    return leaving >= 0 && leaving < assigned && assigned <= leaving + kMostAhead &&
            assigned + kMostAhead < length && // the last one may be this step's
            assigned + kMostAhead <= row.row.view_length &&
            keys_that_are_there(row.kv, assigned, kMostAhead) == kMostAhead;
}

/// Compares them with a part of the cells. By a group.
/// @param cells  ListState::cells
template <int D>
__device__ __forceinline__ void compare_part(
        const DecodeParams& p,
        SeekGroup<D>& s,
        ListProgress& progress,
        uint16_t* cells,
        int assigned,
        int part) {
    const int thread = threadIdx.x % kSeekThreads, lane = threadIdx.x % 32;
    const RowProducts product = products_of_part(s.row.list.key, part);
    prefetch_bytes(
            static_cast<const char*>(product.rows), product.bytes(), thread, kSeekThreads);
    const unsigned long long before =
            thread < kMostAhead && part ? __ldcg(progress.sought + thread) : 0;
    load_sought<D>(p, s.row, s.keys, assigned, kMostAhead, thread, kSeekThreads);
    sync_group();
    unsigned long long best[2] = {}; // of the keys that the lane has products of
    multiply_rows<kSeekWarps>(
            product, s.keys, D, ProductRoom(), [&](int v, int r, float value) {
                best[v % 2] = max(best[v % 2], scored_cell(value, r));
            });
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
        unsigned long long most = before;
#pragma unroll
        for (int w = 0; w < kSeekWarps; w++) {
            most = max(most, s.best[w][thread]);
        }
        progress.sought[thread] = most;
        if (part == kSeekParts - 1) {
            cells[assigned + thread - p.sink] =
                    static_cast<uint16_t>(cell_of_scored(most));
        }
    }
}

/// For one row. By a group, which has its description.
template <int D>
__device__ __forceinline__ void seek_for_row(
        const DecodeParams& p,
        SeekGroup<D>& s,
        SequenceState* sequence) {
    const int thread = threadIdx.x % kSeekThreads;
    if (thread == 0) {
        s.length = __ldcg(&sequence->length);
        s.ahead = __ldcg(reinterpret_cast<const int2*>(&sequence->assigned));
    }
    sync_group();
    const ListState& list = *s.row.row.lists; // arrays may have moved
    const int assigned = s.ahead.x, part = s.ahead.y;
    const bool acts = are_sought(p, s.row, s.length, assigned);
    if (acts) {
        compare_part<D>(p, s, *list.progress, list.cells, assigned, part);
    }
    if (thread != 0) {
        return;
    }
    // The last KV head knows whether all have been compared with this part.
    BatchItem& item = p.items[s.row.row.item];
    const int one = 1 + (acts << 16);
    const int heads = atomicAdd(&item.sought, one) + one;
    if ((heads & 0xffff) == p.heads_kv) {
        item.sought = 0;
        if (heads >> 16 == p.heads_kv) {
            const bool last = part == kSeekParts - 1;
            note_assigned(
                    *sequence, assigned + (last ? kMostAhead : 0), last ? 0 : part + 1);
        }
    }
}

/// By the clusters behind those of rows. Each group has some rows, one after the other.
template <int D>
static __device__ __noinline__ void seek_ahead(const DecodeParams& p, char* shared) {
    const int group = threadIdx.x / kSeekThreads, thread = threadIdx.x % kSeekThreads;
    const int block = (blockIdx.y - p.nrow) * gridDim.x + blockIdx.x;
    const int groups = (gridDim.y - p.nrow) * gridDim.x * kSeekGroups; // of all blocks
    SeekGroup<D>& s = reinterpret_cast<SeekGroup<D>*>(shared)[group];
    constexpr int kWords = sizeof(DecodeRow) / 8;
    constexpr int kEach = (kWords + kSeekThreads - 1) / kSeekThreads;
    static_assert(sizeof(DecodeRow) % 8 == 0);
    bool first = true;
#pragma unroll 1
    for (int row = block * kSeekGroups + group; row < p.nrow; row += groups) {
        sync_group(); // the row before is done with
        SequenceState* sequence = p.rows[row].row.sequence;
        const auto* from = reinterpret_cast<const unsigned long long*>(p.rows + row);
        unsigned long long words[kEach];
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = thread + i * kSeekThreads;
            words[i] = at < kWords ? from[at] : 0;
        }
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = thread + i * kSeekThreads;
            if (at < kWords) {
                reinterpret_cast<unsigned long long*>(&s.row)[at] = words[i];
            }
        }
        if (first) {
            wait_for_previous();
            first = false;
        }
        seek_for_row<D>(p, s, sequence);
    }
    if (first) {
        wait_for_previous();
    }
}

} // namespace

} // namespace faiss_saap::gpu
