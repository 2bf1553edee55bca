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

/// Leaves one of two halves of the rows.
__device__ __forceinline__ void take_half(RowProducts& p, int which) {
    const int n = p.end - p.first, each = DecodeLayout::share_in_fours(n, 2);
    const int begin = min(n, which * each), end = min(n, begin + each);
    p.rows = static_cast<const char*>(p.rows) + int64_t(begin) * p.bytes_of_row();
    p.bias = p.bias ? p.bias + begin : nullptr;
    p.end = p.first + end;
    p.first += begin;
    p.share_out(kWarps, /*splits=*/false);
}

/// What steps, and the host between them, change of a sequence. While the kernels before
/// still run, it may be behind.
struct SequenceReading {
    int64_t length;
    int32_t assigned;
    int64_t capacity;

    __device__ __forceinline__ static SequenceReading of(const SequenceState& sequence) {
        return {__ldcg(&sequence.length),
                __ldcg(&sequence.assigned),
                __ldcg(&sequence.capacity)};
    }
    __device__ __forceinline__ bool operator!=(const SequenceReading& x) const {
        return length != x.length || assigned != x.assigned || capacity != x.capacity;
    }
    /// The slot that leaves the window, or -1.
    __device__ __forceinline__ int64_t leaving(const DecodeParams& p) const {
        return leaving_slot(length, p.sink, p.window);
    }
    /// Whether its cell is to be found.
    __device__ __forceinline__ bool seeks(const DecodeParams& p) const {
        return leaving(p) >= 0 && leaving(p) >= assigned;
    }
    /// Whether those of later ones are, as far as there are warps for that.
    __device__ __forceinline__ bool seeks_later(const DecodeParams& p) const {
        return leaving(p) >= 0 && leaving(p) + 1 == assigned;
    }
};

/// Which row the block has, and what may be behind of its sequence. Makes ready what must
/// be so before the blocks have begun.
template <class T, int D>
__device__ __forceinline__ SequenceReading read_row(DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    copy_words<DecodeRow>(&s, p.rows + blockIdx.y);
    b.exchange.begin(s.barriers);
    auto* queries = reinterpret_cast<uint32_t*>(b.shared + b.layout.queries);
#pragma unroll 1
    for (int i = threadIdx.x; i < kStreamQueries * TileStream<T, D>::kStride / 2;
         i += static_cast<int>(blockDim.x)) {
        queries[i] = 0; // of heads that are not there
    }
    clear_choice(s.choice);
    if (threadIdx.x == 0) {
        BulkCopies(&s.weights_there).begin();
        s.refused_by = s.bad_page = 0;
        s.leaving_at[0] = s.leaving_at[1] = -1;
        s.choice.taken[CellChoice::kFirst][CellChoice::kBefore] = make_int2(0, 0);
    }
    __syncthreads();
    return SequenceReading::of(*s.row.sequence);
}

/// Brings nearer the block's share of the row's weights: of the first hidden layer and
/// the cells. By the warps that prepare, before they find out which ones the block has.
__device__ __forceinline__ void prefetch_weights(const DecodeBlock& b) {
    const DeviceAssigner& a = b.s.list.query;
    const int element = a.element();
    const auto prefetch_share = [&](const void* rows, int bytes) {
        const int each = DecodeLayout::share(bytes, b.blocks);
        const int first = min(bytes, b.rank * each);
        prefetch_bytes(
                static_cast<const char*>(rows) + first,
                min(each, bytes - first),
                32 * b.preparing_warp() + b.lane,
                32 * b.preparing_warps());
    };
    if (b.hides()) {
        prefetch_share(a.layer[0], a.inputs * a.width * a.padded_d * element);
    }
    prefetch_share(a.rows, a.networks * a.ncell * a.padded_cols * element);
}

/// Where the block keeps weights in shared memory until they are used: hidden layers and
/// cells, as far as there is room for them; a layer's come after those before it.
__device__ __forceinline__ char* place_of_kept(const DecodeBlock& b, int layer) {
    if (b.window_first()) {
        return nullptr; // tiles come there before
    }
    int at = 0;
#pragma unroll 1
    for (int l = 0; l < layer; l++) {
        const int bytes = b.s.bytes_kept[l].y;
        at += at + bytes <= b.layout.kept_bytes ? bytes : 0;
    }
    return layer <= b.s.layers && at + b.s.bytes_kept[layer].y <= b.layout.kept_bytes
            ? b.shared + b.layout.kept + at
            : nullptr;
}

/// Finds what the block multiplies, and sends for its weights, to be kept or only to be
/// nearer; and brings nearer what else is known of the row. By the warps that prepare.
__device__ __forceinline__ void send_for_weights(
        const DecodeBlock& b,
        const SequenceReading& early) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const DeviceAssigner& query = s.list.query;
    const int layers = b.hides() ? 1 + 2 * query.depth : 0;
    const int nproduct = layers + (p.appends ? 2 : 1);
    const int warp = b.preparing_warp(), warps = b.preparing_warps();
    const int most = DecodeLayout::share_in_fours(query.ncell, b.blocks);
    const int first = min(query.ncell, b.rank * most);
    const int own = min(most, query.ncell - first);
    if (warp == warps - 1 && b.lane == 0) {
        s.view = StreamView(s.kv, s.row.kv_head);
        s.layers = layers;
        s.first = first;
        s.own = own;
    }
    // A layer is a warp's. Mostly each has one at most, and it stays in registers.
    RowProducts product;
#pragma unroll 1
    for (int layer = warp; layer < nproduct; layer += warps) {
        product = products_of(s.list, layer, layers, b.layout.group);
        if (layer == layers && b.is_paired()) {
            take_half(product, blockIdx.y % 2);
            product.n = static_cast<uint8_t>(2 * b.layout.group);
        }
        if (b.lane == 0) {
            s.products[layer] = product;
            s.bytes_kept[layer] = make_int2(
                    product.bytes(),
                    product.bytes() + (product.bytes_of_bias() + 15) / 16 * 16);
        }
    }
    b.sync_preparing();
    const BulkCopies copies(&s.weights_there);
#pragma unroll 1
    for (int layer = warp; layer < nproduct; layer += warps) {
        if (nproduct > warps) {
            product = s.products[layer];
            __syncwarp();
        }
        if (char* to = place_of_kept(b, layer)) {
            char* biases = to + product.bytes();
            if (b.lane == 0) {
                copy_rows(product, to, copies);
            }
            copy_biases(product, biases);
            product.rows = to;
            product.kept = 1;
            product.matrix = product.bias_matrix = product.end - product.first;
            product.bias = product.bias ? reinterpret_cast<const float*>(biases) : nullptr;
            if (b.lane == 0) {
                s.products[layer] = product;
            }
        } else if (layer <= layers || early.seeks(p) ||
                   (b.finds_later && early.seeks_later(p))) {
            prefetch_products(product);
        }
    }
    commit_copies();
    if (warp == warps - 1 && b.lane == 0) {
        int sent = 0;
#pragma unroll 1
        for (int layer = 0; layer <= layers; layer++) {
            sent += place_of_kept(b, layer) ? s.bytes_kept[layer].x : 0;
        }
        copies.expect(sent);
    }
    const int thread = 32 * warp + b.lane;
    prefetch_bytes(
            reinterpret_cast<const char*>(s.row.lists->count),
            int(sizeof(int32_t)) * query.ncell,
            thread,
            32 * warps);
    if (b.asks_for_all_extents()) {
        prefetch_bytes(
                reinterpret_cast<const char*>(
                        s.row.lists->extents + int64_t(first) * kExtents),
                int(sizeof(uint32_t)) * kExtents * own,
                thread,
                32 * warps);
    }
}

/// Zeros that pad vectors.
template <int D>
__device__ __forceinline__ void clear_padding(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const int width = b.s.list.query.width, of_units = b.unit_stride();
    const int padding = b.hides() ? of_units - width : 0;
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
        const SequenceReading& early) {
    constexpr int kLines = (D * int(sizeof(T)) + 127) / 128;
    const DecodeParams& p = b.p;
    const int64_t leaving = early.leaving(p);
    const bool seeks = early.seeks(p);
    const int thread = 32 * b.preparing_warp() + b.lane;
    if (thread == 0 && leaving >= 0 && !seeks) {
        prefetch(b.s.row.lists->cells + leaving - p.sink);
    }
    const int keys = p.heads_kv + (seeks ? b.layout.ahead : 0);
#pragma unroll 1
    for (int i = thread; p.appends && i < keys * kLines; i += 32 * b.preparing_warps()) {
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
    const int32_t* from = b.s.row.lists->count;
    int32_t* counts = b.ints(b.layout.counts);
#pragma unroll 1
    for (int c = 4 * threadIdx.x; c < ncell; c += 4 * kThreads) {
        copy_up_to_16_bytes(counts + c, from + c, 4 * min(4, ncell - c));
    }
    commit_copies();
}

/// What the step is about, but for what is wrong with the new keys and with pages.
/// @param most_ahead   DecodeLayout::ahead
/// @param finds_later  whether the rows' warps do that (DecodeBlock::finds_later)
__device__ __forceinline__ DecodeStep step_of(
        const DecodeParams& p,
        const BatchRow& row,
        const SequenceReading& before,
        int most_ahead,
        bool finds_later) {
    DecodeStep step;
    step.length = before.length + (p.appends ? 1 : 0);
    const Reach reach = reach_of(step.length, 1, 0, p.sink, p.window);
    step.far = static_cast<int>(reach.far_keys());
    step.sinks = static_cast<int>(reach.sink_end);
    step.window_begin = static_cast<int>(reach.window_begin);
    step.dense = step.sinks + static_cast<int>(reach.window_end) - step.window_begin;
    step.takes_all = reach.far_keys() <= p.dense_below;
    step.readable = step.length <= row.view_length;
    if (p.appends) {
        step.refused = step.length > before.capacity ? Fault::append_capacity
                : !step.readable                     ? Fault::append_view
                                                     : Fault::none;
        if (step.refused == Fault::none) {
            step.leaving = static_cast<int>(before.leaving(p));
        }
        const auto there = static_cast<int>(before.length - step.leaving); // keys
        if (step.leaving >= 0 && step.leaving >= before.assigned) {
            step.finds = max(1, min(most_ahead, there));
        } else if (step.leaving >= 0 && finds_later && before.seeks_later(p)) {
            step.finds_later = min(most_ahead, there - 1);
        }
    }
    step.attends = step.readable && step.refused == Fault::none;
    step.dense = p.attend_dense && step.attends ? step.dense : 0;
    return step;
}

/// Notes what the step is about, and how its queries are rotated back. By the warps that
/// choose, once or twice: not inlined.
template <int D>
static __device__ __noinline__ void prepare_step(
        const DecodeParams& p,
        const DecodeLayout& layout,
        DecodeShared& s,
        char* shared,
        const SequenceReading before,
        bool finds_later) {
    if (threadIdx.x == kThreads - 1) {
        s.step = step_of(p, s.row, before, layout.ahead, finds_later);
    }
    const int64_t length = before.length + (p.appends ? 1 : 0);
    const DeviceRotary& rotary = s.list.rotary;
    const bool rotates =
            s.list.query.input != RowInput::post_rope && rotary.inverse_frequency;
    auto* rotations = reinterpret_cast<float2*>(shared + layout.rotations);
#pragma unroll 1
    for (int pair = threadIdx.x; pair < D / 2; pair += kThreads) {
        const float2 r = rotates ? rotation(rotary, length - 1 + p.position_offset, pair)
                                 : make_float2(1, 0);
        const float size = rotates ? rotary.shrink : 1.0f;
        rotations[pair] = make_float2(size * r.x, size * r.y);
    }
}

/// Of n keys whose cells are to be found, those before the first hole of the page table.
__device__ __forceinline__ int keys_that_are_there(
        const DeviceView& kv,
        int first,
        int n) {
#pragma unroll 1
    for (int i = n - 1; kv.page_table && i >= 0; i--) {
        const int32_t page = __ldcg(kv.page_table + (first + i) / kv.page_size);
        n = page >= 0 && page < kv.npages ? n : i; // alike in all blocks: they count on it
    }
    return n;
}

/// Keys whose cells are sought, as the key assigner wants them, by split_float; a key whose
/// page is not there is 0. By so many threads, each of which has a pair of components of
/// several keys.
/// @param first  slot
/// @param to     n * D
template <int D>
static __device__ __noinline__ void load_sought(
        const DecodeParams& p,
        const DecodeRow& row,
        uint32_t* to,
        int first,
        int n,
        int thread,
        int threads) {
    constexpr int kAtOnce = 4; // on their way
    const ListState& list = row.list;
    const int pair = thread % (D / 2), step = threads / (D / 2);
    const int2 at = rotary_pair(list.rotary, D, pair);
    const bool rotates =
            list.key.input == RowInput::pre_rope && list.rotary.inverse_frequency;
    const double frequency = rotates ? list.rotary.inverse_frequency[pair] : 0;
#pragma unroll 1
    for (int k0 = thread / (D / 2); k0 < n && thread < step * (D / 2);
         k0 += kAtOnce * step) {
        float2 x[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int k = k0 + j * step;
            const char* key =
                    k < n ? key_row(row.kv, row.row.kv_head, first + k) : nullptr;
            x[j] = key ? make_float2(element(key, p.bf16, at.x), element(key, p.bf16, at.y))
                       : make_float2(0, 0);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int k = k0 + j * step;
            if (rotates) {
                const float2 r = rotation(frequency, first + k + p.position_offset);
                x[j] = make_float2(
                        list.rotary.shrink * (x[j].x * r.x + x[j].y * r.y),
                        list.rotary.shrink * (x[j].y * r.x - x[j].x * r.y));
            }
            if (k < n) {
                to[k * D + at.x] = split_float(x[j].x);
                to[k * D + at.y] = split_float(x[j].y);
            }
        }
    }
}

/// The queries as the query assigner wants them.
template <class T, int D>
__device__ __forceinline__ void rotate_queries(const DecodeBlock& b) {
    constexpr int kStride = TileStream<T, D>::kStride;
    const DecodeLayout& layout = b.layout;
    const DeviceRotary& rotary = b.s.list.rotary;
    const auto* queries = reinterpret_cast<const T*>(b.shared + layout.queries);
    const auto* rotations = reinterpret_cast<const float2*>(b.shared + layout.rotations);
    auto* x = reinterpret_cast<uint32_t*>(b.ints(layout.x));
    const int stride = b.vector_stride();
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.group * (D / 2); i += kThreads) {
        const int g = i / (D / 2), pair = i % (D / 2);
        const int2 at = rotary_pair(rotary, D, pair);
        const float u = static_cast<float>(queries[g * kStride + at.x]);
        const float v = static_cast<float>(queries[g * kStride + at.y]);
        const float2 r = rotations[pair];
        x[g * stride + at.x] = split_float(u * r.x + v * r.y);
        x[g * stride + at.y] = split_float(v * r.x - u * r.y);
    }
}

/// Loads the n keys whose cells this step finds. By all that choose.
template <int D>
__device__ __forceinline__ void load_keys_that_leave(const DecodeBlock& b, int n) {
    load_sought<D>(
            b.p,
            b.s,
            b.sought_keys(),
            b.s.step.leaving,
            n,
            static_cast<int>(threadIdx.x),
            kThreads);
}

/// Finds the queries, the counts of the cells and, where it was not known yet, what the
/// step is about.
/// @param early  what prepare_step() was told
template <class T, int D>
__device__ __forceinline__ void begin_step(
        const DecodeBlock& b,
        const SequenceReading& early) {
    DecodeShared& s = b.s;
    send_for_queries<T, D>(b);
    const auto now = SequenceReading::of(*s.row.sequence);
    static_assert(sizeof(ListArrays) / 4 <= kThreads); // in one go: a block may have more
    copy_words<ListArrays>(&s.list, s.row.lists);      // where they lie by now
    send_for_counts(b);
    if (now != early) {
        prepare_step<D>(b.p, b.layout, s, b.shared, now, b.finds_later);
    }
    wait_for_copies<1>(); // not for counts
    sync_choosers();
    rotate_queries<T, D>(b);
    DecodeStep& step = s.step;
    if (step.finds || (b.finds_later && step.finds_later)) {
        // The first one that leaves now counts as 0 where its page is not there, as when it
        // is appended alone.
        const int one = step.finds ? 1 : 0, leaving = step.leaving;
        const int more = keys_that_are_there(
                s.kv, leaving + 1, step.finds ? step.finds - 1 : step.finds_later);
        sync_choosers();
        if (threadIdx.x == 0) {
            (one ? step.finds : step.finds_later) = one + more;
        }
        if (one && !b.window_first()) {
            load_keys_that_leave<D>(b, one + more);
        }
    }
    BulkCopies(&s.weights_there).wait();
}

} // namespace

} // namespace faiss_saap::gpu
