/// Barriers in shared memory that count the bytes that arrive there: of one thread that says
/// how many come, once in each phase. Device code, for compute capability 9.0 on.
#pragma once

#include <cstdint>

namespace faiss_saap::gpu {

/// How many bytes come in this phase; by one thread, before or after they do.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
#endif
}

/// Waits until all have come; by every thread that reads them.
/// @param parity  of the phase
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "WAIT_%=:\n"
            "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
            "@!done bra WAIT_%=;\n"
            "}" ::"r"(barrier),
            "r"(parity)
            : "memory");
#endif
}

} // namespace faiss_saap::gpu
