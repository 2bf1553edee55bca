/// Where the arrays of decode()'s kernel lie in a block's shared memory.
#pragma once

#include <algorithm>

#include <faiss_saap/host_device.h>

#include "decode.h"
#include "decode_threads.cuh"
#include "multiply_rows.cuh"
#include "tile_stream.cuh"

namespace faiss_saap::gpu {

namespace {

constexpr int kMostBlocks = 16; ///< of a row

/// Floats between the results of two queries, which spreads the banks.
template <int D>
constexpr int kResultStride = D + 4;

/// Cells that a warp weighs at a time; parts of a block's cells take turns by so many.
constexpr int kPartCells = 128;

/// Cells, and extents of each, whose places a block keeps at hand.
constexpr int kCellsAtHand = 64, kExtentsAtHand = 6;

/// Where arrays begin, in bytes; alike in all blocks of a row, as they write into each
/// other's.
struct DecodeLayout {
    int group = 0;
    int cells = 0;       ///< of a block at most
    int head_stride = 0; ///< query heads, in fours
    int cell_stride = 0; ///< cells of a head's scores, which spreads the banks
    int tile_warps = 0;  ///< of those that choose: that attend
    int window_warps = 0; ///< for sink and window (kWindowWarps); 0: the others do that
    int takes_turns = 0; ///< half of the rows begin with sink and window
    /// Warps of tile_warps that attend while the other rows score cells, and while those
    /// choose: the more is on its way, the later memory answers, and who chooses waits for
    /// one answer after the other.
    int early_warps = 0, middle_warps = 0;
    int ahead = 0;       ///< keys whose cells are found at once
    int queries = 0;     ///< as the cache's type, for the tensor cores
    int rotations = 0;   ///< back, of pairs of components: cosine and sine
    int tiles = 0; ///< of keys and values, for each of these warps; then its results
    /// Before there are tiles: weights, if sink and window do not come first. Likewise, or
    /// beside them where there are warps for sink and window: keys whose cells are sought,
    /// and their scores.
    int kept = 0, kept_bytes = 0, sought = 0, sought_scores = 0;
    int both = 0; ///< before there are scores of keys: vectors of both rows of a pair
    int counts = 0;    ///< far keys of all cells
    int found = 0;     ///< best cell of each key that is sought, by each block
    int signs = 0;     ///< a word by each block
    /// Of the heads by all cells: scores, then exp(score - the largest of their part);
    /// and of the group, the cells' masses per key.
    int scores = 0, masses = 0;
    int parts = 0;   ///< of a block's cells: of a head, one for each of its warps
    int partial = 0; ///< of each part and head: sum over the keys and largest
    int taken = 0; ///< after scores: cells that are read, where the keys of each begin
    int pieces = 0, block_pieces = 0; ///< of 16 bytes: of the output, of a block's share
    int results = 0;  ///< of this block's share, from each block
    int products = 0; ///< before them: of warps that share a tile
    int sums = 0;    ///< sum and largest of each block, for each head; twice: of all
                     ///< keys, and of sink and window
    int weights = 0; ///< of the blocks' results, and of the caller's
    /// Queries and hidden layers of the query assigner, by split_float.
    int x = 0, hidden = 0, activated = 0;
    int extents = 0; ///< after them: of cells that are read, where they begin
    int bytes = 0;

    /// @param warps, window_warps  that attend
    template <class T, int D>
    static DecodeLayout of(
            const DecodeParams& p,
            int blocks,
            int warps,
            int window_warps) {
        DecodeLayout l;
        l.group = p.heads_q / p.heads_kv;
        l.cells = share_in_fours(p.most_cells, blocks);
        l.cell_stride = (p.most_cells + 31) / 32 * 32 + 4;
        using Stream = TileStream<T, D>;
        constexpr int kOfWarp = 2 * Stream::kTile * int(sizeof(T));
        static_assert(kOfWarp >= sums_of_warp() + 4 * kStreamQueries * kResultStride<D>);
        l.tile_warps = warps;
        l.window_warps = window_warps;
        l.head_stride = (l.group + 3) / 4 * 4;
        l.parts = std::min(kWarps / l.head_stride, share(l.cells, kPartCells));
        static_assert(D % kPieceColumns == 0);
        static_assert(kMostAhead <= kTileVectors && kStreamQueries <= kTileVectors);
        const int of_key = 4 * D + (4 * l.cells + 15) / 16 * 16;
        l.ahead = std::min(kMostAhead, warps * kOfWarp / of_key);
        l.queries = l.take(kStreamQueries * Stream::kStride * int(sizeof(T)));
        l.rotations = l.take(D / 2 * int(sizeof(float2)));
        l.tiles = l.kept = l.take(warps * kOfWarp);
        // Tiles of these follow, or the results of the first of two turns.
        l.take(window_warps ? window_warps * kOfWarp
                            : sums_of_warp() + 4 * l.group * kResultStride<D>);
        if (window_warps) {
            l.ahead = kMostAhead;
            l.kept_bytes = warps * kOfWarp;
            l.sought = l.take(l.ahead * of_key);
        } else {
            const int after = std::max(
                    l.ahead * (of_key - 4 * D), p.grid.pairs ? bytes_of_both(p) : 0);
            l.kept_bytes = warps * kOfWarp - l.ahead * 4 * D - after;
            l.sought = l.kept + l.kept_bytes;
        }
        l.sought_scores = l.both = l.sought + l.ahead * 4 * D;
        l.counts = l.take(4 * p.most_cells);
        l.found = l.take(8 * blocks * l.ahead);
        l.signs = l.take(4 * blocks);
        l.partial = l.take(8 * blocks * l.parts * l.head_stride);
        l.scores = l.masses = l.take(4 * std::max(l.group, 3) * l.cell_stride);
        l.taken = l.masses + 4 * l.cell_stride;
        l.pieces = l.group * D / 4;
        l.block_pieces = share(l.pieces, blocks);
        l.results = l.products = l.take(std::max(
                16 * blocks * l.block_pieces, 4 * kWarps * kTileRows * l.head_stride));
        l.sums = l.take(2 * 8 * blocks * l.group);
        l.weights = l.take(4 * (blocks + 1) * l.group);
        l.x = l.extents = l.take(4 * l.group * padded_columns(p.most_cols));
        l.hidden = l.take(4 * l.group * padded_columns(p.most_width));
        l.activated = l.take(4 * l.group * padded_columns(p.most_width));
        l.bytes = std::max(l.bytes, l.extents + 4 * kCellsAtHand * kExtentsAtHand);
        return l;
    }

    /// Lets half of the rows begin with sink and window, so that memory is not idle while all
    /// choose, and finds how many warps read meanwhile. Not where rows are few, of many blocks.
    /// @param row_blocks  blocks of a row
    /// @param at_once     blocks of all rows, as far as they run at once
    void take_turns(int processors, int row_blocks, int at_once) {
        constexpr int kFewBlocks = 2;
        constexpr int kEnough = 3; // warps of a processor
        takes_turns = row_blocks <= kFewBlocks;
        const int half = std::max(1, at_once / 2);
        const auto of_block = [&](int warps) {
            return takes_turns
                    ? std::clamp((warps * processors + half / 2) / half, 1, tile_warps)
                    : tile_warps;
        };
        early_warps = of_block(kEnough);
        middle_warps = of_block(2 * kEnough);
    }
    /// Bytes of the vectors of both rows of a pair.
    static int bytes_of_both(const DecodeParams& p) {
        return 2 * 4 * (p.heads_q / p.heads_kv) *
                padded_columns(std::max(p.most_cols, p.most_width));
    }
    /// Bytes of a warp's sums and largest, of each query; then come its outputs.
    FAISS_SAAP_HOST_DEVICE static constexpr int sums_of_warp() {
        return kStreamQueries * 8;
    }
    /// What each block has of n things; and in fours.
    FAISS_SAAP_HOST_DEVICE static int share(int n, int blocks) {
        return (n + blocks - 1) / blocks;
    }
    FAISS_SAAP_HOST_DEVICE static int share_in_fours(int n, int blocks) {
        return 4 * share(n, 4 * blocks);
    }

    /// Whose results there are; where all warps attend to all keys, the last ones are of the
    /// first turn.
    FAISS_SAAP_HOST_DEVICE int result_warps() const {
        return tile_warps + (window_warps ? window_warps : 1);
    }

   private:
    int take(int n) {
        const int at = bytes;
        bytes += (n + 15) / 16 * 16;
        return at;
    }
};

} // namespace

} // namespace faiss_saap::gpu
