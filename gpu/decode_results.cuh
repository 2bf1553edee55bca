/// The end of decode()'s kernel: results of a block's warps become one, then those of
/// the row's blocks, each of which writes a share of the output. Device code.
#pragma once

#include "append_one.cuh"
#include "find_cells.cuh"
#include "decode_block.cuh"

namespace faiss_saap::gpu {

namespace {

/// Where a warp's sums and largest are, of each query, in its tiles.
template <class T, int D>
__device__ __forceinline__ float2* sums_of_warp(const DecodeBlock& b, int warp) {
    return reinterpret_cast<float2*>(
            b.shared + b.layout.tiles +
            warp * 2 * TileStream<T, D>::kTile * int(sizeof(T)));
}

/// And its outputs, kResultStride apart.
template <class T, int D>
__device__ __forceinline__ float* results_of_warp(const DecodeBlock& b, int warp) {
    return reinterpret_cast<float*>(sums_of_warp<T, D>(b, warp)) +
            DecodeLayout::sums_of_warp() / int(sizeof(float));
}

/// Keeps what the warps have seen of sink and window apart, for the statistics.
template <class T, int D>
__device__ __forceinline__ void keep_dense_sums(
        const DecodeBlock& b,
        const TileStream<T, D>& stream) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float sum = stream.sum_of_query(stream.sum[i]);
        if (b.lane < 4) {
            b.s.dense_sums[b.place()][2 * b.lane + i] = make_float2(sum, stream.largest[i]);
        }
    }
}

/// The same of warps that have seen far keys alone.
__device__ __forceinline__ void no_dense_sums(const DecodeBlock& b) {
    if (b.lane < kStreamQueries) {
        b.s.dense_sums[b.place()][b.lane] = make_float2(0, -INFINITY);
    }
}

/// Lays the warps' results beside each other.
template <class T, int D>
__device__ __forceinline__ void keep_results(
        const DecodeBlock& b,
        const TileStream<T, D>& stream) {
    const int place = b.place();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = b.lane % 4 * 2 + i;
        if (q >= b.layout.group || place < 0) {
            continue;
        }
        if (b.lane < 4) {
            sums_of_warp<T, D>(b, place)[q] = make_float2(stream.sum[i], stream.largest[i]);
        }
        float* to =
                results_of_warp<T, D>(b, place) + q * kResultStride<D> + b.lane / 4;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            to[16 * j] = stream.o[j][i];
            to[16 * j + 8] = stream.o[j][2 + i];
        }
    }
}

/// What a warp has kept, to go on from there.
template <class T, int D>
__device__ __forceinline__ void take_up_results(
        const DecodeBlock& b,
        TileStream<T, D>& stream) {
    const int place = b.place();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = b.lane % 4 * 2 + i;
        if (q >= b.layout.group) {
            continue;
        }
        const float2 of_query = sums_of_warp<T, D>(b, place)[q];
        stream.sum[i] = b.lane < 4 ? of_query.x : 0; // over the lanes
        stream.largest[i] = of_query.y;
        const float* from =
                results_of_warp<T, D>(b, place) + q * kResultStride<D> + b.lane / 4;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            stream.o[j][i] = from[16 * j];
            stream.o[j][2 + i] = from[16 * j + 8];
        }
    }
    __syncwarp(); // tiles come there
}

/// Weighs the results of so many warps for each query, in place of their sums.
/// @param each  called with the query, their sum and their largest, by a warp
template <class T, int D, class Each>
__device__ __forceinline__ void weigh_warps(
        const DecodeBlock& b,
        int warps,
        const Each& each) {
#pragma unroll 1
    for (int q = b.warp; q < b.layout.group; q += kWarps) {
        const bool is = b.lane < warps;
        float2* at = sums_of_warp<T, D>(b, is ? b.lane : 0) + q;
        const float2 of_warp = is ? *at : make_float2(0, -INFINITY);
        const float largest = most_of_warp(of_warp.y);
        const float weight = exp2f(of_warp.y - shift_of(largest));
        if (is) {
            at->x = weight;
        }
        each(q, sum_of_warp(weight * of_warp.x), largest);
    }
    sync_choosers();
}

/// Adds what was weighed. Two lanes for four components: each has every other warp, then half
/// of the components.
/// @param each  called with the four components' number, the half, and these two
template <class T, int D, class Each>
__device__ __forceinline__ void add_warps(
        const DecodeBlock& b,
        int warps,
        const Each& each) {
    const int pieces = b.layout.pieces, half = threadIdx.x % 2;
#pragma unroll 1
    for (int i0 = 0; i0 < 2 * pieces; i0 += kThreads) { // whole warps
        const int i = (i0 + static_cast<int>(threadIdx.x)) / 2;
        const int clamped = min(i, pieces - 1), q = clamped / (D / 4);
        float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int w = half; w < warps; w += 2) {
            const float weight = sums_of_warp<T, D>(b, w)[q].x;
            const auto x = *reinterpret_cast<const float4*>(
                    results_of_warp<T, D>(b, w) + q * kResultStride<D> +
                    4 * (clamped % (D / 4)));
            add_scaled(o, weight, x);
        }
        const float a = half ? o.x : o.z, c = half ? o.y : o.w; // of the other lane
        const float x = (half ? o.z : o.x) + __shfl_xor_sync(0xffffffffu, a, 1);
        const float y = (half ? o.w : o.y) + __shfl_xor_sync(0xffffffffu, c, 1);
        if (i < pieces) {
            each(i, half, x, y);
        }
    }
}

/// Keeps the results of the first of two turns as those of one more warp, where the second
/// turn has no tiles.
template <class T, int D>
__device__ __forceinline__ void keep_first_turn(const DecodeBlock& b) {
    const int warps = b.layout.tile_warps;
    sync_choosers();
    weigh_warps<T, D>(b, warps, [&](int q, float sum, float largest) {
        if (b.lane == 0) {
            sums_of_warp<T, D>(b, warps)[q] = make_float2(sum, largest);
            b.s.dense_sums[warps][q] = make_float2(0, -INFINITY); // each warp's are kept
        }
    });
    add_warps<T, D>(b, warps, [&](int i, int half, float x, float y) {
        auto* to = reinterpret_cast<float2*>(
                results_of_warp<T, D>(b, warps) + i / (D / 4) * kResultStride<D>);
        to[2 * (i % (D / 4)) + half] = make_float2(x, y);
    });
    sync_choosers();
}

/// Sends each block its share of this block's result, and all of them the sum and largest of
/// each query; tells how much comes.
template <class T, int D>
__device__ __forceinline__ void exchange_results(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const int warps = layout.result_warps();
    const int pieces = layout.pieces, each = layout.block_pieces;
    const Divisor of_block(each);
    weigh_warps<T, D>(b, warps, [&](int q, float sum, float largest) {
        const auto tell = [&](int kind, float x) {
            if (b.lane < b.blocks) {
                b.exchange.send(
                        b.words(layout.sums) + (kind * layout.group + q) * b.blocks +
                                b.rank,
                        b.lane,
                        as_word(x, largest));
            }
        };
        tell(0, sum);
        if (b.p.out.stats) {
            const float2 dense =
                    b.lane < warps ? b.s.dense_sums[b.lane][q] : make_float2(0, -INFINITY);
            tell(1, sum_of_warp(exp2f(dense.y - shift_of(largest)) * dense.x));
        }
    });
    add_warps<T, D>(b, warps, [&](int i, int half, float x, float y) {
        const int owner = of_block.quotient(i);
        b.exchange.send(
                b.words(layout.results) + 2 * (b.rank * each + i - owner * each) + half,
                owner,
                as_word(x, y));
    });
    if (threadIdx.x == 0) {
        const int own = max(0, min(each, pieces - b.rank * each));
        const int kinds = b.p.out.stats ? 2 : 1;
        const int found = b.finds_later && b.rank == 0 ? b.s.step.finds_later : 0;
        b.exchange.expect(b.blocks * (16 * own + 8 * (layout.group * kinds + found)));
    }
}

/// The first block lists the leaving key, and the last row of a sequence tells its
/// length: all have read what it was. By one thread.
__device__ __forceinline__ void end_append(const DecodeBlock& b) {
    const DecodeShared& s = b.s;
    if (!b.p.appends || b.rank != 0 || threadIdx.x != kThreads - 1) {
        return;
    }
    const bool refused = b.refused() != Fault::none;
    if (s.step.leaving >= 0 && !refused) {
        list_one(s.list, s.leaving_cell, s.step.leaving, b.p.sink);
#pragma unroll 4
        for (int k = 1; k < s.step.finds; k++) {
            s.list.cells[s.step.leaving + k - b.p.sink] =
                    static_cast<uint16_t>(s.found[k]);
        }
    }
    BatchItem& item = b.p.items[s.row.item];
    if (atomicAdd(&item.done, 1) == b.p.heads_kv - 1) {
        item.done = 0;
        if (!refused) {
            s.row.sequence->length = s.step.length;
            const int known = s.step.finds ? s.step.finds
                    : s.step.finds_later   ? 1 + s.step.finds_later
                                           : 0;
            if (known) {
                note_assigned(*s.row.sequence, s.step.leaving + known, 0);
            }
        }
    }
}

/// The cells that were found for later steps. By the first block, after results have
/// come from all.
__device__ __forceinline__ void note_found_later(const DecodeBlock& b) {
    const DecodeStep& step = b.s.step;
#pragma unroll 1
    for (int k = b.warp; k < step.finds_later; k += kWarps) {
        const unsigned long long best = best_of_blocks(b, k);
        if (b.lane == 0) {
            b.s.list.cells[step.leaving + 1 + k - b.p.sink] =
                    static_cast<uint16_t>(cell_of_scored(best));
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
        if (b.rank != 0 || b.refused() != Fault::none) {
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
                stats.cells = s.choice.taken[CellChoice::kOthers][CellChoice::kWith].x;
                stats.keys_read = s.choice.taken[CellChoice::kOthers][CellChoice::kWith].y;
                stats.far_keys = s.step.far;
                stats.dense_mass = each * mass;
                stats.keys_ranked = 0;
            }
        }
    }
    sync_choosers();
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
        if (piece >= pieces || b.refused() != Fault::none) {
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
            add_scaled(o, weights[block], y);
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
    if (b.finds_later && b.rank == 0 && b.refused() == Fault::none) {
        note_found_later(b);
    }
    weigh_results(b, lse);
    write_output<D>(b);
}

/// Tells the host what was wrong with the sequence.
__device__ __forceinline__ void raise_faults(const DecodeBlock& b) {
    const DecodeShared& s = b.s;
    if (threadIdx.x != 0) {
        return;
    }
    if (s.bad_page && b.refused() == Fault::none) {
        raise(b.p.flag, Fault::attend_page, s.row.item);
    }
    if (b.rank != 0 || s.row.kv_head != 0) {
        return;
    }
    if (b.refused() != Fault::none) {
        raise(b.p.flag, b.refused(), s.row.item);
    } else if (!s.step.readable) {
        raise(b.p.flag, Fault::attend_view, s.row.item);
    }
}

} // namespace

} // namespace faiss_saap::gpu
