/// Cells of keys that will leave the window: each block of a row finds the best one among
/// its own cells. Device code.
#pragma once

#include "decode_begin.cuh"

namespace faiss_saap::gpu {

namespace {

/// The block's best cell for a key that is sought. By a warp.
__device__ __forceinline__ unsigned long long best_of_block(const DecodeBlock& b, int key) {
    const float* scores = b.floats(b.layout.sought_scores) + key * b.layout.cells;
    unsigned long long best = 0;
#pragma unroll 1
    for (int c = b.lane; c < b.s.own; c += 32) {
        best = max(best, scored_cell(scores[c], b.s.first + c));
    }
    return largest_of_warp(best);
}

/// Where the row's blocks get to know this one's.
__device__ __forceinline__ unsigned long long* place_of_best(
        const DecodeBlock& b,
        int key) {
    return b.words(b.layout.found) + key * b.blocks + b.rank;
}

/// The best one of all blocks. By a warp.
__device__ __forceinline__ unsigned long long best_of_blocks(const DecodeBlock& b, int key) {
    return largest_of_warp(
            b.lane < b.blocks ? b.words(b.layout.found)[key * b.blocks + b.lane] : 0);
}

/// Finds the block's best cells for keys that leave the window in later steps, where no
/// blocks do that (seek_ahead.cuh). By the warps for sink and window, before they are wanted
/// for the last cells.
template <int D>
static __device__ __noinline__ void find_cells_for_later(
        const DecodeParams& p,
        const DecodeLayout& layout,
        DecodeShared& s,
        char* shared) {
    const DecodeBlock b(p, layout, s, shared, kWindowWarps);
    constexpr int warps = kWindowWarps;
    const int warp = b.warp - kWarps;
    RowProducts product = s.products[s.layers + 1];
    product.n = static_cast<uint8_t>(s.step.finds_later);
    load_sought<D>(
            p,
            s,
            b.sought_keys(),
            s.step.leaving + 1,
            s.step.finds_later,
            32 * warp + b.lane,
            32 * warps);
    sync_others(32 * warps);
    multiply_rows<kWindowWarps>(
            product,
            b.sought_keys(),
            product.cols,
            ProductRoom(),
            [&](int v, int r, float value) {
                b.floats(layout.sought_scores)[v * layout.cells + r - s.first] = value;
            });
    sync_others(32 * warps);
#pragma unroll 1
    for (int k = warp; k < s.step.finds_later; k += warps) {
        const unsigned long long best = best_of_block(b, k);
        if (b.lane == 0) {
            s.found_later[k] = best;
        }
    }
}

/// Tells the first block, with the results. By the warps for sink and window, after the
/// others have told what they choose by: so no block is further back.
__device__ __forceinline__ void tell_found_later(DecodeBlock& b) {
    uint32_t before = 1; // exchanges: what the choice depends on, and some hidden layers
#pragma unroll 1
    for (int layer = 0; layer < b.s.layers; layer++) {
        before += !b.s.products[layer].everywhere;
    }
    b.exchange.go_on_after(before);
    const int k = static_cast<int>(threadIdx.x) - kThreads;
    if (k < b.s.step.finds_later) {
        b.exchange.send(place_of_best(b, k), 0, b.s.found_later[k]);
    }
}

} // namespace

} // namespace faiss_saap::gpu
