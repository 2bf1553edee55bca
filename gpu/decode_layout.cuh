/// Where the arrays of decode()'s kernel lie in a block's shared memory.
#pragma once

#include <algorithm>

#include <faiss_saap/host_device.h>

#include "decode.h"
#include "tile_stream.cuh"

namespace faiss_saap::gpu {

namespace {

/// Floats between the results of two queries, which spreads the banks.
template <int D>
constexpr int kResultStride = D + 4;

/// Where arrays begin, in bytes; alike in all blocks of a row, as they write into each
/// other's.
struct DecodeLayout {
    int group = 0, cells = 0, padded_cells = 0; ///< cells: of a block at most
    int tile_warps = 0; ///< that attend
    int queries = 0;    ///< as the cache's type, for the tensor cores
    int tiles = 0;      ///< of keys and values, for each of these warps; then its results
    int keys = 0;       ///< cell_keys of all cells: padded_cells
    int counts = 0;     ///< and their far keys
    int found = 0;      ///< best cell of the leaving key by each block
    int partial = 0;    ///< sum of exp and largest by each block, for each head
    int at_best = 0; ///< a head's score of the block's best cell of the leaving key
    int scores = 0, key_scores = 0; ///< of the block's cells, by queries and leaving key
    int own_counts = 0;             ///< far keys of the block's cells
    int pieces = 0, block_pieces = 0; ///< of 16 bytes: of the output, of a block's share
    int results = 0;                  ///< of this block's share, from each block
    int sums = 0;    ///< sum and largest of each block, for each head; twice: of all
                     ///< keys, and of sink and window
    int weights = 0; ///< of the blocks' results, and of the caller's
    int x = 0, leaving = 0; ///< queries and leaving key, while cells are scored
    int hidden = 0, activated = 0; ///< of the query assigner
    int taken = 0; ///< after them, cells that are read, and where the keys of each begin
    int bytes = 0;

    /// @param warps  that attend
    template <class T, int D>
    static DecodeLayout of(const DecodeParams& p, int blocks, int warps) {
        DecodeLayout l;
        l.group = p.heads_q / p.heads_kv;
        l.cells = share(p.most_cells, blocks);
        l.padded_cells = 32;
        while (l.padded_cells < p.most_cells) {
            l.padded_cells *= 2;
        }
        using Stream = TileStream<T, D>;
        constexpr int kOfWarp = 2 * Stream::kTile * int(sizeof(T));
        static_assert(kOfWarp >= kStreamQueries * kResultStride<D> * int(sizeof(float)));
        l.tile_warps = warps;
        l.queries = l.take(kStreamQueries * Stream::kStride * int(sizeof(T)));
        l.tiles = l.take(warps * kOfWarp);
        l.keys = l.take(8 * l.padded_cells);
        l.counts = l.take(4 * p.most_cells);
        l.found = l.take(8 * blocks);
        l.partial = l.take(8 * blocks * l.group);
        l.at_best = l.take(4 * blocks * l.group);
        l.scores = l.take(4 * l.group * l.cells);
        l.key_scores = l.take(4 * l.cells);
        l.own_counts = l.take(4 * l.cells);
        l.pieces = l.group * D / 4;
        l.block_pieces = share(l.pieces, blocks);
        l.results = l.take(16 * blocks * l.block_pieces);
        l.sums = l.take(2 * 8 * blocks * l.group);
        l.weights = l.take(4 * (blocks + 1) * l.group);
        l.x = l.take(4 * l.group * p.most_cols);
        l.hidden = l.take(4 * l.group * p.most_width);
        l.activated = l.take(4 * l.group * p.most_width);
        l.leaving = l.take(4 * D);
        l.taken = l.x;
        l.bytes = std::max(l.bytes, l.x + 8 * p.most_cells);
        return l;
    }

    /// What each block has of n things.
    FAISS_SAAP_HOST_DEVICE static int share(int n, int blocks) {
        return (n + blocks - 1) / blocks;
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
