#include "append.h"

#include <algorithm>

#include "device_vectors.cuh"
#include "listed_slots.cuh"
#include "split_products.cuh"
#include "typed_vectors.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
/// Tokens that one warp lists at least.
constexpr int kPiece = 1024;

/// Eight components of a row, which begins at a multiple of 16 bytes.
struct Piece {
    uint4 bits;

    __device__ Piece(const char* row, int j)
            : bits(*reinterpret_cast<const uint4*>(row + 2 * j)) {}
    __device__ float at(int bf16, int j) const {
        return element(reinterpret_cast<const char*>(&bits), bf16, j);
    }
};

/// Refuses what does not fit, before anything is written. `bad` is 0 before.
__global__ void check_append(AppendParams p) {
    const int i = blockIdx.x;
    BatchItem& item = p.items[i];
    const int64_t length = item.sequence->length;
    const int64_t after = length + item.q_len;
    const Fault refused = after > item.sequence->capacity ? Fault::append_capacity
            : after > item.kv.length                      ? Fault::append_view
                                                          : Fault::none;
    if (threadIdx.x == 0 && blockIdx.y == 0) {
        item.begin = max(p.sink, length - p.window);
        item.end = max(p.sink, after - p.window);
    }
    if (refused != Fault::none) {
        if (threadIdx.x == 0) {
            raise(p.flag, refused, i);
            item.bad = 1;
        }
        return;
    }
    // Eight lanes for each key.
    const int lane = threadIdx.x % 8;
    const int64_t n = int64_t(item.q_len) * p.heads_kv;
    const int64_t step = int64_t(gridDim.y) * (kThreads / 8);
    for (int64_t r = blockIdx.y * (kThreads / 8) + threadIdx.x / 8;
         r - threadIdx.x % 32 / 8 < n; // warps stay together
         r += step) {
        const char* row = r < n ? key_row(
                                          item.kv,
                                          static_cast<int>(r % p.heads_kv),
                                          length + r / p.heads_kv)
                                : nullptr;
        float norm = 0;
        for (int j = 8 * lane; row && j < p.d; j += 64) {
            const Piece piece(row, j);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float x = piece.at(item.kv.bf16, e);
                norm += x * x;
            }
        }
        for (int apart = 4; apart; apart /= 2) {
            norm += __shfl_xor_sync(0xffffffffu, norm, apart);
        }
        if (lane == 0 && r < n && (!row || !isfinite(norm))) {
            raise(p.flag, row ? Fault::append_key : Fault::append_page, i);
            item.bad = 1;
        }
    }
}

__device__ __nv_bfloat16* centroids_of(const AppendParams& p, int list) {
    return p.centroids + int64_t(list) * p.most_cells * 2 * split_cols(p.d);
}

__global__ void split_centroids(AppendParams p) {
    const DeviceAssigner& key = p.lists[blockIdx.y].list->key;
    const int cols = split_cols(p.d);
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t c = i / cols, j = i % cols;
    if (c < key.ncell) {
        store_split(
                centroids_of(p, blockIdx.y) + c * 2 * cols,
                cols,
                static_cast<int>(j),
                j < p.d ? component(
                                  key.bf16 ? DType::bfloat16 : DType::float32,
                                  key.rows,
                                  c * key.padded_cols + j)
                        : 0.0f);
    }
}

/// The leaving tokens first .. first + n - 1 as their partition sees them, and
/// zeros up to `room`; by a block.
template <bool kLow>
__device__ void load_keys(
        const AppendParams& p,
        const BatchItem& item,
        const ListState& list,
        int64_t first,
        int64_t n,
        int room,
        __nv_bfloat16* to) {
    const int cols = split_cols(p.d), stride = split_stride(cols, kLow);
    const bool rotated = list.key.input == RowInput::pre_rope &&
            list.rotary.inverse_frequency;
    const int units = rotated ? p.d / 2 : p.d / 8; // of a row: pairs, or pieces
    for (int i = threadIdx.x; i < room * units; i += blockDim.x) {
        const int t = i / units, u = i % units;
        __nv_bfloat16* row = to + t * stride;
        const int64_t slot = first + t;
        const char* from =
                t < n ? key_row(item.kv, list.kv_head, slot) : nullptr;
        if (rotated) {
            const int2 at = rotary_pair(list.rotary, p.d, u);
            const float a = from ? element(from, item.kv.bf16, at.x) : 0.0f;
            const float b = from ? element(from, item.kv.bf16, at.y) : 0.0f;
            const float2 r = rotation(list.rotary, slot + p.position_offset, u);
            const float shrink = list.rotary.shrink;
            store_split<kLow>(row, cols, at.x, shrink * (a * r.x + b * r.y));
            store_split<kLow>(row, cols, at.y, shrink * (b * r.x - a * r.y));
        } else if (from) {
            const Piece piece(from, 8 * u);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                store_split<kLow>(row, cols, 8 * u + e, piece.at(item.kv.bf16, e));
            }
        } else {
            for (int e = 0; e < 8; e++) {
                store_split<kLow>(row, cols, 8 * u + e, 0);
            }
        }
    }
}

/// The best cell of each leaving token, of equal ones the lowest, into its list's
/// `cells`. A warp has 16 * M tokens.
/// @tparam N     cells of a tile
/// @tparam kLow  keys are not all of type bfloat16
template <int M, int N, bool kLow>
__global__ void __launch_bounds__(kThreads) assign_tokens(AppendParams p) {
    extern __shared__ __align__(16) __nv_bfloat16 shared[];
    const ListState& list = *p.lists[blockIdx.y].list;
    const BatchItem& item = p.items[p.lists[blockIdx.y].item];
    const int tokens = static_cast<int>(blockDim.x) / 32 * 16 * M;
    const int64_t first = item.begin + int64_t(blockIdx.x) * tokens;
    if (item.bad || first >= item.end) {
        return;
    }
    const int cols = split_cols(p.d), stride = split_stride(cols, kLow);
    load_keys<kLow>(p, item, list, first, item.end - first, tokens, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const __nv_bfloat16* mine = shared + warp * 16 * M * stride;
    LargestOfRows<M> best;
    for_each_tile<N>(
            shared + tokens * stride,
            centroids_of(p, blockIdx.y),
            list.key.ncell,
            cols,
            [&](const __nv_bfloat16* tile, int cell) {
                float score[M][N / 8][4] = {};
                multiply_split<M, N, kLow>(mine, tile, cols, score);
                best.template look<N>(
                        score, list.key.bias, cell, list.key.ncell);
            });
    best.reduce();
    if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const int64_t slot = first + warp * 16 * M + 8 * i + lane / 4;
            if (slot < item.end) {
                list.cells[slot - p.sink] =
                        static_cast<uint16_t>(best.column[i / 2][i % 2]);
            }
        }
    }
}

/// Tokens that a warp lists, one after the other. Counts per piece and cell then
/// take no more room than the tokens.
int piece_of(int most_cells) {
    return std::max(kPiece, (most_cells + 31) / 32 * 32);
}

int pieces_of(int64_t most_tokens, int most_cells) {
    const int piece = piece_of(most_cells);
    return static_cast<int>((most_tokens + piece - 1) / piece);
}

/// The piece of this warp or block.
struct PieceOfList {
    const BatchItem& item;
    const ListState& list;
    int64_t begin, end; ///< its slots
    int32_t* counts;    ///< of its cells

    __device__ PieceOfList(const AppendParams& p, int piece)
            : item(p.items[p.lists[blockIdx.y].item]),
              list(*p.lists[blockIdx.y].list),
              begin(item.begin + int64_t(blockIdx.x) * piece),
              end(item.bad ? begin : min(begin + piece, item.end)),
              counts(p.counts +
                     (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) *
                             p.most_cells) {}
    __device__ int cell(int64_t slot, int64_t sink) const {
        return list.cells[slot - sink];
    }
};

__global__ void count_cells(AppendParams p, int piece) {
    const PieceOfList mine(p, piece);
    for (int64_t slot = mine.begin + threadIdx.x; slot < mine.end;
         slot += blockDim.x) {
        atomicAdd(mine.counts + mine.cell(slot, p.sink), 1);
    }
}

/// Counts of pieces become the places of their first entries, and lists get room
/// for all of them. A thread for each cell.
__global__ void place_pieces(AppendParams p, int npiece) {
    const BatchItem& item = p.items[p.lists[blockIdx.y].item];
    const ListState& list = *p.lists[blockIdx.y].list;
    const int cell = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (item.bad || cell >= list.ncell) {
        return;
    }
    int32_t* counts =
            p.counts + int64_t(blockIdx.y) * npiece * p.most_cells + cell;
    const int32_t before = list.count[cell];
    int32_t sum = before;
    constexpr int kAhead = 8; // loads that do not wait for each other
    for (int i = 0; i < npiece; i += kAhead) {
        int32_t count[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            count[k] = i + k < npiece ? counts[int64_t(i + k) * p.most_cells] : 0;
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            if (i + k < npiece) {
                counts[int64_t(i + k) * p.most_cells] = sum;
            }
            sum += count[k];
        }
    }
    if (sum == before) {
        return;
    }
    uint32_t* extents = list.extents + int64_t(cell) * kExtents;
    for (int e = extent_of(before); e <= extent_of(sum - 1); e++) {
        // After a truncation the cell may have it still.
        if (extents[e] == kNoExtent) {
            extents[e] = atomicAdd(&list.progress->used, extent_size(e));
        }
    }
    list.count[cell] = sum;
}

/// Slots go to their places in their order; by one warp.
__global__ void __launch_bounds__(32) list_pieces(AppendParams p, int piece) {
    const PieceOfList mine(p, piece);
    const ListState& list = mine.list;
    const unsigned lane = threadIdx.x;
    for (int64_t first = mine.begin; first < mine.end; first += 32) {
        const int64_t slot = first + lane;
        const unsigned mask = __ballot_sync(0xffffffffu, slot < mine.end);
        if (slot < mine.end) {
            const int cell = mine.cell(slot, p.sink);
            const unsigned same = __match_any_sync(mask, cell);
            const int rank = __popc(same & ((1u << lane) - 1));
            volatile int32_t* next = mine.counts + cell;
            const uint32_t i = *next + rank;
            __syncwarp(mask);
            if (rank == 0) {
                *next = static_cast<int32_t>(i) + __popc(same);
            }
            const int e = extent_of(i);
            list.slots
                    [list.extents[int64_t(cell) * kExtents + e] +
                     (i - extent_begin(e))] = static_cast<int32_t>(slot);
            if (static_cast<int32_t>(i) + 1 == list.count[cell]) {
                list.newest[cell] = static_cast<int32_t>(slot);
            }
        }
        __syncwarp();
    }
}

/// A warp for each cell.
__global__ void __launch_bounds__(kThreads) update_means(AppendParams p) {
    const BatchList& at = p.lists[blockIdx.y];
    const BatchItem& item = p.items[at.item];
    const ListState& list = *at.list;
    if (item.bad || !list.means || item.begin == item.end) {
        return;
    }
    for (int c = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; c < list.ncell;
         c += gridDim.x * (kThreads / 32)) {
        if (list.count[c] && list.newest[c] >= item.begin) {
            update_mean(list, item.kv, p.d, c, item.begin);
        }
    }
}

__global__ void end_append(AppendParams p) {
    for (int i = threadIdx.x; i < p.nitem; i += blockDim.x) {
        if (!p.items[i].bad) {
            p.items[i].sequence->length += p.items[i].q_len;
        }
        p.items[i].bad = 0;
    }
}

/// Launches assign_tokens if its tiles fit into the device's shared memory.
template <int M, int N, bool kLow>
bool assign_if_it_fits(
        const AppendParams& p,
        int warps,
        size_t most,
        cudaStream_t stream) {
    const int tokens = warps * 16 * M;
    const int cols = split_cols(p.d);
    const size_t bytes = sizeof(__nv_bfloat16) *
            (size_t(tokens) * split_stride(cols, kLow) +
             size_t(2 * N) * split_stride(cols));
    if (bytes > most) {
        return false;
    }
    cudaFuncSetAttribute(
            assign_tokens<M, N, kLow>,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(bytes));
    const dim3 grid((p.most_tokens + tokens - 1) / tokens, p.nlist);
    assign_tokens<M, N, kLow><<<grid, 32 * warps, bytes, stream>>>(p);
    return true;
}

template <bool kLow>
void assign(const AppendParams& p, cudaStream_t stream) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(
            &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    bool done = assign_if_it_fits<2, 32, kLow>(p, kThreads / 32, most, stream);
    for (int warps = kThreads / 32; !done && warps > 0; warps /= 2) {
        done = assign_if_it_fits<1, 32, kLow>(p, warps, most, stream);
    }
}

} // namespace

int64_t append_centroids(int nlist, int most_cells, int d) {
    return int64_t(nlist) * most_cells * 2 * split_cols(d);
}

int64_t append_counts(int nlist, int64_t most_tokens, int most_cells) {
    return int64_t(nlist) * pieces_of(most_tokens, most_cells) * most_cells;
}

cudaError_t append_many(const AppendParams& p, cudaStream_t stream) {
    const auto blocks = [](int64_t n, int each) {
        return static_cast<unsigned>((n + each - 1) / each);
    };
    const unsigned key_blocks = std::min(
            blocks(int64_t(p.most_tokens) * p.heads_kv, kThreads / 8), 1024u);
    check_append<<<dim3(p.nitem, key_blocks), kThreads, 0, stream>>>(p);
    split_centroids<<<
            dim3(blocks(int64_t(p.most_cells) * split_cols(p.d), kThreads),
                 p.nlist),
            kThreads,
            0,
            stream>>>(p);
    p.keys_are_bf16 ? assign<false>(p, stream) : assign<true>(p, stream);

    const int piece = piece_of(p.most_cells);
    const int npiece = pieces_of(p.most_tokens, p.most_cells);
    const dim3 pieces(npiece, p.nlist);
    cudaMemsetAsync(
            p.counts,
            0,
            append_counts(p.nlist, p.most_tokens, p.most_cells) *
                    sizeof(*p.counts),
            stream);
    count_cells<<<pieces, kThreads, 0, stream>>>(p, piece);
    place_pieces<<<
            dim3(blocks(p.most_cells, kThreads), p.nlist),
            kThreads,
            0,
            stream>>>(p, npiece);
    list_pieces<<<pieces, 32, 0, stream>>>(p, piece);
    if (p.keeps_means) {
        update_means<<<
                dim3(blocks(p.most_cells, kThreads / 32), p.nlist),
                kThreads,
                0,
                stream>>>(p);
    }
    end_append<<<1, 128, 0, stream>>>(p);
    return cudaGetLastError();
}

} // namespace faiss_saap::gpu
