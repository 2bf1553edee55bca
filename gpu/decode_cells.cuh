/// Which cells a row of decode() reads: each block scores its share of them, the blocks
/// tell each other the sums that scores are weighed by, then each cell's mass per key,
/// and each takes the same cells. Device code.
#pragma once

#include "decode_block.cuh"

namespace faiss_saap::gpu {

namespace {

/// Scores of the block's cells for each query head, and for the leaving key; hidden
/// layers, of which each block has some units, are told to all blocks.
/// @param at_hand  by load_first_pieces, of the first product
__device__ __forceinline__ void score_cells(DecodeBlock& b, RowPieces& at_hand) {
    const DecodeLayout& layout = b.layout;
    const DeviceAssigner& query = b.s.list.query;
    const float* x = b.floats(layout.x);
#pragma unroll 1
    for (int layer = 0; layer < b.s.nproduct; layer++) {
        const RowProducts& product = b.s.products[layer];
        // in; then up and down of each residual block, which adds to what was; scores.
        const bool hides = layer < b.s.layers, of_key = layer > b.s.layers;
        const bool up = layer % 2;
        float* y = b.floats(up ? layout.activated : layout.hidden);
        float* alone = b.floats(of_key ? layout.key_scores : layout.scores);
        multiply_rows(
                product,
                at_hand,
                of_key ? b.floats(layout.leaving) : x,
                hides && layer && !up ? y : nullptr,
                query.padded_width,
                [&](int v, int r, float value, int second) {
                    if (!hides) {
                        alone[v * layout.cells + r - product.first] = value;
                        return;
                    }
                    value = up ? fmaxf(value, 0.0f) : value;
#pragma unroll 4
                    for (int i = second; i < b.blocks; i += 2) {
                        b.exchange.send(y + v * query.padded_width + r, i, value);
                    }
                });
        if (layer + 1 < b.s.nproduct) {
            load_first_pieces(b.s.products[layer + 1], at_hand);
        }
        if (hides) {
            x = y;
            if (threadIdx.x == 0) {
                b.exchange.expect(4 * layout.group * query.width);
            }
            b.exchange.wait();
        }
    }
    __syncthreads();
}

/// The block's best cell for the leaving key, and what the heads score it. By the last
/// warp.
__device__ __forceinline__ void tell_best_of_leaving(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    if (b.warp != kWarps - 1 || b.s.step.leaving < 0) {
        return;
    }
    unsigned long long best = 0;
#pragma unroll 1
    for (int c = b.lane; c < b.s.own; c += 32) {
        best = max(best, scored_cell(b.floats(layout.key_scores)[c], b.s.first + c));
    }
    best = largest_of_warp(best);
    const int cell = best ? cell_of_scored(best) - b.s.first : 0;
    if (b.lane < b.blocks) {
        b.exchange.send(b.words(layout.found) + b.rank, b.lane, best);
    }
    if (b.lane < layout.group) {
        b.exchange.send_to_all(
                b.floats(layout.at_best) + b.lane * b.blocks + b.rank,
                b.floats(layout.scores)[b.lane * layout.cells + cell]);
    }
}

/// Of each head, the largest score of the block's keys and the sum of all exponentials
/// beside it.
__device__ __forceinline__ void tell_sums(const DecodeBlock& b) {
    const DecodeParams& p = b.p;
    const DecodeLayout& layout = b.layout;
    const int32_t* counts = b.ints(layout.own_counts);
#pragma unroll 1
    for (int g = b.warp; g < layout.group; g += kWarps) {
        const float* mine = b.floats(layout.scores) + g * layout.cells;
        float most = -INFINITY;
        bool bad = false;
#pragma unroll 4
        for (int c = b.lane; c < b.s.own; c += 32) {
            bad = bad || !(mine[c] < INFINITY);
            most = counts[c] ? fmaxf(most, p.scale * mine[c]) : most;
        }
        if (bad && !b.s.step.takes_all) {
            raise(p.flag, Fault::route_query, b.s.row.query);
        }
        most = most_of_warp(most);
        float sum = 0;
#pragma unroll 4
        for (int c = b.lane; c < b.s.own; c += 32) {
            const auto keys = static_cast<float>(counts[c]);
            sum += keys > 0 && most > -INFINITY
                    ? keys * __expf(p.scale * mine[c] - most)
                    : 0.0f;
        }
        sum = sum_of_warp(sum);
        if (b.lane < b.blocks) {
            b.exchange.send(
                    b.words(layout.partial) + g * b.blocks + b.rank,
                    static_cast<unsigned>(b.lane),
                    as_word(sum, most));
        }
    }
}

/// Tells what the weights of cells depend on.
__device__ __forceinline__ void tell_sums_and_best(const DecodeBlock& b) {
    tell_best_of_leaving(b);
    tell_sums(b);
    if (threadIdx.x == 0) {
        const int group = b.layout.group;
        const int of_leaving = b.s.step.leaving >= 0 ? 8 + 4 * group : 0;
        b.exchange.expect(b.blocks * (8 * group + of_leaving));
    }
}

/// log of the sum over all keys, of each head, and the leaving key's cell, in which it
/// counts.
__device__ __forceinline__ void find_norms_of_row(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
#pragma unroll 1
    for (int g = b.warp; g < layout.group; g += kWarps) {
        const bool is = b.lane < b.blocks, leaves = b.s.step.leaving >= 0;
        const float2 of_block = is
                ? as_floats(b.words(layout.partial)[g * b.blocks + b.lane])
                : make_float2(0, -INFINITY);
        const unsigned long long best = is && leaves ? b.words(layout.found)[b.lane] : 0;
        const unsigned long long best_of_all = largest_of_warp(best);
        const bool mine = best && best == best_of_all;
        const float added = mine
                ? b.p.scale * b.floats(layout.at_best)[g * b.blocks + b.lane]
                : -INFINITY;
        const float most = most_of_warp(fmaxf(of_block.y, added));
        float sum = 0;
        if (most > -INFINITY) {
            sum = (of_block.x > 0 ? of_block.x * __expf(of_block.y - most) : 0.0f) +
                    (mine ? __expf(added - most) : 0.0f);
        }
        sum = sum_of_warp(sum);
        if (b.lane == 0) {
            b.s.norm[g] = most > -INFINITY ? most + __logf(sum) : 0.0f;
            if (g == 0) {
                b.s.leaving_cell = leaves ? cell_of_scored(best_of_all) : -1;
            }
        }
    }
    __syncthreads();
}

/// log of the mass per key of the block's cells, of which the group's heads are summed,
/// to all blocks: four lanes have a cell, and every fourth head of it; then each tells
/// every fourth block.
__device__ __forceinline__ void tell_masses(const DecodeBlock& b) {
    constexpr int kHeads = kStreamQueries / 4; // of a lane
    const DecodeLayout& layout = b.layout;
    const DecodeShared& s = b.s;
    const float* scores = b.floats(layout.scores);
    const int own = s.own, first = s.first;
#pragma unroll 1
    for (int i0 = 0; i0 < 4 * own; i0 += kThreads) { // whole warps
        const int i = i0 + static_cast<int>(threadIdx.x), part = i % 4;
        const int c = min(i / 4, own - 1), cell = first + c;
        const int count = b.ints(layout.own_counts)[c] + (cell == s.leaving_cell);
        float y[kHeads], most = -INFINITY, sum = 0;
#pragma unroll
        for (int j = 0; j < kHeads; j++) {
            const int g = part + 4 * j;
            y[j] = g < layout.group ? b.p.scale * scores[g * layout.cells + c] - s.norm[g]
                                    : -INFINITY;
            most = fmaxf(most, y[j]); // passes over NaN
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
#pragma unroll
        for (int j = 0; j < kHeads; j++) {
            sum += y[j] > -INFINITY ? __expf(y[j] - most) : 0.0f;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float mass = most > -INFINITY ? most + __logf(sum) : -INFINITY;
        const unsigned long long key =
                count ? cell_key(s.step.takes_all ? 0 : mass, cell) : 0ull;
#pragma unroll 1
        for (int to = part; i < 4 * own && to < b.blocks; to += 4) {
            b.exchange.send(b.words(layout.keys) + cell, to, key);
            b.exchange.send(b.ints(layout.counts) + cell, to, count);
        }
    }
}

/// Waits for the sums of all blocks, weighs the block's cells and waits for the weights
/// of all cells.
__device__ __forceinline__ void weigh_cells(DecodeBlock& b) {
    b.exchange.wait();
    find_norms_of_row(b);
    tell_masses(b);
    if (threadIdx.x == 0) {
        b.exchange.expect(12 * b.s.list.query.ncell);
    }
    b.exchange.wait();
}

/// Takes cells within the policy's limits; every block takes the same ones.
__device__ __forceinline__ void take_cells_of_row(const DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const int far = s.step.attends ? s.step.far : 0;
    const bool all = s.step.takes_all;
    if (far > 0 && (all || p.share != 0)) {
        const int64_t most =
                min(p.max_keys, static_cast<int64_t>(p.max_selectivity * far));
        const int64_t limit =
                all || most >= far ? far : static_cast<int64_t>(p.share * most + 1e-9);
        // A mass per key is at most 1, and few matter that are below exp(-24).
        take_cells(
                s.selection,
                Bins{0, Selection::kBins / 24.0f},
                b.words(b.layout.keys),
                b.layout.padded_cells,
                b.ints(b.layout.counts),
                all ? s.list.query.ncell : p.nprobe,
                static_cast<int>(limit),
                /*at_least_one=*/true,
                [&](int i, int cell, int count, int begin) {
                    b.taken()[i] = make_int2(cell, begin);
                    if (cell == s.leaving_cell) { // its newest key
                        s.leaving_at = begin + count - 1;
                    }
                });
    } else if (threadIdx.x == 0) {
        s.selection.taken = s.selection.keys = 0;
    }
    __syncthreads();
}

} // namespace

} // namespace faiss_saap::gpu
