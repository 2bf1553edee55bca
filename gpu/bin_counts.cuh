/// Cells counted in bins, from the best bin on. Device code.
#pragma once

#include <cstdint>

namespace faiss_saap::gpu {

/// How many cells and keys the bins have, in shared memory.
struct BinCounts {
    static constexpr int kBins = 256;
    alignas(16) int keys[kBins];
    alignas(16) int cells[kBins];

    /// By a block.
    __device__ __forceinline__ void clear() {
#pragma unroll 1
        for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
            keys[b] = cells[b] = 0;
        }
    }
    /// Counts a cell of n keys.
    __device__ __forceinline__ void add(int bin, int n) {
        atomicAdd(&keys[bin], n);
        atomicAdd(&cells[bin], 1);
    }
};

/// Of this lane's bins, kEach that follow each other: how many keys and cells there are up
/// to and with each. By a warp.
struct BinSums {
    static constexpr int kEach = BinCounts::kBins / 32;
    int keys[kEach], cells[kEach];

    __device__ __forceinline__ explicit BinSums(const BinCounts& counts) {
        static_assert(kEach % 4 == 0);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kEach; i += 4) {
            *reinterpret_cast<int4*>(keys + i) =
                    *reinterpret_cast<const int4*>(counts.keys + kEach * lane + i);
            *reinterpret_cast<int4*>(cells + i) =
                    *reinterpret_cast<const int4*>(counts.cells + kEach * lane + i);
        }
#pragma unroll
        for (int i = 1; i < kEach; i++) {
            keys[i] += keys[i - 1];
            cells[i] += cells[i - 1];
        }
        const int own_keys = keys[kEach - 1], own_cells = cells[kEach - 1];
        int keys_end = own_keys, cells_end = own_cells;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int x = __shfl_up_sync(0xffffffffu, keys_end, step);
            const int y = __shfl_up_sync(0xffffffffu, cells_end, step);
            keys_end += lane >= step ? x : 0;
            cells_end += lane >= step ? y : 0;
        }
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            keys[i] += keys_end - own_keys;
            cells[i] += cells_end - own_cells;
        }
    }
};

} // namespace faiss_saap::gpu
