/// Blocks that work on the same rows, wait for each other and write into each
/// other's shared memory. Device code.
#pragma once

#include <cstdint>

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
__device__ __forceinline__ void store_in_block(float* at, unsigned block, float value) {
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(at));
        asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(block));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value)
                     : "memory");
        return;
    }
#endif
    *at = value;
}

__device__ __forceinline__ void store_in_block(
        unsigned long long* at,
        unsigned block,
        unsigned long long value) {
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(at));
        asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(block));
        asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to), "l"(value)
                     : "memory");
        return;
    }
#endif
    *at = value;
}

/// The same in every block of the team.
__device__ __forceinline__ void store_in_team(float* at, float value) {
#pragma unroll 4
    for (unsigned b = 0; b < gridDim.x; b++) {
        store_in_block(at, b, value);
    }
}

} // namespace faiss_saap::gpu
