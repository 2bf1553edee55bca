/// decode_rows() and decode_row_grid(). Included by the files that instantiate them for
/// one head dimension.
#pragma once

#include <algorithm>

#include "decode.h"
#include "decode_kernel.cuh"
#include "dense_rows.cuh"
#include "launch.h"

namespace faiss_saap::gpu {

namespace {

/// What the launches depend on of the device.
struct DecodeDevice {
    int processors = 0;
    int room = 0; ///< bytes that a block may have beside what is static; 0: an error

    template <class T, int D>
    static DecodeDevice of() {
        DecodeDevice it;
        int device = 0, room = 0;
        cudaFuncAttributes attributes = {};
        if (cudaGetDevice(&device) == cudaSuccess &&
            cudaDeviceGetAttribute(
                    &it.processors, cudaDevAttrMultiProcessorCount, device) ==
                    cudaSuccess &&
            cudaDeviceGetAttribute(
                    &room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
                    cudaSuccess &&
            cudaFuncGetAttributes(&attributes, decode_kernel<T, D, 0>) == cudaSuccess) {
            it.room = room - static_cast<int>(attributes.sharedSizeBytes);
        }
        return it;
    }
};

/// How blocks of a row are launched.
struct DecodeShape {
    void (*kernel)(DecodeArguments) = nullptr; ///< null: there is not so much memory
    DecodeLayout layout;
    int threads = 0, bytes = 0; ///< of shared memory

    /// With as many warps that attend as there is room for.
    ///
    /// Blocks have warps of their own for sink and window, where these are few, and then
    /// are alone on a processor, by their registers. Without them, two blocks share a
    /// processor where little is read, as then the next step's blocks begin before this
    /// one's have ended; where much is, they would take each other's bandwidth, and those
    /// alone would wait for those in pairs. Rows so many that each would have one block alone
    /// have two or three that share processors, or one.
    template <class T, int D>
    static DecodeShape of(const DecodeParams& p, const DecodeDevice& device, int blocks) {
        constexpr int64_t kMuch = 24 << 20;    // bytes
        constexpr int64_t kLargeWindow = 8192; // keys
        const bool alone = 2 * p.nrow <= device.processors;
        DecodeShape shape;
        if (alone && p.sink + p.window <= kLargeWindow) {
            shape.layout = DecodeLayout::of<T, D>(p, blocks, kWarps, kWindowWarps);
            if (shape.layout.bytes <= device.room) {
                shape.kernel = p.grid.seekers ? decode_kernel<T, D, kWindowWarps, true>
                                              : decode_kernel<T, D, kWindowWarps>;
                shape.threads = kThreads + 32 * kWindowWarps;
                // Blocks that seek have their rows where others have tiles.
                static_assert(
                        kSeekGroups * sizeof(SeekGroup<D>) <=
                        (kWarps + kWindowWarps) * 2 * sizeof(T) * TileStream<T, D>::kTile);
                shape.bytes = shape.layout.bytes;
                return shape;
            }
        }
        for (int warps = kWarps; warps; warps /= 2) {
            shape.layout = DecodeLayout::of<T, D>(p, blocks, warps, 0);
            if (shape.layout.bytes <= device.room && shape.layout.ahead > 0) {
                shape.kernel = decode_kernel<T, D, 0>;
                shape.threads = kThreads;
                shape.bytes = alone && p.bytes >= kMuch
                        ? std::max(shape.layout.bytes, device.room / 4 * 3)
                        : shape.layout.bytes;
                shape.layout.take_turns(
                        device.processors,
                        blocks,
                        std::min(p.nrow * blocks, 2 * device.processors));
                return shape;
            }
        }
        return shape;
    }
};

template <class T, int D>
cudaError_t allow_decode(const DecodeDevice& device) {
    for (const auto kernel :
         {decode_kernel<T, D, 0>,
          decode_kernel<T, D, kWindowWarps>,
          decode_kernel<T, D, kWindowWarps, true>}) {
        const cudaError_t error = allow(kernel, device.room, kMostBlocks);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaSuccess;
}

} // namespace

/// Whether rows are so few, and read so much, that they are better shared out over all
/// processors by the other kernels: most keys of one or two KV heads. Bytes a
/// microsecond of a block and of one processor of all, and what those kernels cost
/// beside, as measured on an H100 (docs/gpu-performance.md).
inline bool leaves_too_much_idle(const DecodeParams& p, int blocks, int processors) {
    constexpr double kOfBlock = 42e3, kOfProcessor = 23e3, kBeside = 80;
    const auto bytes = static_cast<double>(p.bytes);
    return bytes / (kOfBlock * p.nrow * blocks) >
            bytes / (kOfProcessor * processors) + kBeside;
}

/// Clusters that seek cells for later steps, as many as there is room for beside those of
/// rows. None where they would take longer than the step: times of a group's row and of a step,
/// as measured on an H100 (docs/gpu-performance.md).
inline int seekers_beside(
        const DecodeParams& p,
        const DecodeShape& shape,
        int blocks,
        int clusters_at_once) {
    const int groups = kSeekGroups * blocks;
    const int n = std::min(
            DecodeLayout::share(p.nrow, groups), clusters_at_once - p.nrow);
    // A smaller window does not have the keys early enough for all parts.
    if (shape.layout.window_warps == 0 || n <= 0 || p.window <= kMostAhead + kSeekParts) {
        return 0;
    }
    const double part = double(cells_of_part(p.most_cells)) * p.most_cell_bytes;
    const double row = 12 + part / 5.1e3; // us; a sixth more after the first one
    const double rows = 1.17 * DecodeLayout::share(p.nrow, n * groups) - 0.17;
    const double step =
            14 + 6e-3 * p.most_cells + static_cast<double>(p.bytes) / 2.9e6;
    return row * rows <= step ? n : 0;
}

/// Whether rows come in pairs: most of them can, each has one block whose warps all choose
/// cells, and the vectors of two fit into one tile's columns and into the room for tiles.
template <class T, int D>
bool comes_in_pairs(const DecodeParams& p, const DecodeShape& shape, int row_blocks) {
    const int of_tiles =
            shape.layout.tile_warps * 2 * TileStream<T, D>::kTile * int(sizeof(T));
    return row_blocks == 1 && shape.kernel && shape.layout.window_warps == 0 &&
            2 * p.paired > p.nrow && 2 * p.heads_q / p.heads_kv <= kTileVectors &&
            p.nrow < kMostRows && // blocks are an even number
            kMostAhead * 4 * D + DecodeLayout::bytes_of_both(p) <= of_tiles;
}

template <class T, int D>
DecodeGrid decode_row_grid(const DecodeParams& p) {
    const DecodeDevice device = DecodeDevice::of<T, D>();
    bool clusters = false;
    if (p.heads_q / p.heads_kv > kStreamQueries ||
        compiled_for_90(
                reinterpret_cast<const void*>(decode_kernel<T, D, 0>), clusters) !=
                cudaSuccess ||
        !clusters || device.room == 0 || allow_decode<T, D>(device) != cudaSuccess) {
        return {};
    }
    if (const int blocks = p.all_near ? dense_blocks(p, device.processors) : 0) {
        return {blocks, /*dense=*/1, 0, 0};
    }
    // Of the sizes of a cluster that fill the groups of 16 or 18 processors that a device
    // is made of, the largest one that lets all rows run at once. But of clusters of 9 nine
    // run at once, of 8 fifteen: where little is read, it is better that nearly all rows of
    // a step begin while the one before still runs. And the more blocks read gigabytes, the
    // slower memory answers: 9 of each of 8 rows take 800 us for two of them, 8 take 755
    // (docs/gpu-performance.md).
    constexpr int64_t kLittle = 24 << 20, kGigabyte = 768 << 20;
    int fewest = 0;
    DecodeShape of_fewest;
    for (int blocks : {kMostBlocks, 12, 9, 8, 6, 4, 3, 2, 1}) {
        const auto shape = DecodeShape::of<T, D>(p, device, blocks);
        const bool begins_early = shape.threads > kThreads && p.bytes < kLittle;
        if (!shape.kernel || (blocks == 9 && (begins_early || p.bytes >= kGigabyte))) {
            continue;
        }
        fewest = blocks;
        of_fewest = shape;
        const int at_once =
                clusters_at_once(shape.kernel, blocks, shape.threads, shape.bytes);
        if (at_once >= p.nrow) {
            return leaves_too_much_idle(p, blocks, device.processors)
                    ? DecodeGrid()
                    : DecodeGrid{
                              blocks,
                              0,
                              seekers_beside(p, shape, blocks, at_once),
                              comes_in_pairs<T, D>(p, shape, blocks)};
        }
    }
    return {fewest, 0, 0, comes_in_pairs<T, D>(p, of_fewest, fewest)};
}

template <class T, int D>
cudaError_t decode_rows(const DecodeParams& p, cudaStream_t stream) {
    if (p.grid.dense) {
        return attend_densely<T, D>(p, stream);
    }
    const DecodeDevice device = DecodeDevice::of<T, D>();
    const auto shape = DecodeShape::of<T, D>(p, device, p.grid.row_blocks);
    const DecodeArguments arguments = {p, shape.layout};
    const cudaError_t error = allow(shape.kernel, device.room, kMostBlocks);
    if (error != cudaSuccess) {
        return error;
    }
    const int rows = p.grid.pairs ? (p.nrow + 1) / 2 * 2
                                  : p.nrow + (p.appends ? p.grid.seekers : 0);
    return launch(
            shape.kernel,
            dim3(p.grid.row_blocks, rows),
            shape.threads,
            shape.bytes,
            stream,
            arguments,
            p.grid.row_blocks,
            p.grid.pairs ? 2 : 1);
}

} // namespace faiss_saap::gpu
