/// Addresses of shared memory as instructions name them. Device code.
#pragma once

#include <cstdint>

namespace faiss_saap::gpu {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// The same place in another block of the cluster; compute capability 9.0 on.
__device__ __forceinline__ uint32_t address_in_block(uint32_t at, unsigned block) {
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(block));
#endif
    return at;
}

} // namespace faiss_saap::gpu
