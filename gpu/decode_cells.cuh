/// Which cells a row of decode() reads: each block scores its share of them, and the
/// blocks tell each other exponentials of the scores and their sums; each weighs all cells
/// and takes the same ones. Device code.
#pragma once

#include "decode_block.cuh"

namespace faiss_saap::gpu {

namespace {

/// The block's units of a hidden layer, to all other blocks, and waits for theirs.
__device__ __forceinline__ void exchange_units(
        DecodeBlock& b,
        const RowProducts& product,
        const uint32_t* units) {
    const DecodeLayout& layout = b.layout;
    const DeviceAssigner& query = b.s.list.query;
    const int each = (product.end - product.first + 3) / 4;
    const auto* from = reinterpret_cast<const float4*>(units + product.first);
    __syncthreads();
    b.send_to_others(layout.group * each, [&](int i) {
        const int head = i / each;
        return from + head * (b.unit_stride() / 4) + i - head * each;
    });
    const bool all = (b.blocks - 1) * DecodeLayout::share_in_fours(query.width, b.blocks) <
            query.width;
    if (!all && static_cast<int>(threadIdx.x) < b.blocks) {
        // Each must hear of each in every exchange, or it would be too far ahead.
        b.exchange.send(b.ints(layout.signs) + b.rank, threadIdx.x, 0);
    }
    if (threadIdx.x == 0) {
        const int others = (query.width + 3) / 4 - each;
        b.exchange.expect(16 * layout.group * others + (all ? 0 : 4 * b.blocks));
    }
    b.exchange.wait();
}

/// Scores of the block's cells for each query head, and for the keys whose cells are
/// sought; of hidden layers each block has some units.
__device__ __forceinline__ void score_cells(DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    DecodeShared& s = b.s;
    const bool listed = s.step.leaving >= 0 && s.step.finds == 0;
    uint16_t leaving_cell = 0;
    if (threadIdx.x == kThreads - 1 && listed) {
        leaving_cell = __ldcg(s.list.cells + s.step.leaving - b.p.sink);
    }
    auto* hidden = reinterpret_cast<uint32_t*>(b.ints(layout.hidden));
    auto* activated = reinterpret_cast<uint32_t*>(b.ints(layout.activated));
    const auto* x = reinterpret_cast<const uint32_t*>(b.ints(layout.x));
    int stride = b.vector_stride();
    const int of_units = b.unit_stride();
    const int nproduct = s.layers + 1 + (s.step.finds > 0);
#pragma unroll 1
    for (int layer = 0; layer < nproduct; layer++) {
        // in; then up and down of each residual block, which adds to what was; scores.
        const bool hides = layer < s.layers, of_key = layer > s.layers;
        const bool up = layer % 2, adds = layer && !up;
        uint32_t* y = up ? activated : hidden;
        if (of_key) {
            x = reinterpret_cast<const uint32_t*>(b.ints(layout.sought));
            stride = s.products[layer].cols;
        }
        const ProductRoom room = {
                b.floats(layout.products), layout.head_stride == 4 ? 2 : 3};
        multiply_rows(s.products[layer], x, stride, room, [&](int v, int r, float value) {
            if (hides) {
                uint32_t& unit = y[v * of_units + r];
                value = up ? fmaxf(value, 0.0f)
                        : adds ? value + joined_float(unit)
                               : value;
                unit = split_float(value);
            } else if (of_key) {
                b.floats(layout.sought_scores)[v * layout.cells + r - s.first] = value;
            } else {
                b.floats(layout.scores)[r * layout.head_stride + v] = value;
            }
        });
        if (hides) {
            exchange_units(b, s.products[layer], y);
            x = y;
            stride = of_units;
        }
    }
    if (threadIdx.x == kThreads - 1) {
        s.leaving_cell = listed ? leaving_cell : -1;
    }
    __syncthreads();
}

/// Turns the block's scores into exponentials beside the largest one of a part, and tells
/// the sum over the keys of each part.
__device__ __forceinline__ void tell_sums(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const DecodeShared& s = b.s;
    const int g = b.warp % layout.head_stride, part = b.warp / layout.head_stride;
    const bool is = g < layout.group;
    const int first = s.first + 32 * part + b.lane, end = s.first + s.own;
    const int step = 32 * layout.parts;
    float* of_head = b.floats(layout.scores) + g;
    const int32_t* counts = b.ints(layout.counts);
    // Of cells with keys, where there are any: an empty one may be far above them, and it
    // may get the leaving key.
    constexpr float kMost = 80; // exponents that floats hold
    float most = -INFINITY, most_of_all = -INFINITY;
    bool bad = false;
#pragma unroll 2
    for (int c = first; is && c < end; c += step) {
        const float score = of_head[c * layout.head_stride];
        bad = bad || !(score < INFINITY);
        most_of_all = fmaxf(most_of_all, score);
        most = counts[c] || c == s.leaving_cell ? fmaxf(most, score) : most;
    }
    most = most_of_warp(most);
    most_of_all = most_of_warp(most_of_all);
    most = most > -INFINITY ? most : most_of_all;
    float sum = 0;
#pragma unroll 2
    for (int c = first; c < end; c += step) {
        float& score = of_head[c * layout.head_stride];
        score = is && most > -INFINITY
                ? __expf(fminf(b.p.scale * (score - most), kMost))
                : 0.0f;
        const int keys = counts[c] + (c == s.leaving_cell);
        sum += keys ? static_cast<float>(keys) * score : 0.0f;
    }
    sum = sum_of_warp(sum);
    if (is && b.lane < b.blocks) {
        const int at = (b.rank * layout.parts + part) * layout.head_stride + g;
        b.exchange.send(
                b.words(layout.partial) + at, b.lane, as_word(sum, b.p.scale * most));
    }
    if (bad && !s.step.takes_all) {
        raise(b.p.flag, Fault::route_query, s.row.query);
    }
    __syncthreads();
}

/// The exponentials of the block's cells, to all other blocks.
__device__ __forceinline__ void tell_exponentials(const DecodeBlock& b) {
    const int each = b.layout.head_stride / 4;
    const auto* from = reinterpret_cast<const float4*>(b.floats(b.layout.scores)) +
            b.s.first * each;
    b.send_to_others(b.s.own * each, [&](int i) { return from + i; });
}

/// The block's best cell for each key that is sought, to all blocks.
__device__ __forceinline__ void tell_best_of_sought(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
#pragma unroll 1
    for (int k = b.warp; k < b.s.step.finds; k += kWarps) {
        const float* scores = b.floats(layout.sought_scores) + k * layout.cells;
        unsigned long long best = 0;
#pragma unroll 1
        for (int c = b.lane; c < b.s.own; c += 32) {
            best = max(best, scored_cell(scores[c], b.s.first + c));
        }
        best = largest_of_warp(best);
        if (b.lane < b.blocks) {
            b.exchange.send(b.words(layout.found) + k * b.blocks + b.rank, b.lane, best);
        }
    }
}

/// Tells what the choice of cells depends on.
__device__ __forceinline__ void tell_cells(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const int finds = b.s.step.finds;
    tell_sums(b);
    tell_exponentials(b);
    if (finds) {
        tell_best_of_sought(b);
        __syncthreads(); // tiles come where scores have been
    }
    if (threadIdx.x == 0) {
        const int others = b.s.list.query.ncell - b.s.own;
        b.exchange.expect(
                4 * layout.head_stride * others +
                8 * b.blocks * (layout.group * layout.parts + finds));
    }
}

/// The cells of the keys that were sought, the first of which leaves the window now.
__device__ __forceinline__ void find_cells(const DecodeBlock& b) {
#pragma unroll 1
    for (int k = b.warp; k < b.s.step.finds; k += kWarps) {
        const unsigned long long best = largest_of_warp(
                b.lane < b.blocks ? b.words(b.layout.found)[k * b.blocks + b.lane] : 0);
        if (b.lane == 0) {
            b.s.found[k] = cell_of_scored(best);
            if (k == 0) {
                b.s.leaving_cell = cell_of_scored(best);
            }
        }
    }
    __syncthreads();
}

/// The part, of all blocks' ones, that has a cell.
/// @param each  cells of a block, at most
__device__ __forceinline__ int part_of_cell(
        const DecodeLayout& layout,
        const Divisor& each,
        int cell) {
    const int block = each.quotient(cell);
    return block * layout.parts + (cell - block * each.by) / 32 % layout.parts;
}

/// What the exponentials of each part weigh: exp(their largest) over the sum over all
/// keys, for each head.
__device__ __forceinline__ void find_factors(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const DecodeShared& s = b.s;
    const int g = b.warp, parts = b.blocks * layout.parts;
    if (g < layout.head_stride) {
        const bool is = g < layout.group && b.lane < parts;
        const float2 of_part = is
                ? as_floats(b.words(layout.partial)[b.lane * layout.head_stride + g])
                : make_float2(0, -INFINITY);
        float keys = of_part.x;
        if (s.step.finds) { // the key that leaves now counts in its cell
            const Divisor each(DecodeLayout::share(s.list.query.ncell, b.blocks));
            const int part = part_of_cell(layout, each, s.leaving_cell);
            const float more =
                    b.floats(layout.scores)[s.leaving_cell * layout.head_stride + g];
            keys += b.lane == part ? more : 0.0f;
        }
        // Parts without a key weigh nothing.
        const float most = most_of_warp(keys > 0 ? of_part.y : -INFINITY);
        float factor = keys > 0 && of_part.y > -INFINITY ? __expf(of_part.y - most) : 0.0f;
        const float sum = sum_of_warp(keys * factor);
        factor = is && sum > 1e-30f ? factor / sum : 0.0f;
        if (b.lane < parts) {
            b.factors(b.lane)[g] = factor;
        }
    }
    __syncthreads();
}

/// Bins of masses per key, of which each head's is at most 1: eight for each factor of
/// two, down to 2^-29.
struct MassBins {
    __device__ __forceinline__ int operator()(unsigned long long key) const {
        constexpr int kTop = 0x41000000; // 8.0f
        const int bits = static_cast<int>(key >> 32 & 0x7fffffff);
        return max(0, min(Selection::kBins - 1, (kTop - bits) >> 20));
    }
};

/// Waits for what all blocks tell, finds the mass per key of all cells, of which the
/// group's heads are summed, and puts them into bins. Masses below 1e-38 are equal.
/// @return keys of the smallest cell that this thread has seen
__device__ __forceinline__ int weigh_cells(DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    DecodeShared& s = b.s;
    b.exchange.wait();
    if (s.step.finds) {
        find_cells(b);
    }
    find_factors(b);
    const int ncell = s.list.query.ncell, leaving = s.leaving_cell;
    const int stride = layout.head_stride;
    const Divisor each(DecodeLayout::share(ncell, b.blocks));
    int32_t* counts = b.ints(layout.counts);
    const float* exponentials = b.floats(layout.scores);
    int least = INT32_MAX;
#pragma unroll 4
    for (int c = threadIdx.x; c < layout.padded_cells; c += kThreads) {
        unsigned long long key = 0;
        if (c < ncell) {
            const float* factors = b.factors(part_of_cell(layout, each, c));
            float mass = 0;
#pragma unroll 1
            for (int g = 0; g < stride; g += 4) {
                const auto x = *reinterpret_cast<const float4*>(
                        exponentials + c * stride + g);
                const auto w = *reinterpret_cast<const float4*>(factors + g);
                mass += x.x * w.x + x.y * w.y + x.z * w.z + x.w * w.w;
            }
            const int count = counts[c] + (c == leaving);
            counts[c] = count;
            if (count) {
                key = cell_key(s.step.takes_all ? 0 : mass, c);
            }
            bin_cell(s.selection, MassBins(), key, count, b.p.nprobe < ncell, least);
        }
        b.words(layout.keys)[c] = key;
    }
    return least;
}

/// Takes cells within the policy's limits; every block takes the same ones.
__device__ __forceinline__ void take_cells_of_row(DecodeBlock& b) {
    const DecodeParams& p = b.p;
    DecodeShared& s = b.s;
    const int least = weigh_cells(b);
    const int far = s.step.attends ? s.step.far : 0;
    const bool all = s.step.takes_all;
    if (far > 0 && (all || p.share != 0)) {
        const int64_t most =
                min(p.max_keys, static_cast<int64_t>(p.max_selectivity * far));
        const int64_t limit =
                all || most >= far ? far : static_cast<int64_t>(p.share * most + 1e-9);
        take_cells(
                s.selection,
                MassBins(),
                b.words(b.layout.keys),
                b.layout.padded_cells,
                b.ints(b.layout.counts),
                all ? s.list.query.ncell : p.nprobe,
                static_cast<int>(limit),
                /*at_least_one=*/true,
                least,
                [&](int i, int cell, int count, int begin) {
                    b.taken()[i] = make_int2(cell, begin);
                    if (i % b.blocks == b.rank) { // some block asks for it first
                        prefetch(s.list.extents + int64_t(cell) * kExtents);
                    }
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
