/// The kernel of decode(). Included by the files that instantiate it for one head
/// dimension.
///
/// A cluster of blocks has a row: a KV head of one sequence. Each block scores its share
/// of the cells, and all tell each other what they have found: first the sums that
/// scores are weighed by and the best cell of the key that leaves the window, then each
/// cell's mass per key. So each block takes the same cells and attends to its share of
/// the keys; sink and window are read while the blocks wait for each other. At the
/// end they exchange their results.
#pragma once

#include "decode.h"

#include <algorithm>

#include "append_one.cuh"
#include "device_vectors.cuh"
#include "far_keys.cuh"
#include "launch.h"
#include "multiply_rows.cuh"
#include "take_cells.cuh"
#include "team.cuh"
#include "tile_stream.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 16; ///< of a row
/// Cells and extents of each whose places a block keeps at hand.
constexpr int kCellsAtHand = 64, kExtentsAtHand = 6;

/// Between the results of two queries, which spreads the banks.
template <int D>
constexpr int kResultStride = D + 4;

/// Where arrays begin in a block's shared memory, in bytes; alike in all blocks of a row,
/// as they write into each other's.
struct DecodeLayout {
    int group = 0, cells = 0, padded_cells = 0; ///< cells: of a block at most
    int queries = 0;  ///< as the cache's type, for the tensor cores
    int tiles = 0;    ///< of keys and values, for each warp that attends; then its results
    int tile_warps = 0;
    int keys = 0;     ///< cell_keys of all cells: padded_cells
    int counts = 0;   ///< and their far keys
    int found = 0;    ///< best cell of the leaving key by each block
    int partial = 0;  ///< sum of exp and largest by each block, for each head
    int at_best = 0;  ///< a head's score of the block's best cell of the leaving key
    int x = 0, hidden = 0, activated = 0, leaving = 0; ///< vectors, while cells are scored
    int taken = 0; ///< then the cells that are read, and where the keys of each begin
    int scores = 0, key_scores = 0; ///< of the block's cells, or units of a layer
    int own_counts = 0;
    int results = 0;  ///< of this block's share of the output, from each block
    int sums = 0;     ///< largest and sum of each block, for each head; twice: of
                      ///< all keys and of sink and window
    int weights = 0;  ///< of the blocks' results
    int bytes = 0;

    /// @param warps  that attend
    template <class T, int D>
    static DecodeLayout of(const DecodeParams& p, int blocks, int warps) {
        DecodeLayout l;
        l.group = p.heads_q / p.heads_kv;
        l.cells = share(p.most_cells, blocks);
        l.padded_cells = 32;
        while (l.padded_cells < p.most_cells) {
            l.padded_cells *= 2;
        }
        using Stream = TileStream<T, D>;
        constexpr int kOfWarp = 2 * Stream::kTile * int(sizeof(T));
        static_assert(kOfWarp >= kStreamQueries * kResultStride<D> * int(sizeof(float)));
        l.tile_warps = warps;
        l.queries = l.take(kStreamQueries * Stream::kStride * int(sizeof(T)));
        l.tiles = l.take(warps * kOfWarp);
        l.keys = l.take(8 * l.padded_cells);
        l.counts = l.take(4 * p.most_cells);
        l.found = l.take(8 * blocks);
        l.partial = l.take(8 * blocks * l.group);
        l.at_best = l.take(4 * blocks * l.group);
        l.scores = l.take(4 * l.group * l.cells);
        l.key_scores = l.take(4 * l.cells);
        l.own_counts = l.take(4 * l.cells);
        l.results = l.take(16 * blocks * share(l.group * D / 4, blocks));
        l.sums = l.take(2 * 8 * blocks * l.group);
        l.weights = l.take(4 * (blocks + 1) * l.group);
        l.x = l.take(4 * l.group * p.most_cols);
        l.hidden = l.take(4 * l.group * p.most_width);
        l.activated = l.take(4 * l.group * p.most_width);
        l.leaving = l.take(4 * D);
        l.taken = l.x;
        l.bytes = std::max(l.bytes, l.x + 8 * p.most_cells);
        return l;
    }
    /// What each block has of n things.
    FAISS_SAAP_HOST_DEVICE static int share(int n, int blocks) {
        return (n + blocks - 1) / blocks;
    }

   private:
    int take(int n) {
        const int at = bytes;
        bytes += (n + 15) / 16 * 16;
        return at;
    }
};

/// What a step of a row is about. In shared memory, as it is wanted rarely and registers
/// are few.
struct DecodeStep {
    int64_t length = 0; ///< of the sequence, with the token of this step
    Fault refused = Fault::none;
    int leaving = 0; ///< the slot that leaves the window; -1: none
    int far = 0;     ///< keys that there are
    int sinks = 0, window_begin = 0;
    int dense = 0; ///< keys of sink and window that are read
    int readable = 0; ///< the caller's view has all slots
    int attends = 0;
    int takes_all = 0; ///< far keys are so few
};

struct DecodeArguments {
    DecodeParams params;
    DecodeLayout layout;
};

/// A largest and a sum as one word.
__device__ __forceinline__ float2 as_floats(unsigned long long x) {
    return make_float2(
            __uint_as_float(static_cast<uint32_t>(x)),
            __uint_as_float(static_cast<uint32_t>(x >> 32)));
}
__device__ __forceinline__ unsigned long long as_word(float x, float y) {
    return static_cast<unsigned long long>(__float_as_uint(y)) << 32 |
            __float_as_uint(x);
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}
__device__ __forceinline__ float most_of_warp(float x) {
    return of_ordered(__reduce_max_sync(0xffffffffu, ordered(x)));
}

/// Copies between memories, by a block.
template <class S>
__device__ __forceinline__ void copy_words(S* to, const S* from) {
    static_assert(sizeof(S) % 4 == 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < int(sizeof(S) / 4); i += kThreads) {
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
}

/// Brings a block's rows of a matrix nearer. Weights never change: this may be done
/// before the kernels before have ended.
__device__ __forceinline__ void prefetch_products(const RowProducts& p) {
    const int of_row = p.cols * (p.bf16 ? 2 : 4), all = (p.end - p.first) * of_row;
#pragma unroll 1
    for (int h = 0; h < p.heads; h++) {
        const char* rows = static_cast<const char*>(p.rows) +
                (int64_t(h) * p.nrow + p.first) * of_row;
#pragma unroll 1
        for (int i = 128 * threadIdx.x; i < all; i += 128 * kThreads) {
            prefetch(rows + i);
        }
    }
}

/// A block's rows of what scores cells: the layers of a query assigner, the last of
/// which gives the scores, and then the key assigner.
__device__ __forceinline__ RowProducts products_of(
        const ListState& list,
        int layer,
        int layers,
        int group) {
    const bool of_key = layer > layers, scores = layer >= layers;
    const DeviceAssigner& a = of_key ? list.key : list.query;
    RowProducts p;
    p.rows = scores ? a.rows : a.layer[layer];
    p.bias = scores ? a.bias : a.layer_bias[layer];
    p.bf16 = a.bf16;
    p.nrow = scores ? a.ncell : a.width;
    p.cols = scores ? a.padded_cols : layer == 0 ? a.padded_d : a.padded_width;
    const bool per_head = (layer == 0 && layers) || a.networks > 1;
    p.heads = per_head && !of_key ? group : 1;
    p.n = p.heads > 1 || of_key ? 1 : group;
    const int each = DecodeLayout::share(p.nrow, gridDim.x);
    p.first = min(p.nrow, static_cast<int>(blockIdx.x) * each);
    p.end = min(p.nrow, p.first + each);
    return p;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
        decode_kernel(const __grid_constant__ DecodeArguments arguments) {
    let_next_begin();
    const DecodeParams& p = arguments.params;
    const DecodeLayout& layout = arguments.layout;
    using Stream = TileStream<T, D>;
    __shared__ BatchRow row;
    __shared__ DeviceView kv;
    __shared__ __align__(8) char view_bytes[sizeof(StreamView)];
    __shared__ ListState list;
    __shared__ Selection selection;
    __shared__ float norm[kMaxGroup];
    __shared__ DecodeStep step;
    __shared__ RowProducts products[kMaxLayers + 2];
    __shared__ int refused_by, leaving_cell, leaving_at;
    __shared__ unsigned long long barriers[2];
    __shared__ uint32_t extents_at_hand[kCellsAtHand * kExtentsAtHand];
    __shared__ float2 dense_sums[kWarps][kStreamQueries], all_sums[kWarps][kStreamQueries];
    extern __shared__ __align__(16) char shared[];
    const auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };
    const auto words = [&](int at) {
        return reinterpret_cast<unsigned long long*>(shared + at);
    };
    const int blocks = gridDim.x, rank = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = layout.group, tile_warps = layout.tile_warps;
    T* queries = reinterpret_cast<T*>(shared + layout.queries);
    auto* keys = words(layout.keys);
    auto* counts = reinterpret_cast<int32_t*>(shared + layout.counts);
    auto* own_counts = reinterpret_cast<int32_t*>(shared + layout.own_counts);
    auto* taken_cells = reinterpret_cast<int2*>(shared + layout.taken);

    // What never changes during a step.
    copy_words(&row, p.rows + blockIdx.y);
    TeamExchange exchange;
    exchange.begin(barriers);
#pragma unroll 1
    for (int i = threadIdx.x; i < kStreamQueries * Stream::kStride / 2; i += kThreads) {
        reinterpret_cast<uint32_t*>(queries)[i] = 0;
    }
    clear_selection(selection, p.nprobe);
    if (threadIdx.x == 0) {
        refused_by = 0;
        leaving_at = -1;
    }
    __syncthreads();
    copy_words(&kv, &p.items[row.item].kv);
    copy_words(&list, row.lists);
    __syncthreads();
    auto& view = *reinterpret_cast<StreamView*>(view_bytes);
    if (threadIdx.x == 0) {
        view = StreamView(kv, row.kv_head);
    }
    const DeviceAssigner& query = list.query;
    const int layers = query.input == RowInput::hidden ? 1 + 2 * query.depth : 0;
    const int nproduct = layers + (p.appends ? 2 : 1);
    if (threadIdx.x < nproduct) {
        products[threadIdx.x] = products_of(list, threadIdx.x, layers, group);
    }
    __syncthreads();
    RowPieces pieces_at_hand;
    load_first_pieces(products[0], pieces_at_hand);
    // As far as the length can be known now, what is read of it first is brought nearer:
    // this block's part of sink and window, and the new keys.
    const int64_t guess = __ldcg(&row.sequence->length);
#pragma unroll 1
    for (int layer = 0; layer < nproduct; layer++) {
        prefetch_products(products[layer]);
    }
    // What others do not write of what is multiplied and taken.
    const int ncell = query.ncell;
#pragma unroll 1
    for (int c = ncell + threadIdx.x; c < layout.padded_cells; c += kThreads) {
        keys[c] = 0;
    }
    const int stride = layers ? query.padded_d : query.padded_cols;
    const int padding = layers ? query.padded_width - query.width : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < group * padding; i += kThreads) {
        const int at = i / padding * query.padded_width + query.width + i % padding;
        floats(layout.hidden)[at] = floats(layout.activated)[at] = 0;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < group * (stride - D); i += kThreads) {
        floats(layout.x)[i / (stride - D) * stride + D + i % (stride - D)] = 0;
    }
    {
        constexpr int kLines = (D * int(sizeof(T)) + 127) / 128;
        constexpr int64_t kMostPrefetched = 1024; // keys of this block
        const int64_t reads = min(guess, p.sink + p.window); // of sink and window
        const int64_t each = (reads + blocks - 1) / blocks;
#pragma unroll 1
        for (int i = threadIdx.x; i < 2 * kLines * min(each, kMostPrefetched);
             i += kThreads) {
            const int64_t k = rank * each + i / (2 * kLines);
            const int64_t slot = k < p.sink ? k : guess - reads + k;
            if (k < reads && slot < row.view_length) {
                const char* at = i % 2 ? value_row(kv, row.kv_head, slot)
                                       : key_row(kv, row.kv_head, slot);
                if (at) {
                    prefetch(at + 128 * (i / 2 % kLines));
                }
            }
        }
        if (p.appends && guess < row.view_length && warp < p.heads_kv && lane < kLines) {
            const char* at = key_row(kv, warp, guess);
            if (at) {
                prefetch(at + 128 * lane);
            }
        }
    }
    const int own_most = DecodeLayout::share(ncell, blocks);
    const int first = min(ncell, rank * own_most), own = min(own_most, ncell - first);
    exchange.await_begin();
    wait_for_previous();

    const int64_t before = __ldcg(&row.sequence->length);
    const int64_t capacity = __ldcg(&row.sequence->capacity);
    const T* of_query = static_cast<const T*>(p.queries) +
            (int64_t(row.query) * p.heads_q + row.kv_head * group) * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < group * Stream::kChunks; i += kThreads) {
        const int g = i / Stream::kChunks, c = i % Stream::kChunks;
        copy_16_bytes(queries + g * Stream::kStride + 8 * c, of_query + g * D + 8 * c, true);
    }
    commit_copies();
#pragma unroll 1
    for (int c = threadIdx.x; c < own; c += kThreads) {
        own_counts[c] = __ldcg(list.count + first + c);
    }
    const int64_t length = before + (p.appends ? 1 : 0);
    const int64_t leaving =
            p.appends ? leaving_slot(before, p.sink, p.window) : int64_t(-1);
    const Reach reach = reach_of(length, 1, 0, p.sink, p.window);
    const bool readable = length <= row.view_length;
    Fault refused = Fault::none;
    if (p.appends) {
        refused = length > capacity ? Fault::append_capacity
                : !readable        ? Fault::append_view
                                   : Fault::none;
        // Every block looks at the new keys, so that all agree.
        if (refused == Fault::none) {
#pragma unroll 1
            for (int h0 = 2 * (kWarps - 1 - warp); h0 < p.heads_kv; h0 += 2 * kWarps) {
                const int h = h0 + lane / 16;
                const bool is = h < p.heads_kv;
                const Fault fault =
                        fault_of_key(is ? key_row(kv, h, before) : nullptr, D, p.bf16);
                if (is && fault != Fault::none) {
                    // The worse one of two, whoever is first.
                    atomicMax(&refused_by, static_cast<int>(fault));
                }
            }
        }
    }
    const bool rotates = query.input != RowInput::post_rope;
#pragma unroll 1
    for (int i = threadIdx.x; i < (group + (leaving >= 0)) * (D / 2); i += kThreads) {
        const int g = i / (D / 2), pair = i % (D / 2);
        const bool is_key = g == group;
        load_vector(
                list.rotary,
                D,
                (is_key ? leaving : length - 1) + p.position_offset,
                is_key ? list.key.input == RowInput::pre_rope : rotates,
                is_key ? key_row(kv, row.kv_head, leaving)
                       : reinterpret_cast<const char*>(of_query + g * D),
                p.bf16,
                pair,
                D / 2,
                is_key ? floats(layout.leaving) : floats(layout.x) + g * stride);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (threadIdx.x == 0) {
        step.length = length;
        step.refused =
                refused == Fault::none ? static_cast<Fault>(refused_by) : refused;
        step.leaving = static_cast<int>(leaving);
        step.far = static_cast<int>(reach.far_keys());
        step.sinks = static_cast<int>(reach.sink_end);
        step.window_begin = static_cast<int>(reach.window_begin);
        step.readable = readable;
        step.attends = readable && step.refused == Fault::none;
        step.dense = p.attend_dense && step.attends
                ? step.sinks + static_cast<int>(reach.window_end) - step.window_begin
                : 0;
        step.takes_all = reach.far_keys() <= p.dense_below;
    }
    __syncthreads();

    Stream stream;
    {
        constexpr int kTileBytes = Stream::kTile * int(sizeof(T));
        stream.load_queries(shared_address(queries));
        stream.keys = shared_address(shared) + layout.tiles +
                min(warp, tile_warps - 1) * 2 * kTileBytes;
        stream.values = stream.keys + kTileBytes;
        stream.kv = &view;
        stream.scale = p.scale * 1.44269504088896340736f;
    }
    bool bad_page = false;
    const int& taken = selection.taken;
    const int& far_taken = selection.keys;
    float* scores = floats(layout.scores);

    // Sink and window first, while cells are scored and taken; then their keys.
#pragma unroll 1
    for (int far = 0; far < 2; far++) {
        // Among the cells that are taken.
        int at = 0, first_cell = 0, cells_at_hand = 0;
        const auto cell_of_key = [&](int i) { // the last one that begins at or before it
            int low = 0, high = taken - 1;
            while (low < high) {
                const int middle = (low + high + 1) / 2;
                const bool begins = taken_cells[middle].y <= i;
                low = begins ? middle : low;
                high = begins ? high : middle - 1;
            }
            return low;
        };
        const auto slot_of = [&](int i) {
            if (!far) {
                return i >= step.dense ? -1
                        : i < step.sinks ? i
                                         : step.window_begin + i - step.sinks;
            }
            if (i >= far_taken) {
                return -1;
            }
            if (i == leaving_at) { // it may not be listed yet
                return step.leaving;
            }
            while (at + 1 < taken && taken_cells[at + 1].y <= i) {
                at++;
            }
            const int2 cell = taken_cells[at];
            const auto entry = static_cast<uint32_t>(i - cell.y);
            const int e = extent_of(entry), near = at - first_cell;
            const uint32_t extent = e < kExtentsAtHand && near < cells_at_hand
                    ? extents_at_hand[near * kExtentsAtHand + e]
                    : __ldcg(list.extents + int64_t(cell.x) * kExtents + e);
            return __ldcg(list.slots + extent + (entry - extent_begin(e)));
        };
        if (far) {
            exchange.wait();
            // log of the sum over all keys, of each head; the leaving key counts in its
            // cell.
#pragma unroll 1
            for (int g = warp; g < group; g += kWarps) {
                const bool is = lane < blocks;
                const float2 of_block = is
                        ? as_floats(words(layout.partial)[g * blocks + lane])
                        : make_float2(0, -INFINITY);
                const unsigned long long best =
                        is && step.leaving >= 0 ? words(layout.found)[lane] : 0;
                const unsigned long long best_of_all = largest_of_warp(best);
                const bool mine = best && best == best_of_all;
                const float added = mine
                        ? p.scale * floats(layout.at_best)[g * blocks + lane]
                        : -INFINITY;
                const float most = most_of_warp(fmaxf(of_block.y, added));
                float sum = 0;
                if (most > -INFINITY) {
                    sum = (of_block.x > 0 ? of_block.x * __expf(of_block.y - most)
                                          : 0.0f) +
                            (mine ? __expf(added - most) : 0.0f);
                }
                sum = sum_of_warp(sum);
                if (lane == 0) {
                    norm[g] = most > -INFINITY ? most + __logf(sum) : 0.0f;
                    if (g == 0) {
                        leaving_cell =
                                step.leaving >= 0 ? cell_of_scored(best_of_all) : -1;
                    }
                }
            }
            __syncthreads();
            // log of the mass per key, of which the group's heads are summed: four lanes
            // have a cell, and every fourth head of it; then each tells every fourth block.
#pragma unroll 1
            for (int i0 = 0; i0 < 4 * own; i0 += kThreads) { // whole warps
                const int i = i0 + static_cast<int>(threadIdx.x), part = i % 4;
                const int c = min(i / 4, own - 1), cell = first + c;
                const int count = own_counts[c] + (cell == leaving_cell);
                float y[kStreamQueries / 4], most = -INFINITY, sum = 0;
#pragma unroll
                for (int j = 0; j < kStreamQueries / 4; j++) {
                    const int g = part + 4 * j;
                    y[j] = g < group ? p.scale * scores[g * layout.cells + c] - norm[g]
                                     : -INFINITY;
                    most = fmaxf(most, y[j]); // passes over NaN
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
#pragma unroll
                for (int j = 0; j < kStreamQueries / 4; j++) {
                    sum += y[j] > -INFINITY ? __expf(y[j] - most) : 0.0f;
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                const float mass = most > -INFINITY ? most + __logf(sum) : -INFINITY;
                const unsigned long long key =
                        count ? cell_key(step.takes_all ? 0 : mass, cell) : 0ull;
#pragma unroll 1
                for (int b = part; i < 4 * own && b < blocks; b += 4) {
                    exchange.send(keys + cell, b, key);
                    exchange.send(counts + cell, b, count);
                }
            }
            if (threadIdx.x == 0) {
                exchange.expect(list.query.ncell * 12);
            }
            exchange.wait();
            // Every block takes the same cells.
            const int far_keys = step.attends ? step.far : 0;
            if (far_keys > 0 && (step.takes_all || p.share != 0)) {
                const int64_t most =
                        min(p.max_keys, static_cast<int64_t>(p.max_selectivity * far_keys));
                const int64_t limit = step.takes_all || most >= far_keys
                        ? far_keys
                        : static_cast<int64_t>(p.share * most + 1e-9);
                // A mass per key is at most 1, and few matter that are below exp(-24).
                take_cells(
                        selection,
                        Bins{0, Selection::kBins / 24.0f},
                        keys,
                        layout.padded_cells,
                        counts,
                        step.takes_all ? list.query.ncell : p.nprobe,
                        static_cast<int>(limit),
                        /*at_least_one=*/true,
                        [&](int i, int cell, int count, int begin) {
                            taken_cells[i] = make_int2(cell, begin);
                            if (cell == leaving_cell) { // its newest key
                                leaving_at = begin + count - 1;
                            }
                        });
            } else if (threadIdx.x == 0) {
                selection.taken = selection.keys = 0;
            }
            __syncthreads();
        }
        // This block's share of the keys.
        const int n = far ? far_taken : step.dense;
        const int tiles = (n + kStreamKeys - 1) / kStreamKeys;
        const int tiles_each = DecodeLayout::share(tiles, blocks);
        const int first_tile = min(tiles, rank * tiles_each);
        const int end = min(tiles, first_tile + tiles_each);
        const int tile = warp < tile_warps ? first_tile + warp : end;
        if (far && first_tile < end) {
            first_cell = cell_of_key(first_tile * kStreamKeys);
            cells_at_hand = min(kCellsAtHand, taken - first_cell);
#pragma unroll 1
            for (int i = threadIdx.x; i < cells_at_hand * kExtentsAtHand; i += kThreads) {
                extents_at_hand[i] = __ldcg(
                        list.extents +
                        int64_t(taken_cells[first_cell + i / kExtentsAtHand].x) * kExtents +
                        i % kExtentsAtHand);
            }
            at = cell_of_key(min(n - 1, tile * kStreamKeys + lane % kStreamKeys));
            __syncthreads();
        }
        if (tile < end) {
            const int key = tile * kStreamKeys + lane % kStreamKeys;
            const int slot = slot_of(key);
            bad_page |= stream.start(
                    slot,
                    tile + tile_warps < end ? slot_of(key + tile_warps * kStreamKeys) : -1);
        }
        if (!far) {
            // Scores of this block's cells for each query head, and for the leaving key.
            const float* x = floats(layout.x);
#pragma unroll 1
            for (int layer = 0; layer < nproduct; layer++) {
                const RowProducts& product = products[layer];
                // in; then up and down of each block, which adds to what was; then scores.
                const bool hides = layer < layers, up = layer % 2;
                float* y = up ? floats(layout.activated) : floats(layout.hidden);
                float* alone = layer > layers ? floats(layout.key_scores) : scores;
                multiply_rows(
                        product,
                        pieces_at_hand,
                        layer > layers ? floats(layout.leaving) : x,
                        hides && layer && !up ? y : nullptr,
                        query.padded_width,
                        [&](int v, int r, float value, int second) {
                            if (!hides) {
                                alone[v * layout.cells + r - product.first] = value;
                                return;
                            }
                            value = up ? fmaxf(value, 0.0f) : value;
#pragma unroll 4
                            for (int b = second; b < blocks; b += 2) {
                                exchange.send(y + v * query.padded_width + r, b, value);
                            }
                        });
                if (layer + 1 < nproduct) {
                    load_first_pieces(products[layer + 1], pieces_at_hand);
                }
                if (hides) {
                    x = y;
                    if (threadIdx.x == 0) {
                        exchange.expect(4 * group * query.width);
                    }
                    exchange.wait();
                }
            }
            __syncthreads();
            // The block's best cell for the leaving key.
            if (warp == kWarps - 1 && step.leaving >= 0) {
                unsigned long long best = 0;
#pragma unroll 1
                for (int c = lane; c < own; c += 32) {
                    best = max(best, scored_cell(floats(layout.key_scores)[c], first + c));
                }
                best = largest_of_warp(best);
                const int cell = best ? cell_of_scored(best) - first : 0;
                if (lane < blocks) {
                    exchange.send(words(layout.found) + rank, lane, best);
                }
                if (lane < group) {
                    exchange.send_to_all(
                            floats(layout.at_best) + lane * blocks + rank,
                            scores[lane * layout.cells + cell]);
                }
            }
            // Of each head, the largest score of the block's keys and the sum of all
            // exponentials beside it.
#pragma unroll 1
            for (int g = warp; g < group; g += kWarps) {
                const float* mine = scores + g * layout.cells;
                float most = -INFINITY;
                bool bad = false;
#pragma unroll 4
                for (int c = lane; c < own; c += 32) {
                    bad = bad || !(mine[c] < INFINITY);
                    most = own_counts[c] ? fmaxf(most, p.scale * mine[c]) : most;
                }
                if (bad && !step.takes_all) {
                    raise(p.flag, Fault::route_query, row.query);
                }
                most = most_of_warp(most);
                float sum = 0;
#pragma unroll 4
                for (int c = lane; c < own; c += 32) {
                    const auto keys_of = static_cast<float>(own_counts[c]);
                    sum += keys_of > 0 && most > -INFINITY
                            ? keys_of * __expf(p.scale * mine[c] - most)
                            : 0.0f;
                }
                sum = sum_of_warp(sum);
                if (lane < blocks) {
                    exchange.send(
                            words(layout.partial) + g * blocks + rank,
                            static_cast<unsigned>(lane),
                            as_word(sum, most));
                }
            }
            if (threadIdx.x == 0) {
                const int of_leaving = step.leaving >= 0 ? 8 + 4 * group : 0;
                exchange.expect(blocks * (8 * group + of_leaving));
            }
            stream.clear();
        }
        bad_page |= stream.attend(tile, end, tile_warps, slot_of);
        if (!far && p.out.stats && warp < tile_warps) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float sum = Stream::sum_of_query(stream.sum[i]);
                if (lane < 4) {
                    dense_sums[warp][2 * lane + i] = make_float2(sum, stream.largest[i]);
                }
            }
        }
    }
    stream.end();
    if (bad_page) {
        raise(p.flag, p.appends ? Fault::append_page : Fault::attend_page, row.item);
    }

    // The results of the block's warps, then those of the row's blocks: each block has a
    // share of the output.
    constexpr int kStride = kResultStride<D>;
    const auto results_of = [&](int w) {
        return floats(layout.tiles + w * 2 * Stream::kTile * int(sizeof(T)));
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = lane % 4 * 2 + i;
        if (q >= group || warp >= tile_warps) {
            continue;
        }
        if (lane < 4) {
            all_sums[warp][q] = make_float2(stream.sum[i], stream.largest[i]);
        }
        float* to = results_of(warp) + q * kStride + lane / 4;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            to[16 * j] = stream.o[j][i];
            to[16 * j + 8] = stream.o[j][2 + i];
        }
    }
    __syncthreads();
    // Four threads have each piece of 16 bytes, and every fourth warp's of it.
    const int pieces = group * D / 4, pieces_each = DecodeLayout::share(pieces, blocks);
#pragma unroll 1
    for (int i0 = 0; i0 < 4 * pieces; i0 += kThreads) { // whole warps
        const int i = (i0 + static_cast<int>(threadIdx.x)) / 4, part = threadIdx.x % 4;
        const int q = min(i, pieces - 1) / (D / 4);
        float most = -INFINITY;
#pragma unroll 4
        for (int w = part; w < tile_warps; w += 4) {
            most = fmaxf(most, all_sums[w][q].y);
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const float shift = most == -INFINITY ? 0.0f : most;
        float total = 0, of_dense = 0;
        float o[4] = {};
#pragma unroll 4
        for (int w = part; w < tile_warps; w += 4) {
            const float weight = exp2f(all_sums[w][q].y - shift);
            total += weight * all_sums[w][q].x;
            if (p.out.stats) {
                of_dense += exp2f(dense_sums[w][q].y - shift) * dense_sums[w][q].x;
            }
            const auto from = *reinterpret_cast<const float4*>(
                    results_of(w) + q * kStride + 4 * (min(i, pieces - 1) % (D / 4)));
            o[0] += weight * from.x;
            o[1] += weight * from.y;
            o[2] += weight * from.z;
            o[3] += weight * from.w;
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, step);
            of_dense += __shfl_xor_sync(0xffffffffu, of_dense, step);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                o[j] += __shfl_xor_sync(0xffffffffu, o[j], step);
            }
        }
        if (i >= pieces) {
            continue;
        }
        const int owner = i / pieces_each;
        auto* to = words(layout.results) + 2 * (rank * pieces_each + i - owner * pieces_each);
        if (part < 2) {
            exchange.send(
                    to + part,
                    owner,
                    part ? as_word(o[2], o[3]) : as_word(o[0], o[1]));
        }
        if (i % (D / 4) == 0 && (part % 2 == 0 || p.out.stats)) {
            const auto sums = part % 2 ? as_word(of_dense, most) : as_word(total, most);
            auto* at = words(layout.sums) + (part % 2 * group + q) * blocks + rank;
#pragma unroll 1
            for (int b = part / 2; b < blocks; b += 2) {
                exchange.send(at, b, sums);
            }
        }
    }
    // The caller's result, before any block overwrites it.
    const int64_t first_out = int64_t(row.query) * p.heads_q + row.kv_head * group;
    constexpr float kLog2 = 1.44269504088896340736f;
    const float lse = p.out.merge && lane < group ? p.out.lse[first_out + lane] : -INFINITY;
    if (threadIdx.x == 0) {
        const int own_pieces = max(0, min(pieces_each, pieces - rank * pieces_each));
        exchange.expect(
                blocks * (16 * own_pieces + 8 * group * (p.out.stats ? 2 : 1)));
    }
    // The first block lists the leaving key while it waits.
    if (p.appends && rank == 0 && threadIdx.x == kThreads - 1) {
        if (step.leaving >= 0 && step.refused == Fault::none) {
            end_listing(
                    list,
                    begin_listing(
                            list,
                            leaving_cell,
                            step.leaving,
                            __ldcg(list.count + leaving_cell)),
                    p.sink);
        }
        // The last of the sequence's rows tells its length: all know what it was.
        if (atomicAdd(&p.items[row.item].done, 1) == p.heads_kv - 1) {
            p.items[row.item].done = 0;
            if (step.refused == Fault::none) {
                row.sequence->length = step.length;
            }
        }
    }
    exchange.wait();
#pragma unroll 1
    for (int q = warp; q < group; q += kWarps) {
        const bool is = lane < blocks;
        const float of_caller = __shfl_sync(0xffffffffu, lse, q);
        const float2 of_block = is ? as_floats(words(layout.sums)[q * blocks + lane])
                : lane == blocks   ? make_float2(1, kLog2 * of_caller)
                                   : make_float2(0, -INFINITY);
        const float most = most_of_warp(of_block.y);
        const float shift = most == -INFINITY ? 0.0f : most;
        const float weight = exp2f(of_block.y - shift);
        const float total = sum_of_warp(weight * of_block.x);
        const float each = total > 0 ? 1 / total : 0.0f;
        if (lane <= blocks) {
            floats(layout.weights)[q * (blocks + 1) + lane] = each * weight;
        }
        if (rank == 0 && step.refused == Fault::none) {
            if (lane == 0 && p.out.lse) {
                p.out.lse[first_out + q] =
                        total > 0 ? (shift + log2f(total)) / kLog2 : -INFINITY;
            }
            if (p.out.stats) {
                const float2 of_dense = is
                        ? as_floats(words(layout.sums)[(group + q) * blocks + lane])
                        : make_float2(0, -INFINITY);
                const float mass = sum_of_warp(exp2f(of_dense.y - shift) * of_dense.x);
                if (lane == 0) {
                    AttendStats& stats = p.out.stats[first_out + q];
                    stats.cells = taken;
                    stats.keys_read = far_taken;
                    stats.far_keys = step.far;
                    stats.dense_mass = each * mass;
                }
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces_each; i += kThreads) {
        const int piece = rank * pieces_each + i;
        if (piece >= pieces || step.refused != Fault::none) {
            break;
        }
        const float* weights = floats(layout.weights) + piece / (D / 4) * (blocks + 1);
        auto* to = reinterpret_cast<float4*>(p.out.output + first_out * D) + piece;
        float4 o = make_float4(0, 0, 0, 0);
        if (weights[blocks] > 0) { // else it may hold anything
            o = *to;
            o.x *= weights[blocks];
            o.y *= weights[blocks];
            o.z *= weights[blocks];
            o.w *= weights[blocks];
        }
#pragma unroll 4
        for (int b = 0; b < blocks; b++) {
            const float4 y = reinterpret_cast<const float4*>(
                    shared + layout.results)[b * pieces_each + i];
            o.x += weights[b] * y.x;
            o.y += weights[b] * y.y;
            o.z += weights[b] * y.z;
            o.w += weights[b] * y.w;
        }
        *to = o;
    }
    if (rank == 0 && threadIdx.x == 0 && row.kv_head == 0) {
        if (step.refused != Fault::none) {
            raise(p.flag, step.refused, row.item);
        } else if (!step.readable) {
            raise(p.flag, Fault::attend_view, row.item);
        }
    }
}

/// The layout that rows of so many blocks have, with as many warps that attend as have
/// room; no blocks: there is none.
template <class T, int D>
DecodeLayout layout_of(const DecodeParams& p, int room, int blocks) {
    DecodeLayout layout;
    int warps = kWarps;
    do {
        layout = DecodeLayout::of<T, D>(p, blocks, warps);
        if (layout.bytes <= room) {
            return layout;
        }
        warps /= 2;
    } while (warps);
    layout.bytes = 0;
    return layout;
}

/// Bytes that a block may have beside what is static; 0: an error.
template <class T, int D>
int room_of_block() {
    int device = 0, room = 0;
    cudaFuncAttributes attributes = {};
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(
                &room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        cudaFuncGetAttributes(&attributes, decode_kernel<T, D>) != cudaSuccess) {
        return 0;
    }
    return room - static_cast<int>(attributes.sharedSizeBytes);
}

} // namespace

/// Shared memory that a block asks for. Where little is read, two share a processor, as
/// then the next step's blocks begin before this one's have ended; where much is, they
/// would take each other's bandwidth, and those alone would wait for those in pairs.
inline int bytes_of_block(const DecodeParams& p, int bytes, int room) {
    constexpr int64_t kMuch = 48 << 20;
    return p.bytes < kMuch ? bytes : std::max(bytes, room / 4 * 3);
}

template <class T, int D>
int decode_row_blocks(const DecodeParams& p) {
    auto* kernel = decode_kernel<T, D>;
    bool clusters = false;
    if (p.heads_q / p.heads_kv > kStreamQueries) {
        return 0;
    }
    if (compiled_for_90(reinterpret_cast<const void*>(kernel), clusters) != cudaSuccess ||
        !clusters) {
        return 0;
    }
    // Of the sizes of a cluster that fill the groups of 16 or 18 processors that a device
    // is made of, the largest one that lets all rows run at once.
    const int room = room_of_block<T, D>();
    int fewest = 0;
    for (int blocks : {16, 12, 8, 6, 4, 3, 2, 1}) {
        const int bytes = layout_of<T, D>(p, room, blocks).bytes;
        if (bytes == 0) {
            continue;
        }
        fewest = blocks;
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = blocks;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = bytes_of_block(p, bytes, room);
        config.attrs = &cluster;
        config.numAttrs = 1;
        int fit = 0;
        if (cudaFuncSetAttribute(
                    kernel,
                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                    static_cast<int>(config.dynamicSmemBytes)) == cudaSuccess &&
            cudaFuncSetAttribute(
                    kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
                    cudaSuccess &&
            cudaOccupancyMaxActiveClusters(&fit, kernel, &config) == cudaSuccess &&
            fit >= p.nrow) {
            return blocks;
        }
        cudaGetLastError(); // what a device without clusters of this size says
    }
    return fewest;
}

template <class T, int D>
cudaError_t decode_rows(const DecodeParams& p, cudaStream_t stream) {
    const int room = room_of_block<T, D>();
    const DecodeArguments arguments = {p, layout_of<T, D>(p, room, p.team_blocks)};
    const int bytes = bytes_of_block(p, arguments.layout.bytes, room);
    auto* kernel = decode_kernel<T, D>;
    cudaError_t error = cudaFuncSetAttribute(
            kernel,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            bytes);
    if (error == cudaSuccess && p.team_blocks > 8) {
        error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess) {
        return error;
    }
    return launch(
            kernel,
            dim3(p.team_blocks, p.nrow),
            kThreads,
            bytes,
            stream,
            arguments,
            p.team_blocks);
}

} // namespace faiss_saap::gpu
