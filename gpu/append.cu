#include "append.h"

#include "device_vectors.cuh"
#include "last_block.cuh"
#include "launch.h"
#include "listed_slots.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kCells = 64; ///< of a block: eight for each warp

__device__ int64_t bytes_of_row(const DeviceAssigner& a) {
    return int64_t(a.padded_cols) * a.element();
}

/// Best cells of the leaving tokens begin .. begin + n - 1 among a block's kCells
/// cells, into `out`: a warp has eight cells in flight at once.
__device__ void find_best_of_few(
        const AppendParams& p,
        const BatchItem& item,
        const ListState& list,
        int64_t begin,
        int n,
        unsigned long long* out) {
    extern __shared__ __align__(16) float few[]; // n * d
    const DeviceAssigner& key = list.key;
    const int lane = threadIdx.x % 32;
    const int cell = int(blockIdx.x) * kCells +
            static_cast<int>(threadIdx.x) / 4; // eight for each warp
    const char* row = cell < key.ncell
            ? static_cast<const char*>(key.rows) + cell * bytes_of_row(key)
            : nullptr;
    const int half = p.d / 2;
    for (int i = threadIdx.x; i < n * half; i += kThreads) {
        const int64_t slot = begin + i / half;
        load_vector(
                list.rotary,
                p.d,
                slot + p.position_offset,
                key.input == RowInput::pre_rope,
                key_row(item.kv, list.kv_head, slot),
                item.kv.bf16,
                i % half,
                half,
                few + i / half * p.d);
    }
    __syncthreads();
    const float bias = row && key.bias ? key.bias[cell] : 0.0f;
    for (int t = 0; t < n; t++) {
        const float score = bias +
                warp_products_of_weights<1>(row, key.bf16, p.d, few + t * p.d, 0);
        unsigned long long mine = row
                ? scored_cell(score, cell)
                : 0;
        for (int step = 16; step >= 4; step /= 2) {
            mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, step));
        }
        if (lane == 0) {
            atomicMax(&out[t], mine);
        }
    }
}

/// Lists the slots begin .. end - 1 of the cells that `cell_of` says, in their
/// order, so that the state is the same on every run. By one warp.
template <class CellOf>
__device__ void list_slots(
        const ListState& list,
        int64_t sink,
        int64_t begin,
        int64_t end,
        const CellOf& cell_of) {
    const int lane = threadIdx.x % 32;
    for (int64_t first = begin; first < end; first += 32) {
        const bool active = first + lane < end;
        const unsigned mask = __ballot_sync(0xffffffffu, active);
        if (active) {
            const auto slot = static_cast<int32_t>(first + lane);
            const int cell = cell_of(slot);
            const unsigned same = __match_any_sync(mask, cell);
            const int rank = __popc(same & ((1u << lane) - 1));
            const int size = __popc(same);
            const int32_t count = list.count[cell];
            volatile uint32_t* extents =
                    list.extents + int64_t(cell) * kExtents;
            __syncwarp(mask);
            if (rank == 0) {
                for (int e = extent_of(count); e <= extent_of(count + size - 1);
                     e++) {
                    // After a truncation the cell may have it still.
                    if (extents[e] == kNoExtent) {
                        extents[e] = atomicAdd(&list.progress->used, extent_size(e));
                    }
                }
                list.count[cell] = count + size;
            }
            __syncwarp(mask);
            const uint32_t i = count + rank;
            const int e = extent_of(i);
            list.slots[extents[e] + (i - extent_begin(e))] = slot;
            list.cells[slot - sink] = static_cast<uint16_t>(cell);
            if (rank == size - 1) {
                list.newest[cell] = slot;
            }
        }
        __syncwarp();
    }
}

/// Brings a block's rows of a key assigner nearer. They never change: this may be done
/// before the kernels before have ended.
__device__ void prefetch_rows(const DeviceAssigner& key) {
    const auto row = static_cast<int>(bytes_of_row(key));
    const int first = int(blockIdx.x) * kCells;
    prefetch_bytes(
            static_cast<const char*>(key.rows) + int64_t(first) * row,
            min(kCells, key.ncell - first) * row,
            threadIdx.x,
            blockDim.x);
}

/// Check, assign, list and means for items with few tokens, in one launch. Blocks share
/// the cells of an item's lists; the last of them to be done lists the tokens.
__global__ void __launch_bounds__(kThreads) append_few(AppendParams p) {
    let_next_begin();
    const BatchList at = p.lists[blockIdx.y];
    BatchItem& item = p.items[at.item];
    prefetch_rows(at.list->key);
    wait_for_previous();
    const int64_t length = at.sequence->length;
    const int64_t after = length + item.q_len;
    const Fault refused = after > at.sequence->capacity ? Fault::append_capacity
            : after > item.kv.length                    ? Fault::append_view
                                                        : Fault::none;
    const int64_t begin = max(p.sink, length - p.window);
    const int64_t end = max(p.sink, after - p.window);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const ListState& mine = *at.list;
    if (refused != Fault::none) {
        if (threadIdx.x == 0) {
            raise(p.flag, refused, at.item);
            item.bad = 1;
        }
    } else {
        // One block of each KV head looks at its new keys.
        const bool checks = blockIdx.x == 0 && mine.partition == 0;
        for (int t = warp; checks && t < item.q_len; t += kThreads / 32) {
            const char* row = key_row(item.kv, mine.kv_head, length + t);
            float norm = 0;
            for (int j = lane; row && j < p.d; j += 32) {
                const float x = element(row, item.kv.bf16, j);
                norm += x * x;
            }
            norm = sum_of_warp(norm);
            if (lane == 0 && (!row || !isfinite(norm))) {
                raise(p.flag, row ? Fault::append_key : Fault::append_page, at.item);
                item.bad = 1;
            }
        }
        if (begin < end) {
            find_best_of_few(
                    p,
                    item,
                    mine,
                    begin,
                    static_cast<int>(end - begin),
                    p.best + int64_t(blockIdx.y) * p.most_tokens);
        }
    }
    const int blocks = static_cast<int>(gridDim.x) * item.nlist;
    if (arrive(&item.done, 1) != blocks - 1) {
        return;
    }
    const bool bad = *static_cast<volatile int*>(&item.bad);
    for (int l = warp; l < item.nlist; l += kThreads / 32) {
        const ListState& list = item.sequence->lists[l];
        unsigned long long* best =
                p.best + int64_t(item.first_list + l) * p.most_tokens;
        const auto cell_of = [&](int64_t slot) {
            const unsigned long long packed =
                    *static_cast<volatile unsigned long long*>(best + slot - begin);
            return cell_of_scored(packed);
        };
        if (!bad) {
            list_slots(list, p.sink, begin, end, cell_of);
            for (int64_t slot = begin; list.means && slot < end; slot++) {
                const int cell = cell_of(slot);
                bool first = true;
                for (int64_t other = begin; other < slot; other++) {
                    first = first && cell_of(other) != cell;
                }
                if (first) {
                    update_mean(list, item.kv, p.d, cell, begin);
                }
            }
        }
        __syncwarp();
        for (int t = lane; t < p.most_tokens; t += 32) {
            best[t] = 0; // as the next step expects it
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (!bad) {
            item.sequence->length = after;
        }
        item.bad = 0;
        item.done = 0;
    }
}

/// A block for each list.
__global__ void __launch_bounds__(kThreads) truncate_list(TruncateParams p) {
    const ListState& list = p.sequence->lists[blockIdx.x];
    const int64_t before = p.sequence->length;
    const int64_t begin = max(p.sink, p.length - p.window);
    const int64_t end = max(p.sink, before - p.window);
    __shared__ uint32_t idle; // entries of extents that hold nothing
    if (threadIdx.x == 0) {
        idle = 0;
    }
    for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
        atomicSub(&list.count[list.cells[slot - p.sink]], 1);
    }
    __syncthreads();
    for (int c = threadIdx.x / 32; c < list.ncell; c += kThreads / 32) {
        const auto count = static_cast<uint32_t>(list.count[c]);
        const int lane = threadIdx.x % 32;
        if (lane < kExtents && extent_begin(lane) >= count &&
            list.extents[int64_t(c) * kExtents + lane] != kNoExtent) {
            atomicAdd(&idle, extent_size(lane));
        }
        if (list.newest[c] < begin) {
            continue; // lost nothing
        }
        __syncwarp();
        if (list.means) {
            add_to_mean(list, p.kv, p.d, c, 0, count);
        }
        __syncwarp();
        if (lane == 0) {
            list.newest[c] = count ? listed_slot(list, c, count - 1) : -1;
        }
    }
    __syncthreads();
    if (idle <= p.slack) {
        return;
    }
    // What idles would be missing elsewhere: list all that is left anew.
    for (int64_t i = threadIdx.x; i < int64_t(list.ncell) * kExtents;
         i += kThreads) {
        list.extents[i] = kNoExtent;
    }
    for (int c = threadIdx.x; c < list.ncell; c += kThreads) {
        list.count[c] = 0;
    }
    if (threadIdx.x == 0) {
        list.progress->used = 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        list_slots(list, p.sink, p.sink, begin, [&](int64_t slot) {
            return static_cast<int>(list.cells[slot - p.sink]);
        });
    }
}

__global__ void end_truncate(TruncateParams p) {
    p.sequence->length = p.length;
    p.sequence->assigned = min(p.sequence->assigned, static_cast<int32_t>(p.length));
    p.sequence->sought_parts = 0; // other keys may come
}

} // namespace

cudaError_t append(const AppendParams& p, cudaStream_t stream) {
    const int cell_tiles = (p.most_cells + kCells - 1) / kCells;
    if (p.most_tokens <= kFewTokens) {
        return launch(
                append_few,
                dim3(cell_tiles, p.nlist),
                kThreads,
                size_t(p.most_tokens) * p.d * sizeof(float),
                stream,
                p);
    }
    return append_many(p, stream);
}

cudaError_t truncate(const TruncateParams& p, cudaStream_t stream) {
    if (p.nlist) {
        truncate_list<<<p.nlist, kThreads, 0, stream>>>(p);
    }
    end_truncate<<<1, 1, 0, stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
