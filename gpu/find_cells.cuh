/// Cells of keys that will leave the window: each block of a row finds the best one among
/// its own cells. Device code.
#pragma once

#include "decode_begin.cuh"
#include "team.cuh"

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

/// Finds the cells of keys that leave the window in later steps, and tells the first
/// block. By the warps for sink and window, which have nothing else to do by then.
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
    prefetch_bytes(
            static_cast<const char*>(product.rows),
            product.bytes(),
            32 * warp + b.lane,
            32 * warps);
    load_sought<D>(
            b, s.step.leaving + 1, s.step.finds_later, 32 * warp + b.lane, 32 * warps);
    sync_others(32 * warps);
    multiply_rows<kWarps, kWindowWarps>(
            product,
            reinterpret_cast<const uint32_t*>(b.ints(layout.sought)),
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
            store_in_block(place_of_best(b, k), 0, best);
        }
    }
    // Results come later from this block, and all this with them.
    fence_team();
}

} // namespace

} // namespace faiss_saap::gpu
