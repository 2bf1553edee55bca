/// The end of decode()'s kernel: results of a block's warps become one, then those of
/// the row's blocks, each of which writes a share of the output. Device code.
#pragma once

#include "append_one.cuh"
#include "decode_block.cuh"

namespace faiss_saap::gpu {

namespace {

/// Where a warp's results are, in its tiles: kStreamQueries, kResultStride apart.
template <class T, int D>
__device__ __forceinline__ float* results_of_warp(const DecodeBlock& b, int warp) {
    return b.floats(
            b.layout.tiles + warp * 2 * TileStream<T, D>::kTile * int(sizeof(T)));
}

/// Keeps what the warps have seen of sink and window, before they go on to far keys.
template <class T, int D>
__device__ __forceinline__ void keep_dense_sums(
        const DecodeBlock& b,
        const TileStream<T, D>& stream) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float sum = stream.sum_of_query(stream.sum[i]);
        if (b.lane < 4) {
            b.s.dense_sums[b.warp][2 * b.lane + i] = make_float2(sum, stream.largest[i]);
        }
    }
}

/// Lays the warps' results beside each other.
template <class T, int D>
__device__ __forceinline__ void keep_results(
        const DecodeBlock& b,
        const TileStream<T, D>& stream) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = b.lane % 4 * 2 + i;
        if (q >= b.layout.group || b.warp >= b.layout.tile_warps) {
            continue;
        }
        if (b.lane < 4) {
            b.s.all_sums[b.warp][q] = make_float2(stream.sum[i], stream.largest[i]);
        }
        float* to =
                results_of_warp<T, D>(b, b.warp) + q * kResultStride<D> + b.lane / 4;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            to[16 * j] = stream.o[j][i];
            to[16 * j + 8] = stream.o[j][2 + i];
        }
    }
    __syncthreads();
}

/// Four components of a query's result, and the sums that it has been weighed by.
struct ResultPiece {
    float o[4] = {};
    float largest = -INFINITY;
    float sum = 0, dense_sum = 0; ///< of all keys, of sink and window

    /// Of all warps; by four lanes, each of which has every fourth warp.
    template <class T, int D>
    __device__ __forceinline__ void gather(const DecodeBlock& b, int q, int piece) {
        const DecodeShared& s = b.s;
        const int part = threadIdx.x % 4, warps = b.layout.tile_warps;
#pragma unroll 4
        for (int w = part; w < warps; w += 4) {
            largest = fmaxf(largest, s.all_sums[w][q].y);
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float shift = shift_of(largest);
#pragma unroll 4
        for (int w = part; w < warps; w += 4) {
            const float weight = exp2f(s.all_sums[w][q].y - shift);
            sum += weight * s.all_sums[w][q].x;
            if (b.p.out.stats) {
                dense_sum += exp2f(s.dense_sums[w][q].y - shift) * s.dense_sums[w][q].x;
            }
            const auto from = *reinterpret_cast<const float4*>(
                    results_of_warp<T, D>(b, w) + q * kResultStride<D> + 4 * piece);
            o[0] += weight * from.x;
            o[1] += weight * from.y;
            o[2] += weight * from.z;
            o[3] += weight * from.w;
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
            dense_sum += __shfl_xor_sync(0xffffffffu, dense_sum, step);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                o[j] += __shfl_xor_sync(0xffffffffu, o[j], step);
            }
        }
    }
};

/// Sends each block its share of this block's result, and all of them the sums; tells how
/// much comes.
template <class T, int D>
__device__ __forceinline__ void exchange_results(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const bool stats = b.p.out.stats;
    const int pieces = layout.pieces, each = layout.block_pieces;
    // Four lanes for each, and whole warps.
#pragma unroll 1
    for (int i0 = 0; i0 < 4 * pieces; i0 += kThreads) {
        const int i = (i0 + static_cast<int>(threadIdx.x)) / 4, part = threadIdx.x % 4;
        const int clamped = min(i, pieces - 1), q = clamped / (D / 4);
        ResultPiece piece;
        piece.gather<T, D>(b, q, clamped % (D / 4));
        if (i >= pieces) {
            continue;
        }
        const int owner = i / each;
        auto* to = b.words(layout.results) + 2 * (b.rank * each + i - owner * each);
        if (part < 2) {
            b.exchange.send(
                    to + part,
                    owner,
                    part ? as_word(piece.o[2], piece.o[3])
                         : as_word(piece.o[0], piece.o[1]));
        }
        if (i % (D / 4) == 0 && (part % 2 == 0 || stats)) {
            const auto sums = part % 2 ? as_word(piece.dense_sum, piece.largest)
                                       : as_word(piece.sum, piece.largest);
            auto* at = b.words(layout.sums) +
                    (part % 2 * layout.group + q) * b.blocks + b.rank;
#pragma unroll 1
            for (int block = part / 2; block < b.blocks; block += 2) {
                b.exchange.send(at, block, sums);
            }
        }
    }
    if (threadIdx.x == 0) {
        const int own = max(0, min(each, pieces - b.rank * each));
        b.exchange.expect(b.blocks * (16 * own + 8 * layout.group * (stats ? 2 : 1)));
    }
}

/// The first block lists the leaving key, and the last row of a sequence tells its
/// length: all have read what it was. By one thread.
__device__ __forceinline__ void end_append(const DecodeBlock& b) {
    const DecodeShared& s = b.s;
    if (!b.p.appends || b.rank != 0 || threadIdx.x != kThreads - 1) {
        return;
    }
    if (s.step.leaving >= 0 && s.step.refused == Fault::none) {
        list_one(s.list, s.leaving_cell, s.step.leaving, b.p.sink);
    }
    BatchItem& item = b.p.items[s.row.item];
    if (atomicAdd(&item.done, 1) == b.p.heads_kv - 1) {
        item.done = 0;
        if (s.step.refused == Fault::none) {
            s.row.sequence->length = s.step.length;
        }
    }
}

/// What each block's result weighs in the output, and what the caller's does; LSE and
/// what was read, by the first block.
/// @param lse  the caller's, of head `lane`; -inf: none
__device__ __forceinline__ void weigh_results(const DecodeBlock& b, float lse) {
    const DecodeLayout& layout = b.layout;
    const DecodeShared& s = b.s;
    const AttendOutput& out = b.p.out;
    const int lane = b.lane, blocks = b.blocks;
    const auto* sums = b.words(layout.sums);
#pragma unroll 1
    for (int q = b.warp; q < layout.group; q += kWarps) {
        const bool is = lane < blocks;
        const float of_caller = __shfl_sync(0xffffffffu, lse, q);
        const float2 of_block = is ? as_floats(sums[q * blocks + lane])
                : lane == blocks   ? make_float2(1, kLog2E * of_caller)
                                   : make_float2(0, -INFINITY);
        const float shift = shift_of(most_of_warp(of_block.y));
        const float weight = exp2f(of_block.y - shift);
        const float total = sum_of_warp(weight * of_block.x);
        const float each = total > 0 ? 1 / total : 0.0f;
        if (lane <= blocks) {
            b.floats(layout.weights)[q * (blocks + 1) + lane] = each * weight;
        }
        if (b.rank != 0 || s.step.refused != Fault::none) {
            continue;
        }
        if (lane == 0 && out.lse) {
            out.lse[b.first_head() + q] =
                    total > 0 ? (shift + log2f(total)) / kLog2E : -INFINITY;
        }
        if (out.stats) {
            const float2 dense = is ? as_floats(sums[(layout.group + q) * blocks + lane])
                                    : make_float2(0, -INFINITY);
            const float mass = sum_of_warp(exp2f(dense.y - shift) * dense.x);
            if (lane == 0) {
                AttendStats& stats = out.stats[b.first_head() + q];
                stats.cells = s.selection.taken;
                stats.keys_read = s.selection.keys;
                stats.far_keys = s.step.far;
                stats.dense_mass = each * mass;
                stats.keys_ranked = 0;
            }
        }
    }
    __syncthreads();
}

/// Writes the block's share of the output.
template <int D>
__device__ __forceinline__ void write_output(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const int blocks = b.blocks;
    const int pieces = layout.pieces, each = layout.block_pieces;
    const auto* results = reinterpret_cast<const float4*>(b.shared + layout.results);
#pragma unroll 1
    for (int i = threadIdx.x; i < each; i += kThreads) {
        const int piece = b.rank * each + i;
        if (piece >= pieces || b.s.step.refused != Fault::none) {
            break;
        }
        const float* weights = b.floats(layout.weights) + piece / (D / 4) * (blocks + 1);
        auto* to = reinterpret_cast<float4*>(b.p.out.output + b.first_head() * D) + piece;
        float4 o = make_float4(0, 0, 0, 0);
        if (weights[blocks] > 0) { // else it may hold anything
            o = *to;
            o.x *= weights[blocks];
            o.y *= weights[blocks];
            o.z *= weights[blocks];
            o.w *= weights[blocks];
        }
#pragma unroll 4
        for (int block = 0; block < blocks; block++) {
            const float4 y = results[block * each + i];
            o.x += weights[block] * y.x;
            o.y += weights[block] * y.y;
            o.z += weights[block] * y.z;
            o.w += weights[block] * y.w;
        }
        *to = o;
    }
}

/// Merges the results of the row's blocks with each other and with the caller's.
template <class T, int D>
__device__ __forceinline__ void end_row(DecodeBlock& b) {
    const AttendOutput& out = b.p.out;
    // The caller's, before the first block overwrites it, which waits for all results.
    const float lse = out.merge && b.lane < b.layout.group
            ? out.lse[b.first_head() + b.lane]
            : -INFINITY;
    exchange_results<T, D>(b);
    end_append(b); // while the others' results are on their way
    b.exchange.wait();
    weigh_results(b, lse);
    write_output<D>(b);
}

/// Tells the host what was wrong with the sequence.
__device__ __forceinline__ void raise_faults(const DecodeBlock& b) {
    const DecodeShared& s = b.s;
    if (b.rank != 0 || threadIdx.x != 0 || s.row.kv_head != 0) {
        return;
    }
    if (s.step.refused != Fault::none) {
        raise(b.p.flag, s.step.refused, s.row.item);
    } else if (!s.step.readable) {
        raise(b.p.flag, Fault::attend_view, s.row.item);
    }
}

} // namespace

} // namespace faiss_saap::gpu
