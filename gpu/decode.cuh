/// decode_rows() and decode_row_blocks(). Included by the files that instantiate them for
/// one head dimension.
#pragma once

#include <algorithm>

#include "decode.h"
#include "decode_kernel.cuh"
#include "launch.h"

namespace faiss_saap::gpu {

namespace {

/// The layout that rows of so many blocks have, with as many warps that attend as there
/// is room for; 0 bytes: there is room for none.
template <class T, int D>
DecodeLayout layout_of(const DecodeParams& p, int room, int blocks) {
    DecodeLayout layout;
    int warps = kWarps;
    do {
        layout = DecodeLayout::of<T, D>(p, blocks, warps);
        if (layout.bytes <= room && layout.ahead > 0) {
            return layout;
        }
        warps /= 2;
    } while (warps);
    layout.bytes = 0;
    return layout;
}

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
            cudaFuncGetAttributes(&attributes, decode_kernel<T, D>) == cudaSuccess) {
            it.room = room - static_cast<int>(attributes.sharedSizeBytes);
        }
        return it;
    }
};

} // namespace

/// Shared memory that a block asks for. Where little is read, two share a processor, as
/// then the next step's blocks begin before this one's have ended; where much is, they
/// would take each other's bandwidth, and those alone would wait for those in pairs. Rows
/// that do not all run at once with their blocks alone, do in pairs.
inline int bytes_of_block(const DecodeParams& p, int bytes, const DecodeDevice& device) {
    constexpr int64_t kMuch = 24 << 20;
    return p.bytes < kMuch || p.nrow > device.processors
            ? bytes
            : std::max(bytes, device.room / 4 * 3);
}

/// Whether rows are so few, and read so much, that they are better shared out over all
/// processors by the other kernels: dense attention of one or two KV heads. Bytes a
/// microsecond of a block and of one processor of all, and what those kernels cost
/// beside, as measured on an H100 (docs/gpu-performance.md).
inline bool leaves_too_much_idle(const DecodeParams& p, int blocks, int processors) {
    constexpr double kOfBlock = 42e3, kOfProcessor = 23e3, kBeside = 80;
    const auto bytes = static_cast<double>(p.bytes);
    return bytes / (kOfBlock * p.nrow * blocks) >
            bytes / (kOfProcessor * processors) + kBeside;
}

template <class T, int D>
int decode_row_blocks(const DecodeParams& p) {
    auto* kernel = decode_kernel<T, D>;
    const DecodeDevice device = DecodeDevice::of<T, D>();
    bool clusters = false;
    if (p.heads_q / p.heads_kv > kStreamQueries ||
        compiled_for_90(reinterpret_cast<const void*>(kernel), clusters) != cudaSuccess ||
        !clusters || device.room == 0 ||
        allow(kernel, device.room, kMostBlocks) != cudaSuccess) {
        return 0;
    }
    // Of the sizes of a cluster that fill the groups of 16 or 18 processors that a device
    // is made of, the largest one that lets all rows run at once. But the more blocks
    // read gigabytes, the slower memory answers: 9 of each of 8 rows take 800 us for
    // two of them, 8 take 755 (docs/gpu-performance.md).
    constexpr int64_t kGigabyte = 768 << 20;
    int fewest = 0;
    for (int blocks : {kMostBlocks, 12, 9, 8, 6, 4, 3, 2, 1}) {
        const int bytes = layout_of<T, D>(p, device.room, blocks).bytes;
        if (bytes == 0 || (blocks == 9 && p.bytes >= kGigabyte)) {
            continue;
        }
        fewest = blocks;
        const int asked = bytes_of_block(p, bytes, device);
        if (clusters_at_once(kernel, blocks, kThreads, asked) >= p.nrow) {
            return leaves_too_much_idle(p, blocks, device.processors) ? 0 : blocks;
        }
    }
    return fewest;
}

template <class T, int D>
cudaError_t decode_rows(const DecodeParams& p, cudaStream_t stream) {
    const DecodeDevice device = DecodeDevice::of<T, D>();
    const DecodeArguments arguments = {p, layout_of<T, D>(p, device.room, p.row_blocks)};
    const int bytes = bytes_of_block(p, arguments.layout.bytes, device);
    const cudaError_t error = allow(decode_kernel<T, D>, device.room, kMostBlocks);
    if (error != cudaSuccess) {
        return error;
    }
    return launch(
            decode_kernel<T, D>,
            dim3(p.row_blocks, p.nrow),
            kThreads,
            bytes,
            stream,
            arguments,
            p.row_blocks);
}

} // namespace faiss_saap::gpu
