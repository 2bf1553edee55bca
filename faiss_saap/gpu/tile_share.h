/// How the blocks of an attention kernel share the tiles of all rows.
#pragma once

#include <faiss_saap/host_device.h>

namespace faiss_saap::gpu {

/// The tiles of rows, one row after the other, are one line. With few rows each has
/// blocks of its own, so that no block waits for the beginnings of two rows one
/// after the other; with many, the line is cut into equal pieces wherever that
/// falls, so that a row with many tiles holds up nobody. Rows are counted along the
/// line in units: blocks in the first case, tiles in the second.
struct TileShare {
    /// What a second row costs a block, in tiles: the chain of reads from its plan
    /// to its first key.
    static constexpr int kRestart = 12;

    struct Range {
        int begin = 0, end = 0;
    };

    int each = 1;       ///< tiles of a block at most
    bool whole = false; ///< a block has tiles of one row

    /// @param total   tiles of all rows
    /// @param rows    with tiles
    /// @param blocks  of the grid
    /// @param least   tiles of a block at least, if there are so many
    FAISS_SAAP_HOST_DEVICE static TileShare of(
            int total,
            int rows,
            int blocks,
            int least) {
        const int cut = (total + blocks - 1) / blocks;
        // A row's last block may have fewer: a block for each row is kept back.
        const int spare = blocks - rows;
        const int apart = spare > 0 ? (total + spare - 1) / spare : 0;
        TileShare share;
        share.whole = spare > 0 && apart <= cut + kRestart;
        share.each = share.whole ? apart : cut;
        share.each = share.each < least ? least : share.each;
        return share;
    }

    /// Units of a row.
    FAISS_SAAP_HOST_DEVICE int units(int tiles) const {
        return whole ? (tiles + each - 1) / each : tiles;
    }
    /// The blocks that have tiles of a row.
    /// @param begin  units of the rows before it
    FAISS_SAAP_HOST_DEVICE Range blocks(int begin, int tiles) const {
        if (tiles == 0) {
            return {};
        }
        if (whole) {
            return {begin, begin + units(tiles)};
        }
        return {begin / each, (begin + tiles - 1) / each + 1};
    }
    /// A block's tiles of a row.
    FAISS_SAAP_HOST_DEVICE Range tiles(int block, int begin, int tiles) const {
        const auto clip = [tiles](int x) { return x < 0 ? 0 : x < tiles ? x : tiles; };
        if (!whole) {
            return {clip(each * block - begin), clip(each * (block + 1) - begin)};
        }
        const int n = units(tiles), k = block - begin;
        if (k < 0 || k >= n) {
            return {};
        }
        const int evenly = (tiles + n - 1) / n;
        return {clip(k * evenly), clip((k + 1) * evenly)};
    }
    /// The first unit of a block.
    FAISS_SAAP_HOST_DEVICE int first_unit(int block) const {
        return whole ? block : each * block;
    }
};

} // namespace faiss_saap::gpu
