/// The beginning of decode()'s kernel: what no step changes is read, and brought nearer,
/// while the kernels before still run; then what this step is about. Device code.
#pragma once

#include "append_one.cuh"
#include "decode_block.cuh"
#include "far_keys.cuh"

namespace faiss_saap::gpu {

namespace {

/// A block's rows of what scores cells: the hidden layers of the query assigner, what
/// then gives the scores, and the key assigner.
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

/// Which row the block has, its cache, its lists and what it multiplies. Makes ready
/// what must be so before the blocks have begun.
template <class T, int D>
__device__ __forceinline__ void read_row(DecodeBlock& b) {
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
    clear_selection(s.selection, p.nprobe);
    if (threadIdx.x == 0) {
        s.refused_by = 0;
        s.leaving_at = -1;
    }
    __syncthreads();
    copy_words(&s.kv, &p.items[s.row.item].kv);
    copy_words(&s.list, s.row.lists);
    __syncthreads();
    const DeviceAssigner& query = s.list.query;
    const int layers = query.input == RowInput::hidden ? 1 + 2 * query.depth : 0;
    const int nproduct = layers + (p.appends ? 2 : 1);
    if (threadIdx.x == 0) {
        s.view = StreamView(s.kv, s.row.kv_head);
        s.layers = layers;
        s.nproduct = nproduct;
        const int most = DecodeLayout::share(query.ncell, b.blocks);
        s.first = min(query.ncell, b.rank * most);
        s.own = min(most, query.ncell - s.first);
    }
    if (threadIdx.x < nproduct) {
        s.products[threadIdx.x] =
                products_of(s.list, threadIdx.x, layers, b.layout.group);
    }
    __syncthreads();
}

/// Brings the block's weights nearer.
__device__ __forceinline__ void prefetch_weights(const DecodeBlock& b) {
#pragma unroll 1
    for (int layer = 0; layer < b.s.nproduct; layer++) {
        prefetch_products(b.s.products[layer]);
    }
}

/// Floats between the vectors of two heads that what comes first is multiplied with.
__device__ __forceinline__ int vector_stride(const DecodeBlock& b) {
    const DeviceAssigner& query = b.s.list.query;
    return b.s.layers ? query.padded_d : query.padded_cols;
}

/// Zeros where nobody else writes: cells that there are not, and what pads vectors.
template <int D>
__device__ __forceinline__ void clear_padding(DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const DeviceAssigner& query = b.s.list.query;
#pragma unroll 1
    for (int c = query.ncell + threadIdx.x; c < layout.padded_cells; c += kThreads) {
        b.words(layout.keys)[c] = 0;
    }
    const int padding = b.s.layers ? query.padded_width - query.width : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.group * padding; i += kThreads) {
        const int at = i / padding * query.padded_width + query.width + i % padding;
        b.floats(layout.hidden)[at] = b.floats(layout.activated)[at] = 0;
    }
    const int stride = vector_stride(b), of_x = stride - D;
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.group * of_x; i += kThreads) {
        b.floats(layout.x)[i / of_x * stride + D + i % of_x] = 0;
    }
}

/// Brings the keys that the append reads nearer: the new ones and the one that leaves the
/// window.
/// @param length  of the sequence, as far as it can be known while the kernels before
///                still run
template <class T, int D>
__device__ __forceinline__ void prefetch_keys(const DecodeBlock& b, int64_t length) {
    constexpr int kLines = (D * int(sizeof(T)) + 127) / 128;
    const DecodeParams& p = b.p;
    const int head = threadIdx.x / kLines; // one more than there are: the leaving key
    if (!p.appends || head > p.heads_kv) {
        return;
    }
    const bool leaves = head == p.heads_kv;
    const int64_t slot = leaves ? leaving_slot(length, p.sink, p.window) : length;
    if (slot < 0 || slot >= b.s.row.view_length) {
        return;
    }
    const char* at = key_row(b.s.kv, leaves ? b.s.row.kv_head : head, slot);
    if (at) {
        prefetch(at + 128 * (threadIdx.x % kLines));
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

__device__ __forceinline__ void read_counts(const DecodeBlock& b) {
    int32_t* counts = b.ints(b.layout.own_counts);
#pragma unroll 1
    for (int c = threadIdx.x; c < b.s.own; c += kThreads) {
        counts[c] = __ldcg(b.s.list.count + b.s.first + c);
    }
}

/// What the step is about, but for what is wrong with the new keys.
/// @param before, capacity  of the sequence
__device__ __forceinline__ DecodeStep step_of(
        const DecodeParams& p,
        const BatchRow& row,
        int64_t before,
        int64_t capacity) {
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
        step.leaving = static_cast<int>(leaving_slot(before, p.sink, p.window));
        step.refused = step.length > capacity ? Fault::append_capacity
                : !step.readable              ? Fault::append_view
                                              : Fault::none;
    }
    return step;
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

/// The queries and the key that leaves the window, as the assigners want them.
template <int D>
__device__ __forceinline__ void load_vectors(
        const DecodeBlock& b,
        const DecodeStep& step) {
    const DecodeParams& p = b.p;
    const ListState& list = b.s.list;
    const int group = b.layout.group, stride = vector_stride(b);
    const int n = group + (step.leaving >= 0);
    const auto* queries = static_cast<const char*>(p.queries) + b.first_head() * 2 * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < n * (D / 2); i += kThreads) {
        const int g = i / (D / 2), pair = i % (D / 2);
        const bool is_key = g == group;
        load_vector(
                list.rotary,
                D,
                (is_key ? step.leaving : step.length - 1) + p.position_offset,
                is_key ? list.key.input == RowInput::pre_rope
                       : list.query.input != RowInput::post_rope,
                is_key ? key_row(b.s.kv, b.s.row.kv_head, step.leaving)
                       : queries + g * 2 * D,
                p.bf16,
                pair,
                D / 2,
                is_key ? b.floats(b.layout.leaving) : b.floats(b.layout.x) + g * stride);
    }
}

/// Reads what the step is about, its queries and the counts of the block's cells.
template <class T, int D>
__device__ __forceinline__ void begin_step(DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const int64_t before = __ldcg(&s.row.sequence->length);
    const int64_t capacity = __ldcg(&s.row.sequence->capacity);
    send_for_queries<T, D>(b);
    read_counts(b);
    DecodeStep step = step_of(p, s.row, before, capacity);
    if (p.appends && step.refused == Fault::none) {
        check_new_keys(b, before);
    }
    load_vectors<D>(b, step);
    wait_for_copies<0>();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (step.refused == Fault::none) {
            step.refused = static_cast<Fault>(s.refused_by);
        }
        step.attends = step.readable && step.refused == Fault::none;
        step.dense = p.attend_dense && step.attends ? step.dense : 0;
        s.step = step;
    }
    __syncthreads();
}

} // namespace

} // namespace faiss_saap::gpu
