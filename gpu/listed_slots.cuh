/// The lists of an item as kernels read them, and the means of their keys.
#pragma once

#include "device_vectors.cuh"
#include "sequence_state.h"

namespace faiss_saap::gpu {

__device__ inline int32_t listed_slot(const ListState& list, int cell, uint32_t i) {
    const int e = extent_of(i);
    return list.slots
            [list.extents[int64_t(cell) * kExtents + e] + (i - extent_begin(e))];
}

/// Takes the entries begin .. end - 1 of a cell's list into its mean, one after
/// the other, as CellLists does; by a warp.
__device__ inline void add_to_mean(
        const ListState& list,
        const DeviceView& kv,
        int d,
        int cell,
        uint32_t begin,
        uint32_t end) {
    float* mean = list.means + int64_t(cell) * d;
    for (int j = threadIdx.x % 32; j < d; j += 32) {
        float m = begin ? mean[j] : 0.0f;
        for (uint32_t i = begin; i < end; i++) {
            const char* row = key_row(kv, list.kv_head, listed_slot(list, cell, i));
            const float x = row ? element(row, kv.bf16, j) : m;
            m += (x - m) / static_cast<float>(i + 1);
        }
        mean[j] = m;
    }
}

/// Takes the slots from `begin` on into the mean of a cell that has some; by a
/// warp.
__device__ inline void update_mean(
        const ListState& list,
        const DeviceView& kv,
        int d,
        int cell,
        int64_t begin) {
    // The lists are sorted.
    const auto count = static_cast<uint32_t>(list.count[cell]);
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (listed_slot(list, cell, middle) < begin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    add_to_mean(list, kv, d, cell, low, count);
}

} // namespace faiss_saap::gpu
