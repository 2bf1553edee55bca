/// The beginning of decode()'s kernel: what no step changes is read, and brought nearer,
/// while the kernels before still run; then what this step is about. Device code.
#pragma once

#include "append_one.cuh"
#include "decode_block.cuh"
#include "far_keys.cuh"

namespace faiss_saap::gpu {

namespace {

/// A block's rows of what scores cells: the hidden layers of the query assigner, what
/// then gives the scores, and the key assigner. A hidden layer that is small and one for
/// the group each block has whole, as telling each other of it would take longer.
__device__ __forceinline__ RowProducts products_of(
        const ListState& list,
        int layer,
        int layers,
        int group) {
    constexpr int kSmall = 64 << 10; // bytes
    const bool of_key = layer > layers, scores = layer >= layers;
    const DeviceAssigner& a = of_key ? list.key : list.query;
    RowProducts p;
    p.bf16 = a.bf16;
    p.matrix = p.bias_matrix = scores ? a.ncell : a.width;
    p.cols = scores ? a.padded_cols : layer == 0 ? a.padded_d : a.padded_width;
    const bool input = layer == 0 && layers; // of which each head has biases
    const bool per_head = (input ? a.inputs : a.networks) > 1;
    p.heads = per_head && !of_key ? group : 1;
    p.n = p.heads > 1 || of_key ? 1 : group;
    p.biases = input ? group : p.heads;
    const int blocks = static_cast<int>(gridDim.x);
    const int each = DecodeLayout::share_in_fours(p.matrix, blocks);
    p.everywhere = !scores && p.heads == 1 && p.matrix * p.bytes_of_row() <= kSmall;
    p.first = p.everywhere ? 0 : min(p.matrix, static_cast<int>(blockIdx.x) * each);
    p.end = p.everywhere ? p.matrix : min(p.matrix, p.first + each);
    const auto* rows = static_cast<const char*>(scores ? a.rows : a.layer[layer]);
    const float* bias = scores ? a.bias : a.layer_bias[layer];
    p.rows = rows + int64_t(p.first) * p.bytes_of_row();
    p.bias = bias ? bias + p.first : nullptr;
    p.share_out(kWarps, /*splits=*/!of_key);
    return p;
}

/// What of a sequence is read while the kernels before still run, and may be behind.
struct EarlyState {
    int64_t length, assigned;

    /// The slot that leaves the window, or -1.
    __device__ __forceinline__ int64_t leaving(const DecodeParams& p) const {
        return leaving_slot(length, p.sink, p.window);
    }
    /// Whether its cell is to be found.
    __device__ __forceinline__ bool seeks(const DecodeParams& p) const {
        return leaving(p) >= 0 && leaving(p) >= assigned;
    }
};

/// Which row the block has, its cache, its lists and what it multiplies. Makes ready
/// what must be so before the blocks have begun.
template <class T, int D>
__device__ __forceinline__ EarlyState read_row(DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    copy_words(&s.row, p.rows + blockIdx.y);
    b.exchange.begin(s.barriers);
    auto* queries = reinterpret_cast<uint32_t*>(b.shared + b.layout.queries);
#pragma unroll 1
    for (int i = threadIdx.x; i < kStreamQueries * TileStream<T, D>::kStride / 2;
         i += kThreads) {
        queries[i] = 0; // of heads that are not there
    }
    clear_choice(s.choice);
    if (threadIdx.x == 0) {
        BulkCopies(&s.weights_there).begin();
        s.refused_by = 0;
        s.leaving_at = -1;
    }
    __syncthreads();
    const EarlyState early = {
            __ldcg(&s.row.sequence->length), __ldcg(&s.row.sequence->assigned)};
    copy_words(&s.kv, &p.items[s.row.item].kv);
    copy_words(&s.list, s.row.lists);
    __syncthreads();
    const DeviceAssigner& query = s.list.query;
    const int layers = query.input == RowInput::hidden ? 1 + 2 * query.depth : 0;
    const int nproduct = layers + (p.appends ? 2 : 1);
    if (threadIdx.x == kThreads - 1) {
        s.view = StreamView(s.kv, s.row.kv_head);
        s.layers = layers;
        s.nproduct = nproduct;
        const int most = DecodeLayout::share_in_fours(query.ncell, b.blocks);
        s.first = min(query.ncell, b.rank * most);
        s.own = min(most, query.ncell - s.first);
    }
    if (threadIdx.x < nproduct) {
        const RowProducts product =
                products_of(s.list, threadIdx.x, layers, b.layout.group);
        s.sources[threadIdx.x] = product;
        s.bytes_kept[threadIdx.x] =
                product.bytes() + (product.bytes_of_bias() + 15) / 16 * 16;
    }
    __syncthreads();
    return early;
}

/// Weights that are kept in shared memory until they are used: hidden layers and cells, as
/// far as there is room for them.
struct KeptWeights {
    const DecodeBlock& b;
    int bytes = 0; ///< up to here

    /// Where those of the next layer lie, if they are kept, in order of the layers.
    __device__ __forceinline__ char* next(int layer) {
        const int of_layer = b.s.bytes_kept[layer];
        if (layer > b.s.layers || bytes + of_layer > b.layout.kept_bytes) {
            return nullptr;
        }
        char* at = b.shared + b.layout.kept + bytes;
        bytes += of_layer;
        return at;
    }
};

/// Sends for the block's weights, to be kept or only to be nearer, and notes where they
/// come to lie; and brings nearer what else is known of the row.
__device__ __forceinline__ void send_for_weights(
        const DecodeBlock& b,
        const EarlyState& early) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const bool seeks = early.seeks(p);
    const BulkCopies copies(&s.weights_there);
    KeptWeights kept = {b};
    int sent = 0;
#pragma unroll 1
    for (int layer = 0; layer < s.nproduct; layer++) {
        char* to = kept.next(layer);
        sent += to ? s.sources[layer].bytes() : 0;
        if (layer % kWarps != b.warp) {
            continue;
        }
        RowProducts product = s.sources[layer];
        if (to) {
            char* biases = to + product.bytes();
            copy_biases(product, biases);
            if (b.lane == 0) {
                copy_rows(product, to, copies);
            }
            product.rows = to;
            product.kept = 1;
            product.matrix = product.bias_matrix = product.end - product.first;
            product.bias = product.bias ? reinterpret_cast<const float*>(biases) : nullptr;
        } else if (layer <= s.layers || seeks) {
            prefetch_products(product);
        }
        if (b.lane == 0) {
            s.products[layer] = product;
        }
    }
    if (threadIdx.x == 0) {
        copies.expect(sent);
    }
    commit_copies();
    prefetch_bytes(
            reinterpret_cast<const char*>(s.list.count),
            int(sizeof(int32_t)) * s.list.query.ncell,
            threadIdx.x,
            kThreads);
    if (b.asks_for_all_extents()) {
        prefetch_bytes(
                reinterpret_cast<const char*>(s.list.extents + int64_t(s.first) * kExtents),
                int(sizeof(uint32_t)) * kExtents * s.own,
                threadIdx.x,
                kThreads);
    }
}

/// Zeros that pad vectors.
template <int D>
__device__ __forceinline__ void clear_padding(DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const int width = b.s.list.query.width, of_units = b.unit_stride();
    const int padding = b.s.layers ? of_units - width : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.group * padding; i += kThreads) {
        const int at = i / padding * of_units + width + i % padding;
        b.ints(layout.hidden)[at] = b.ints(layout.activated)[at] = 0;
    }
    const int stride = b.vector_stride(), of_x = stride - D;
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.group * of_x; i += kThreads) {
        b.ints(layout.x)[i / of_x * stride + D + i % of_x] = 0;
    }
}

/// Brings nearer what the append reads: the new keys, and those whose cells are sought or
/// the one cell that is known.
template <class T, int D>
__device__ __forceinline__ void prefetch_keys(
        const DecodeBlock& b,
        const EarlyState& early) {
    constexpr int kLines = (D * int(sizeof(T)) + 127) / 128;
    const DecodeParams& p = b.p;
    const int64_t leaving = early.leaving(p);
    const bool seeks = early.seeks(p);
    if (threadIdx.x == 0 && leaving >= 0 && !seeks) {
        prefetch(b.s.list.cells + leaving - p.sink);
    }
    const int keys = p.heads_kv + (seeks ? b.layout.ahead : 0);
#pragma unroll 1
    for (int i = threadIdx.x; p.appends && i < keys * kLines; i += kThreads) {
        const int key = i / kLines;
        const bool is_new = key < p.heads_kv;
        const int64_t slot = is_new ? early.length : leaving + key - p.heads_kv;
        if (slot >= b.s.row.view_length) {
            continue;
        }
        const char* at = key_row(b.s.kv, is_new ? key : b.s.row.kv_head, slot);
        if (at) {
            prefetch(at + 128 * (i % kLines));
        }
    }
}

/// Sends for the queries of the row, as the tensor cores want them.
template <class T, int D>
__device__ __forceinline__ void send_for_queries(const DecodeBlock& b) {
    using Stream = TileStream<T, D>;
    T* queries = reinterpret_cast<T*>(b.shared + b.layout.queries);
    const T* from = static_cast<const T*>(b.p.queries) + b.first_head() * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < b.layout.group * Stream::kChunks; i += kThreads) {
        const int g = i / Stream::kChunks, c = i % Stream::kChunks;
        copy_16_bytes(queries + g * Stream::kStride + 8 * c, from + g * D + 8 * c, true);
    }
    commit_copies();
}

/// Sends for the numbers of keys of all cells; in fours, of which cells that are not
/// there have 0.
__device__ __forceinline__ void send_for_counts(const DecodeBlock& b) {
    const int ncell = b.s.list.query.ncell;
    int32_t* counts = b.ints(b.layout.counts);
#pragma unroll 1
    for (int c = 4 * threadIdx.x; c < ncell; c += 4 * kThreads) {
        copy_up_to_16_bytes(counts + c, b.s.list.count + c, 4 * min(4, ncell - c));
    }
    commit_copies();
}

/// What the step is about, but for what is wrong with the new keys.
/// @param before, assigned, capacity  of the sequence
/// @param most_ahead                  DecodeLayout::ahead
__device__ __forceinline__ DecodeStep step_of(
        const DecodeParams& p,
        const BatchRow& row,
        int64_t before,
        int64_t assigned,
        int64_t capacity,
        int most_ahead) {
    DecodeStep step;
    step.length = before + (p.appends ? 1 : 0);
    const Reach reach = reach_of(step.length, 1, 0, p.sink, p.window);
    step.far = static_cast<int>(reach.far_keys());
    step.sinks = static_cast<int>(reach.sink_end);
    step.window_begin = static_cast<int>(reach.window_begin);
    step.dense = step.sinks + static_cast<int>(reach.window_end) - step.window_begin;
    step.takes_all = reach.far_keys() <= p.dense_below;
    step.readable = step.length <= row.view_length;
    if (p.appends) {
        step.refused = step.length > capacity ? Fault::append_capacity
                : !step.readable              ? Fault::append_view
                                              : Fault::none;
        if (step.refused == Fault::none) {
            step.leaving = static_cast<int>(leaving_slot(before, p.sink, p.window));
        }
        if (step.leaving >= 0 && step.leaving >= assigned) { // of tokens that there are
            step.finds = static_cast<int>(
                    max(int64_t(1), min(int64_t(most_ahead), before - step.leaving)));
        }
    }
    return step;
}

/// Of the keys whose cells are to be found, those before the first hole of the page table.
__device__ __forceinline__ int keys_that_are_there(
        const DecodeBlock& b,
        const DecodeStep& step) {
    const DeviceView& kv = b.s.kv;
    int n = step.finds;
#pragma unroll 1
    for (int i = step.finds - 1; kv.page_table && i > 0; i--) {
        const int32_t page = __ldcg(kv.page_table + (step.leaving + i) / kv.page_size);
        n = page >= 0 && page < kv.npages ? n : i; // alike in all blocks: they count on it
    }
    return n;
}

/// Looks at the new key of each KV head, in every block, so that all agree.
__device__ __forceinline__ void check_new_keys(const DecodeBlock& b, int64_t slot) {
    const DecodeParams& p = b.p;
#pragma unroll 1
    for (int h0 = 2 * (kWarps - 1 - b.warp); h0 < p.heads_kv; h0 += 2 * kWarps) {
        const int h = h0 + b.lane / 16;
        const bool is = h < p.heads_kv;
        const Fault fault =
                fault_of_key(is ? key_row(b.s.kv, h, slot) : nullptr, p.d, p.bf16);
        if (is && fault != Fault::none) {
            // The worse one of two, whoever is first.
            atomicMax(&b.s.refused_by, static_cast<int>(fault));
        }
    }
}

/// The queries, and the keys whose cells are sought, as the assigners want them.
template <int D>
__device__ __forceinline__ void load_vectors(
        const DecodeBlock& b,
        const DecodeStep& step) {
    const DecodeParams& p = b.p;
    const ListState& list = b.s.list;
    const int group = b.layout.group, stride = b.vector_stride();
    const int n = group + step.finds;
    const auto* queries = static_cast<const char*>(p.queries) + b.first_head() * 2 * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < n * (D / 2); i += kThreads) {
        const int g = i / (D / 2), pair = i % (D / 2);
        const bool is_key = g >= group;
        const int slot = step.leaving + g - group;
        float* to = is_key ? b.floats(b.layout.sought) + (g - group) * D
                           : b.floats(b.layout.x) + g * stride;
        load_vector(
                list.rotary,
                D,
                (is_key ? slot : step.length - 1) + p.position_offset,
                is_key ? list.key.input == RowInput::pre_rope
                       : list.query.input != RowInput::post_rope,
                is_key ? key_row(b.s.kv, b.s.row.kv_head, slot) : queries + g * 2 * D,
                p.bf16,
                pair,
                D / 2,
                to);
        const int2 at = rotary_pair(list.rotary, D, pair); // its own
        to[at.x] = __uint_as_float(split_float(to[at.x]));
        to[at.y] = __uint_as_float(split_float(to[at.y]));
    }
}

/// Finds what the step is about, its queries and the counts of the cells.
template <class T, int D>
__device__ __forceinline__ void begin_step(DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const int64_t before = __ldcg(&s.row.sequence->length);
    const int64_t assigned = __ldcg(&s.row.sequence->assigned);
    const int64_t capacity = __ldcg(&s.row.sequence->capacity);
    send_for_queries<T, D>(b);
    send_for_counts(b);
    DecodeStep step = step_of(p, s.row, before, assigned, capacity, b.layout.ahead);
    step.finds = keys_that_are_there(b, step);
    if (threadIdx.x == 0) {
        step.attends = step.readable && step.refused == Fault::none;
        step.dense = p.attend_dense && step.attends ? step.dense : 0;
        s.step = step;
    }
    load_vectors<D>(b, step);
    wait_for_copies<0>();
    BulkCopies(&s.weights_there).wait();
    __syncthreads();
}

} // namespace

} // namespace faiss_saap::gpu
