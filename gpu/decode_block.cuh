/// A block of decode()'s kernel as its stages see it. Device code.
#pragma once

#include "choose_cells.cuh"
#include "cluster_exchange.cuh"
#include "decode_layout.cuh"
#include "multiply_rows.cuh"
#include "tile_stream.cuh"

namespace faiss_saap::gpu {

namespace {

/// Quotients of numbers below 2^17 by one number, without a division.
struct Divisor {
    int by;
    float inverse;

    __device__ __forceinline__ explicit Divisor(int by)
            : by(by), inverse(1.0f / static_cast<float>(by)) {}
    /// Exact: i + 1/2 is at least 1 / (2 by) from the next quotient.
    __device__ __forceinline__ int quotient(int i) const {
        return static_cast<int>((static_cast<float>(i) + 0.5f) * inverse);
    }
};

/// What a step of a row is about.
struct DecodeStep {
    int64_t length = 0; ///< of the sequence, with the token of this step
    Fault refused = Fault::none;
    int leaving = -1; ///< the slot that leaves the window; -1: none
    int finds = 0;    ///< slots from there on whose cells are found in this step
    /// Slots behind it whose cells are found for later steps, while this one goes on.
    int finds_later = 0;
    int far = 0;      ///< keys that there are
    int sinks = 0, window_begin = 0;
    int dense = 0;    ///< keys of sink and window that are read
    int readable = 0; ///< the caller's view has all slots
    int attends = 0;
    int takes_all = 0; ///< far keys are so few
};

/// What has a fixed place in a block's shared memory, as it is wanted rarely and
/// registers are few.
struct DecodeShared : DecodeRow {
    StreamView view; ///< kv, of the row's KV head
    int first, own; ///< cells of this block
    int layers;     ///< hidden ones of the query assigner
    /// Layers, cells and, where tokens are appended, cells of a key.
    RowProducts products[kMaxLayers + 2];
    int2 bytes_kept[kMaxLayers + 2]; ///< of their rows, and with biases

    DecodeStep step;
    int refused_by;             ///< the worst Fault of a new key
    int bad_page;               ///< a key's page was not there
    int leaving_cell;           ///< that the leaving key joins; -1: none
    int found[kMostAhead];      ///< cells of the keys that were sought
    unsigned long long found_later[kMostAhead]; ///< the block's best for those of later
    /// Its number among the far keys taken, where its cell is one of CellChoice::kFirst, or
    /// of kOthers as those who choose these have them; -1: it is not.
    int leaving_at[2];
    CellChoice choice;
    float factors[kMostBlocks * kWarps]; ///< of the exponentials, by part and head
    /// Sum and largest of sink and window by each warp that attends.
    float2 dense_sums[kWarps + kWindowWarps][kStreamQueries];
    unsigned long long barriers[2]; ///< of the exchange
    unsigned long long weights_there; ///< barrier of the weights that are kept
};

/// One of the blocks that have a row.
struct DecodeBlock {
    const DecodeParams& p;
    const DecodeLayout& layout;
    DecodeShared& s;
    char* shared; ///< the arrays of the layout
    int blocks, rank;
    int warp, lane;
    int window_warps; ///< DecodeLayout::window_warps, known to the compiler
    /// Whether these find cells for later steps, likewise: they do where no blocks seek them.
    bool finds_later = false;
    ClusterExchange exchange;

    __device__ __forceinline__ DecodeBlock(
            const DecodeParams& p,
            const DecodeLayout& layout,
            DecodeShared& s,
            char* shared,
            int window_warps)
            : p(p),
              layout(layout),
              s(s),
              shared(shared),
              blocks(gridDim.x),
              rank(blockIdx.x),
              warp(threadIdx.x / 32),
              lane(threadIdx.x % 32),
              window_warps(window_warps) {}

    /// Whether the warp is one of those that choose cells.
    __device__ __forceinline__ bool chooses() const {
        return window_warps == 0 || warp < kWarps;
    }
    /// The warps that make ready what is multiplied: those that attend to sink and window
    /// where there are any, as the others have to wait for queries meanwhile.
    __device__ __forceinline__ bool prepares() const {
        return chooses() == (window_warps == 0);
    }
    __device__ __forceinline__ int preparing_warps() const {
        return window_warps ? window_warps : kWarps;
    }
    /// Of them.
    __device__ __forceinline__ int preparing_warp() const {
        return window_warps ? warp - kWarps : warp;
    }
    /// A barrier of them.
    __device__ __forceinline__ void sync_preparing() const {
        if (window_warps) {
            sync_others(32 * window_warps);
        } else {
            sync_choosers();
        }
    }
    /// Whether the row begins with sink and window, where all warps choose cells. Every other
    /// pair of rows does.
    __device__ __forceinline__ bool window_first() const {
        return window_warps == 0 && layout.takes_turns && blockIdx.y / 2 % 2;
    }
    /// Whether the row is one of two that share weights: DecodeGrid::pairs.
    __device__ __forceinline__ bool is_paired() const {
        return window_warps == 0 && p.grid.pairs &&
                static_cast<int>(blockIdx.y) < p.paired;
    }
    /// Where the warp's tiles and results are among those of all; -1: it has none.
    __device__ __forceinline__ int place() const {
        return !chooses() ? layout.tile_warps + warp - kWarps
                : warp < layout.tile_warps ? warp
                                           : -1;
    }
    __device__ __forceinline__ float* floats(int at) const {
        return reinterpret_cast<float*>(shared + at);
    }
    __device__ __forceinline__ int32_t* ints(int at) const {
        return reinterpret_cast<int32_t*>(shared + at);
    }
    /// Keys whose cells are sought, by split_float.
    __device__ __forceinline__ uint32_t* sought_keys() const {
        return reinterpret_cast<uint32_t*>(shared + layout.sought);
    }
    /// A score and its cell, or two floats.
    __device__ __forceinline__ unsigned long long* words(int at) const {
        return reinterpret_cast<unsigned long long*>(shared + at);
    }
    /// The cells that are taken, and where the keys of each begin.
    __device__ __forceinline__ int2* taken() const {
        return reinterpret_cast<int2*>(shared + layout.taken);
    }
    /// What the exponentials of a part of the cells weigh, for each head.
    __device__ __forceinline__ float* factors(int part) const {
        return s.factors + part * layout.head_stride;
    }
    /// The row's cells to choose from, once they have been weighed.
    __device__ __forceinline__ WeighedCells weighed_cells() const {
        return {floats(layout.masses),
                ints(layout.counts),
                (s.list.query.ncell + 3) / 4 * 4};
    }
    /// Sends `n` times 16 bytes to all other blocks of the row, by turns that begin with
    /// the next one.
    /// @param at  of each of them, by number
    template <class At>
    __device__ __forceinline__ void send_to_others(int n, const At& at) const {
#pragma unroll 1
        for (int turn = warp + 1; turn < blocks; turn += kWarps) {
            const int to = rank + turn;
#pragma unroll 1
            for (int i = lane; i < n; i += 32) {
                exchange.send_four(at(i), to < blocks ? to : to - blocks, *at(i));
            }
        }
    }
    /// The extents of the block's cells are brought nearer before it is known which are
    /// taken. Few rows read little of all of them.
    __device__ __forceinline__ bool asks_for_all_extents() const {
        return blocks >= 8;
    }
    /// Whether cells are chosen.
    __device__ __forceinline__ bool takes_cells() const {
        return s.step.attends && s.step.far > 0 && (s.step.takes_all || p.share != 0);
    }
    /// What is wrong with the step; after the new keys have been checked.
    __device__ __forceinline__ Fault refused() const {
        return s.step.refused != Fault::none ? s.step.refused
                                             : static_cast<Fault>(s.refused_by);
    }
    /// Whether the query assigner has hidden layers.
    __device__ __forceinline__ bool hides() const {
        return s.list.query.input == RowInput::hidden;
    }
    /// Words from one query to the next, as what comes first is multiplied with them.
    __device__ __forceinline__ int vector_stride() const {
        const DeviceAssigner& query = s.list.query;
        return padded_columns(hides() ? query.padded_d : query.padded_cols);
    }
    /// And from one query's hidden units to the next's.
    __device__ __forceinline__ int unit_stride() const {
        return padded_columns(s.list.query.width);
    }
    /// The first of the queries that the row answers, and of its results.
    __device__ __forceinline__ int64_t first_head() const {
        return int64_t(s.row.query) * p.heads_q + s.row.kv_head * layout.group;
    }
};

/// Two floats as one word, such as a sum and a largest.
__device__ __forceinline__ float2 as_floats(unsigned long long x) {
    return make_float2(
            __uint_as_float(static_cast<uint32_t>(x)),
            __uint_as_float(static_cast<uint32_t>(x >> 32)));
}
__device__ __forceinline__ unsigned long long as_word(float x, float y) {
    return static_cast<unsigned long long>(__float_as_uint(y)) << 32 |
            __float_as_uint(x);
}

/// What exponents are taken beside: -inf cannot be subtracted.
__device__ __forceinline__ float shift_of(float largest) {
    return largest == -INFINITY ? 0.0f : largest;
}

} // namespace

} // namespace faiss_saap::gpu
