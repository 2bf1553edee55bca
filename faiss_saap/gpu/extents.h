/// How a list of slots lies in memory on the device.
#pragma once

#include <cstdint>

#include <faiss_saap/merge_states.h>

namespace faiss_saap::gpu {

/// The list of a cell grows in extents of 32, 32, 64, 128, ... slots: nothing is
/// ever moved, and entry i is found without a walk, so a warp can begin to read
/// a list anywhere. A cell with n slots holds at most max(32, 2 n) of them.
constexpr int kFirstExtent = 32;
constexpr int kExtents = 18;
constexpr uint32_t kNoExtent = UINT32_MAX;
/// Slots that one cell can hold, and so the longest sequence.
constexpr int64_t kMaxTokens = int64_t(kFirstExtent) << (kExtents - 1);

/// The extent of entry i.
FAISS_SAAP_HOST_DEVICE inline int extent_of(uint32_t i) {
    const uint32_t blocks = i / kFirstExtent;
#ifdef __CUDA_ARCH__
    return 32 - __clz(static_cast<int>(blocks));
#else
    return blocks ? 32 - __builtin_clz(blocks) : 0;
#endif
}

/// The first entry of an extent.
FAISS_SAAP_HOST_DEVICE inline uint32_t extent_begin(int extent) {
    return extent ? (kFirstExtent / 2u) << extent : 0u;
}

/// Entries of an extent.
FAISS_SAAP_HOST_DEVICE inline uint32_t extent_size(int extent) {
    return extent ? (kFirstExtent / 2u) << extent : kFirstExtent;
}

/// Entries of extents that truncation may leave idle in a list.
inline int64_t arena_slack(int64_t tokens) {
    return 1024 + tokens / 8;
}

/// Entries that `tokens` slots in `ncell` cells need at most.
inline int64_t arena_size(int64_t tokens, int ncell) {
    return 2 * tokens + int64_t(kFirstExtent) * (tokens < ncell ? tokens : ncell) +
            arena_slack(tokens);
}

} // namespace faiss_saap::gpu
