/// The token of a decode step joins the lists of its sequence, in the kernel that attends
/// for it (decode.h). Device code.
#pragma once

#include "decode.h"
#include "device_vectors.cuh"
#include "sequence_state.h"

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

/// Looks at the new key of each KV head, in every block, so that all agree.
/// @param warp, warps  this one of so many
/// @param worst        the worst Fault so far
__device__ __forceinline__ void check_new_keys(
        const DecodeParams& p,
        const DeviceView& kv,
        int64_t slot,
        int warp,
        int warps,
        int* worst) {
#pragma unroll 1
    for (int h0 = 2 * (warps - 1 - warp); h0 < p.heads_kv; h0 += 2 * warps) {
        const int h = h0 + static_cast<int>(threadIdx.x) % 32 / 16;
        const bool is = h < p.heads_kv;
        const Fault fault =
                fault_of_key(is ? key_row(kv, h, slot) : nullptr, p.d, p.bf16);
        if (is && fault != Fault::none) {
            // The worse one of two, whoever is first.
            atomicMax(worst, static_cast<int>(fault));
        }
    }
}

/// Notes up to where cells are known, and the parts of them that the next keys have been
/// compared with: as one word, as others read it meanwhile.
__device__ inline void note_assigned(SequenceState& sequence, int assigned, int parts) {
    static_assert(offsetof(SequenceState, sought_parts) ==
                  offsetof(SequenceState, assigned) + sizeof(int32_t));
    __stcg(reinterpret_cast<int2*>(&sequence.assigned), make_int2(assigned, parts));
}

/// Lists the slot as the newest of a cell. By one thread.
__device__ inline void list_one(
        const ListState& list,
        int cell,
        int32_t slot,
        int64_t sink) {
    const auto entry = static_cast<uint32_t>(__ldcg(list.count + cell));
    const int e = extent_of(entry);
    uint32_t* at = list.extents + int64_t(cell) * kExtents + e;
    uint32_t extent = __ldcg(at);
    if (extent == kNoExtent) { // else the cell has it from before a truncation
        extent = atomicAdd(&list.progress->used, extent_size(e));
        *at = extent;
    }
    list.slots[extent + (entry - extent_begin(e))] = slot;
    list.cells[slot - sink] = static_cast<uint16_t>(cell);
    list.newest[cell] = slot;
    list.count[cell] = static_cast<int32_t>(entry) + 1;
}

} // namespace faiss_saap::gpu
