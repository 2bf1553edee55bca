/// Which cells a row of decode() reads: each block scores its share of them, and the
/// blocks tell each other exponentials of the scores and their sums; each weighs all cells
/// and takes the same ones. Device code.
#pragma once

#include "decode_block.cuh"
#include "far_keys.cuh"
#include "find_cells.cuh"

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
    sync_choosers();
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

/// Lays the vectors of both rows of a pair beside each other: each block scores half of the
/// cells for both, so weights are read once for two rows.
/// @param x  this row's
__device__ __forceinline__ uint32_t* gather_both(
        const DecodeBlock& b,
        const uint32_t* x,
        int stride) {
    auto* both = reinterpret_cast<uint32_t*>(b.shared + b.layout.both);
    const int each = b.layout.group * stride / 4; // of 16 bytes
    sync_cluster(); // vectors are there
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * each; i += kThreads) {
        const int row = i >= each;
        reinterpret_cast<float4*>(both)[i] = load_from_block(
                reinterpret_cast<const float4*>(x) + i - row * each, row);
    }
    sync_choosers();
    return both;
}

/// Scores of the block's cells for each query head, and for the keys whose cells are
/// sought, whose best cells it tells; of hidden layers each block has some units,
/// or all of a small one.
template <int D>
__device__ __forceinline__ void score_cells(DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    DecodeShared& s = b.s;
    if (b.window_first() && s.step.finds) {
        load_keys_that_leave<D>(b, s.step.finds); // where tiles have been until now
        sync_choosers();
    }
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
    int layer = 0;
    if (s.layers == 1 && s.products[0].everywhere && is_short<D>(s.products[0])) {
        multiply_short_rows<D>(s.products[0], x, stride, [&](int v, int r, float value) {
            hidden[v * of_units + r] = split_float(value < 0 ? 0.0f : value); // NaN stays
        });
        sync_choosers();
        x = hidden;
        stride = of_units;
        layer = 1;
    }
#pragma unroll 1
    for (; layer < nproduct; layer++) {
        // in; then up and down of each residual block, which adds to what was; scores.
        const bool hides = layer < s.layers, of_key = layer > s.layers;
        const bool up = layer % 2, adds = layer && !up;
        const bool rectifies = up || s.layers == 1;
        uint32_t* y = up ? activated : hidden;
        if (of_key) {
            x = b.sought_keys();
            stride = s.products[layer].cols;
        }
        const ProductRoom room = {
                b.floats(layout.products), layout.head_stride == 4 ? 2 : 3};
        RowProducts product = s.products[layer];
        const bool for_both = layer == s.layers && b.is_paired();
        if (for_both) {
            x = gather_both(b, x, stride);
        }
        product.n = of_key ? static_cast<uint8_t>(s.step.finds) : product.n;
        const auto keep_score = [&](int v, int r, float value) {
            const int row = for_both && v >= layout.group;
            float* to = b.floats(layout.scores) +
                    (v - row * layout.group) * layout.cell_stride + r;
            if (for_both) {
                store_to_block(to, row, value);
            } else {
                *to = value;
            }
        };
        if (layer == s.layers && is_short<D>(product)) {
            multiply_short_rows<D>(product, x, stride, keep_score);
            if (for_both) {
                sync_cluster(); // all scores are there
            }
            continue;
        }
        multiply_rows(product, x, stride, room, [&](int v, int r, float value) {
            if (hides) {
                uint32_t& unit = y[v * of_units + r];
                value = rectifies ? (value < 0 ? 0.0f : value) // NaN stays
                        : adds    ? value + joined_float(unit)
                                  : value;
                unit = split_float(value);
            } else if (of_key) {
                b.floats(layout.sought_scores)[v * layout.cells + r - s.first] = value;
            } else {
                keep_score(v, r, value);
            }
        });
        if (for_both) {
            sync_cluster(); // all scores are there, and nobody reads vectors
        }
        if (hides) {
            if (product.everywhere) {
                sync_choosers();
            } else {
                exchange_units(b, product, y);
            }
            x = y;
            stride = of_units;
        }
    }
    if (threadIdx.x == kThreads - 1) {
        s.leaving_cell = listed ? leaving_cell : -1;
    }
    wait_for_copies<0>(); // of counts
    sync_choosers();
    if (s.step.finds) {
#pragma unroll 1
        for (int k = b.warp; k < s.step.finds; k += kWarps) {
            const unsigned long long best = best_of_block(b, k);
            if (b.lane < b.blocks) {
                b.exchange.send(place_of_best(b, k), b.lane, best);
            }
        }
        sync_choosers(); // tiles may come where scores have been
    }
}

/// Turns the block's scores into exponentials beside the largest one of a part, and tells
/// all blocks these and their sum over the keys of the part. A warp has a part of a head's
/// cells, each lane four at a time.
__device__ __forceinline__ void tell_exponentials(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    const DecodeShared& s = b.s;
    const int g = b.warp % layout.head_stride, part = b.warp / layout.head_stride;
    if (g >= layout.group || part >= layout.parts) {
        return;
    }
    const int first = s.first + kPartCells * part + 4 * b.lane, end = s.first + s.own;
    const int step = kPartCells * layout.parts;
    float* of_head = b.floats(layout.scores) + g * layout.cell_stride;
    const int32_t* counts = b.ints(layout.counts);
    const auto scores_at = [&](int c, float (&x)[4], int (&keys)[4]) {
        const float4 score = *reinterpret_cast<const float4*>(of_head + c);
        const int4 count = *reinterpret_cast<const int4*>(counts + c);
        x[0] = score.x, x[1] = score.y, x[2] = score.z, x[3] = score.w;
        keys[0] = count.x, keys[1] = count.y, keys[2] = count.z, keys[3] = count.w;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = c + j < end ? x[j] : -INFINITY;
            keys[j] += c + j == s.leaving_cell;
        }
    };
    // Of cells with keys, where there are any: an empty one may be far above them, and it
    // may get the leaving key.
    constexpr float kMost = 80; // exponents that floats hold
    float x[4], most = -INFINITY, most_of_all = -INFINITY;
    int keys[4];
    bool bad = false;
#pragma unroll 1
    for (int c = first; c < end; c += step) {
        scores_at(c, x, keys);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bad = bad || !(x[j] < INFINITY);
            most_of_all = fmaxf(most_of_all, x[j]);
            most = keys[j] ? fmaxf(most, x[j]) : most;
        }
    }
    most = most_of_warp(most);
    most_of_all = most_of_warp(most_of_all);
    most = most > -INFINITY ? most : most_of_all;
    float sum = 0;
#pragma unroll 1
    for (int c = first; c < end; c += step) {
        scores_at(c, x, keys);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = c + j < end && most > -INFINITY
                    ? __expf(fminf(b.p.scale * (x[j] - most), kMost))
                    : 0.0f;
            sum += keys[j] ? static_cast<float>(keys[j]) * x[j] : 0.0f;
        }
        auto* at = reinterpret_cast<float4*>(of_head + c);
        const float4 four = make_float4(x[0], x[1], x[2], x[3]);
        *at = four;
#pragma unroll 1
        for (int turn = 1; turn < b.blocks; turn++) {
            const int to = b.rank + turn;
            b.exchange.send_four(at, to < b.blocks ? to : to - b.blocks, four);
        }
    }
    sum = sum_of_warp(sum);
    if (b.lane < b.blocks) {
        const int at = (b.rank * layout.parts + part) * layout.head_stride + g;
        b.exchange.send(
                b.words(layout.partial) + at, b.lane, as_word(sum, b.p.scale * most));
    }
    if (bad && !s.step.takes_all) {
        raise(b.p.flag, Fault::route_query, s.row.query);
    }
}

/// Tells what the choice of cells depends on, but for keys that are sought.
__device__ __forceinline__ void tell_cells(const DecodeBlock& b) {
    const DecodeLayout& layout = b.layout;
    tell_exponentials(b);
    if (threadIdx.x == 0) {
        const int others = (b.s.list.query.ncell + 3) / 4 - (b.s.own + 3) / 4;
        b.exchange.expect(
                16 * layout.group * others +
                8 * b.blocks * (layout.group * layout.parts + b.s.step.finds));
    }
}

/// The cells of the keys that were sought, the first of which leaves the window now.
__device__ __forceinline__ void find_cells(const DecodeBlock& b) {
#pragma unroll 1
    for (int k = b.warp; k < b.s.step.finds; k += kWarps) {
        const unsigned long long best = best_of_blocks(b, k);
        if (b.lane == 0) {
            b.s.found[k] = cell_of_scored(best);
            if (k == 0) {
                b.s.leaving_cell = cell_of_scored(best);
            }
        }
    }
    sync_choosers();
}

/// The part, of all blocks' ones, that has a cell; the same for four that follow a multiple
/// of four.
/// @param each  cells of a block, at most
__device__ __forceinline__ int part_of_cell(
        const DecodeLayout& layout,
        const Divisor& each,
        int cell) {
    const int block = each.quotient(cell);
    return block * layout.parts + (cell - block * each.by) / kPartCells % layout.parts;
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
            const Divisor each(DecodeLayout::share_in_fours(s.list.query.ncell, b.blocks));
            const int part = part_of_cell(layout, each, s.leaving_cell);
            const float more = b.floats(layout.scores)
                                       [(is ? g : 0) * layout.cell_stride + s.leaving_cell];
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
    sync_choosers(); // also for what the block has told of its own cells
}

/// Waits for what all blocks tell, finds the mass per key of all cells, of which the
/// group's heads are summed, and counts them in bins. Masses below 1e-38 are equal.
__device__ __forceinline__ void weigh_cells(DecodeBlock& b, const CellBins& bins) {
    const DecodeLayout& layout = b.layout;
    DecodeShared& s = b.s;
    b.exchange.wait();
    if (s.step.finds) {
        sync_choosers(); // all have told what they have with the leaving cell as it was
        find_cells(b);
    }
    find_factors(b);
    const int leaving = s.leaving_cell;
    const Divisor each(DecodeLayout::share_in_fours(s.list.query.ncell, b.blocks));
    const WeighedCells cells = b.weighed_cells();
    const float* exponentials = b.floats(layout.scores);
#pragma unroll 1
    for (int c = 4 * threadIdx.x; c < cells.n; c += 4 * kThreads) {
        const float* factors = b.factors(part_of_cell(layout, each, c));
        float4 mass = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int g = 0; g < layout.group; g++) {
            const auto x = *reinterpret_cast<const float4*>(
                    exponentials + g * layout.cell_stride + c);
            const float w = factors[g];
            mass.x += x.x * w;
            mass.y += x.y * w;
            mass.z += x.z * w;
            mass.w += x.w * w;
        }
        int4 keys = cells.keys_at(c);
        if (leaving / 4 == c / 4 && leaving >= 0) {
            b.ints(layout.counts)[leaving]++;
            keys = cells.keys_at(c);
        }
        // Also of what is not a number.
        const float most = s.step.takes_all ? 0.0f : 16.0f;
        mass.x = fminf(fmaxf(mass.x, 0.0f), most);
        mass.y = fminf(fmaxf(mass.y, 0.0f), most);
        mass.z = fminf(fmaxf(mass.z, 0.0f), most);
        mass.w = fminf(fmaxf(mass.w, 0.0f), most);
        *reinterpret_cast<float4*>(b.floats(layout.masses) + c) = mass;
        for_four_cells(mass, keys, c, [&](int, unsigned long long order, int n) {
            bin_cell(s.choice, bins, order, n);
        });
    }
    sync_choosers();
}

/// Cells and keys that the policy lets the row take.
struct CellLimits {
    int cells, keys;

    __device__ __forceinline__ explicit CellLimits(const DecodeBlock& b) {
        const DecodeParams& p = b.p;
        const bool all = b.s.step.takes_all;
        const int far = b.s.step.attends ? b.s.step.far : 0;
        cells = all ? b.s.list.query.ncell : p.nprobe;
        keys = key_limit(p.max_keys, p.max_selectivity, p.share, far, all);
    }
};

/// Notes a cell that is taken, and its keys' numbers.
/// @param of  CellChoice::kFirst or kOthers, as those who choose it have the latter
__device__ __forceinline__ void note_cell(
        const DecodeBlock& b,
        int of,
        int i,
        int cell,
        int keys,
        int begin) {
    DecodeShared& s = b.s;
    b.taken()[i] = make_int2(cell, begin);
    const int own = cell - s.first;
    if (own >= 0 && own < s.own && !b.asks_for_all_extents()) {
        prefetch(s.list.extents + int64_t(cell) * kExtents);
    }
    if (cell == s.leaving_cell) { // its newest key
        s.leaving_at[of] = begin + keys - 1;
    }
}

/// Lets the warps for sink and window go on, where there are any: what a choice depends on
/// is known, and every block has told all before the results.
__device__ __forceinline__ void tell_window_warps(const DecodeBlock& b) {
    if (b.window_warps) {
        tell_others(32 * b.window_warps);
    }
}

/// Takes cells within the policy's limits; every block takes the same ones. Where there
/// are warps for sink and window, these take all but the first ones.
__device__ __forceinline__ void take_cells_of_row(DecodeBlock& b) {
    CellChoice& choice = b.s.choice;
    const CellLimits limits(b);
    const CellBins bins = CellBins::of_masses(b.layout.group, limits.keys);
    weigh_cells(b, bins);
    const auto take = [&](int i, int cell, int keys, int begin) {
        note_cell(b, CellChoice::kFirst, i, cell, keys, begin);
    };
    if (b.takes_cells()) {
        const FirstCells first = take_first(
                choice,
                b.weighed_cells(),
                bins,
                limits.cells,
                limits.keys,
                [&] { tell_window_warps(b); },
                take);
        if (b.window_warps == 0) {
            take_others<0, kWarps>(
                    choice,
                    b.weighed_cells(),
                    first,
                    limits.cells,
                    limits.keys,
                    take,
                    [] { sync_choosers(); });
            if (threadIdx.x == 0) { // attended to like the first ones
                choice.taken[CellChoice::kFirst][CellChoice::kWith] =
                        choice.taken[CellChoice::kOthers][CellChoice::kWith];
            }
        }
    } else {
        if (threadIdx.x == 0) {
            choice.taken[CellChoice::kFirst][CellChoice::kWith] =
                    choice.taken[CellChoice::kOthers][CellChoice::kWith] = make_int2(0, 0);
        }
        tell_window_warps(b);
    }
    sync_choosers();
}

/// Takes the others. By the warps for sink and window.
__device__ __forceinline__ void take_other_cells(const DecodeBlock& b) {
    constexpr int kWindowThreads = 32 * kWindowWarps;
    const CellLimits limits(b);
    take_others<kWarps, kWindowWarps>(
            b.s.choice,
            b.weighed_cells(),
            FirstCells::of(b.s.choice),
            limits.cells,
            limits.keys,
            [&](int i, int cell, int keys, int begin) {
                note_cell(b, CellChoice::kOthers, i, cell, keys, begin);
            },
            [] { sync_others(kWindowThreads); });
    sync_others(kWindowThreads);
}

} // namespace

} // namespace faiss_saap::gpu
