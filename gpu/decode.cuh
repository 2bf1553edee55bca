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
    bool fits_seekers = false;  ///< it is enough for blocks that find cells for later steps

    /// Makes room for what these need, if there is any. Two blocks have it on a processor of
    /// 228 KB, by a few KB.
    template <int D>
    void fit_seekers(const DecodeDevice& device) {
        const int wanted = seek_groups(threads) * int(sizeof(SeekGroup<D>));
        fits_seekers = wanted <= device.room;
        bytes = std::max(bytes, fits_seekers ? wanted : 0);
    }

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
                shape.bytes = shape.layout.bytes;
                shape.fit_seekers<D>(device);
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
                shape.fit_seekers<D>(device);
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

/// Lets clusters find cells for later steps, as far as there is room for them beside those of
/// rows, or of the last rows where not all run at once, with as many visits as take the least
/// time. None where they would take longer than these rows. Microseconds, and bytes in one, as
/// measured on an H100 (docs/gpu-performance.md).
inline void place_seekers(
        DecodeGrid& grid,
        const DecodeParams& p,
        const DecodeShape& shape,
        int clusters_at_once) {
    constexpr double kOfStep = 2.9e6, kOfBlock = 30e3, kOfGroup = 9e3;
    constexpr double kOfVisit = 12, kOfLook = 1; // beside what is read
    constexpr int kRowsOfBlock = 4; // visited or not
    const int wanted = DecodeLayout::share(p.nrow, kRowsOfBlock * grid.row_blocks);
    const int numbered = grid.numbered(p.nrow), at_once = std::max(1, clusters_at_once);
    const int waves = DecodeLayout::share(numbered, at_once);
    int n = std::min(wanted, waves * at_once - numbered);
    n = std::min(n, static_cast<int>(kMostRows) - numbered);
    n = grid.pairs ? n / 2 * 2 : n; // clusters there are two of these
    // A smaller window does not have the keys early enough for all parts.
    if (n <= 0 || p.window <= kMostAhead + kSeekParts || !shape.fits_seekers) {
        return;
    }
    const int sequences = p.nrow / p.heads_kv, blocks = n * grid.row_blocks;
    const int groups = blocks * seek_groups(shape.threads);
    if (groups < p.heads_kv) {
        return;
    }
    const int of_group = rows_of_group(sequences, p.heads_kv, groups);
    if (of_group > kSeekThreads) {
        return; // more rows than it can look at
    }
    const double part = double(cells_of_part(p.most_cells)) * p.most_cell_bytes;
    const double step = 14 + 6e-3 * p.most_cells + static_cast<double>(p.bytes) / kOfStep;
    double least = step / waves;
    for (int visits : {8, 4, 2, 1}) {
        // Where rows find fewer keys' cells at once, they do so again before all visits are made.
        if (visits_of_parts(visits, 0) >= shape.layout.ahead) {
            continue;
        }
        const int each = planned_visits(visits, of_group);
        const int rows = std::min(p.nrow, each * groups); // visited in a step
        const double bytes = parts_of_visit(visits) * part;
        const double of_blocks = DecodeLayout::share(rows, blocks) * bytes / kOfBlock;
        const double time = kOfLook * DecodeLayout::share(p.nrow, kSeekThreads) +
                kOfVisit * each + std::max(each * bytes / kOfGroup, of_blocks);
        if (time <= least) {
            least = time;
            grid.seekers = n;
            grid.visits = visits;
        }
    }
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
    DecodeGrid grid;
    if (const int blocks = p.all_near ? dense_blocks(p, device.processors) : 0) {
        grid.row_blocks = blocks;
        grid.dense = 1;
        return grid;
    }
    // Of the sizes of a cluster that fill the groups of 16 or 18 processors that a device
    // is made of, the largest one that lets all rows run at once. But of clusters of 9 nine
    // run at once, of 8 fifteen: where little is read, it is better that nearly all rows of
    // a step begin while the one before still runs. And the more blocks read gigabytes, the
    // slower memory answers: 9 of each of 8 rows take 800 us for two of them, 8 take 755
    // (docs/gpu-performance.md).
    constexpr int64_t kLittle = 24 << 20, kGigabyte = 768 << 20;
    for (int blocks : {kMostBlocks, 12, 9, 8, 6, 4, 3, 2, 1}) {
        const auto shape = DecodeShape::of<T, D>(p, device, blocks);
        const bool begins_early = shape.threads > kThreads && p.bytes < kLittle;
        if (!shape.kernel || (blocks == 9 && (begins_early || p.bytes >= kGigabyte))) {
            continue;
        }
        grid.row_blocks = blocks;
        grid.pairs = comes_in_pairs<T, D>(p, shape, blocks);
        const int at_once =
                clusters_at_once(shape.kernel, blocks, shape.threads, shape.bytes);
        if (at_once < p.nrow && blocks > 1) {
            continue;
        }
        if (at_once >= p.nrow && leaves_too_much_idle(p, blocks, device.processors)) {
            return {};
        }
        place_seekers(grid, p, shape, at_once);
        break;
    }
    return grid;
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
    const int rows = p.grid.numbered(p.nrow) + (p.appends ? p.grid.seekers : 0);
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
