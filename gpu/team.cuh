/// Blocks that work on the same rows, wait for each other and write into each
/// other's shared memory. Device code.
#pragma once

#include <cstdint>

#include "shared_address.cuh"

namespace faiss_saap::gpu {

/// The blocks of one line of the grid, gridDim.x of them: a cluster where the
/// device has clusters (compute capability 9.0 on), else one block.
__device__ __forceinline__ void team_sync() {
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n"
                     "barrier.cluster.wait.acquire.aligned;" ::
                             : "memory");
        return;
    }
#endif
    __syncthreads();
}

/// Writes a value to where `at` lies in this block's shared memory, but in that of
/// the team's block `block`; all have begun, and read it after a team_sync.
template <class T>
__device__ __forceinline__ void store_in_block(T* at, unsigned block, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        const uint32_t to = address_in_block(shared_address(at), block);
        if constexpr (sizeof(T) == 4) {
            uint32_t bits;
            memcpy(&bits, &value, 4);
            asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(bits)
                         : "memory");
        } else {
            uint64_t bits;
            memcpy(&bits, &value, 8);
            asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to), "l"(bits)
                         : "memory");
        }
        return;
    }
#endif
    *at = value;
}

/// The same in every block of the team.
template <class T>
__device__ __forceinline__ void store_in_team(T* at, T value) {
#pragma unroll 4
    for (unsigned b = 0; b < gridDim.x; b++) {
        store_in_block(at, b, value);
    }
}

} // namespace faiss_saap::gpu
