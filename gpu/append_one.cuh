/// The token of a decode step joins the lists of its sequence, in the kernel that
/// routes the step's query: the cell of the key that leaves the window is found by
/// the team that scores the cells, and listed by the block that takes the row's
/// cells. Device code.
#pragma once

#include "device_vectors.cuh"
#include "route.h"

namespace faiss_saap::gpu {

/// The slot that leaves the window when a token is appended, or -1.
__device__ inline int64_t leaving_slot(
        int64_t length,
        int64_t sink,
        int64_t window) {
    const int64_t slot = length - window;
    return slot >= sink ? slot : -1;
}

/// What is wrong with a key, one of two that the halves of a warp look at.
__device__ inline Fault fault_of_key(const char* key, int d, int bf16) {
    float norm = 0;
    const auto* pieces = reinterpret_cast<const uint4*>(key);
#pragma unroll 1
    for (int i = threadIdx.x % 16; key && i < d / 8; i += 16) {
        const uint4 bits = pieces[i];
        const auto* words = reinterpret_cast<const char*>(&bits);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float x = element(words, bf16, j);
            norm += x * x;
        }
    }
    const unsigned half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
    const bool finite =
            (__ballot_sync(0xffffffffu, isfinite(norm)) & half) == half;
    return !key ? Fault::append_page : finite ? Fault::none : Fault::append_key;
}

/// An entry of a list on its way, in thread 0.
struct OneAppend {
    int cell = -1; ///< -1: there is none
    int64_t slot = 0;
    uint32_t entry = 0;  ///< in the cell's list
    uint32_t extent = 0; ///< where the entry's extent begins
};

/// Begins to list the slot in a cell that has `entry` ones. The extent is read here and
/// needed in end_listing only: the answer takes long. By thread 0.
__device__ inline OneAppend begin_listing(
        const ListState& list,
        int cell,
        int64_t slot,
        int32_t entry) {
    OneAppend one;
    one.cell = cell;
    one.slot = slot;
    one.entry = static_cast<uint32_t>(entry);
    one.extent = __ldcg(list.extents + int64_t(cell) * kExtents + extent_of(one.entry));
    return one;
}

/// Lists the slot, if there is one. By thread 0.
__device__ inline void end_listing(
        const ListState& list,
        const OneAppend& one,
        int64_t sink) {
    if (one.cell < 0) {
        return;
    }
    const int e = extent_of(one.entry);
    uint32_t extent = one.extent;
    if (extent == kNoExtent) {
        extent = atomicAdd(list.used, extent_size(e));
        list.extents[int64_t(one.cell) * kExtents + e] = extent;
    }
    const auto slot = static_cast<int32_t>(one.slot);
    list.slots[extent + (one.entry - extent_begin(e))] = slot;
    list.cells[slot - sink] = static_cast<uint16_t>(one.cell);
    list.newest[one.cell] = slot;
    list.count[one.cell] = static_cast<int32_t>(one.entry) + 1;
}

} // namespace faiss_saap::gpu
