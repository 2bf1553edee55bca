/// Copies of many bytes from global to shared memory, each by one instruction. Device code,
/// for compute capability 9.0 on.
#pragma once

#include <cstdint>

#include "byte_barrier.cuh"
#include "shared_address.cuh"

namespace faiss_saap::gpu {

/// Bulk copies that a block waits for together, once. A barrier in shared memory counts
/// their bytes.
struct BulkCopies {
    uint32_t barrier; ///< address of a word in shared memory

    __device__ __forceinline__ explicit BulkCopies(unsigned long long* word)
            : barrier(shared_address(word)) {}

    /// By one thread; a barrier of the block follows.
    __device__ __forceinline__ void begin() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.init.shared.b64 [%0], 1;\n"
                     "fence.proxy.async.shared::cta;" ::"r"(barrier)
                     : "memory");
#endif
    }
    /// Sends for bytes, a multiple of 16, as both addresses are.
    __device__ __forceinline__ void send_for(void* to, const void* from, int bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                "l"(from),
                "r"(bytes),
                "r"(barrier)
                : "memory");
#endif
    }
    /// How many bytes were sent for in all; by one thread, before or after they are.
    __device__ __forceinline__ void expect(int bytes) const {
        expect_bytes(barrier, bytes);
    }
    /// Waits until all are there; by every thread that reads them.
    __device__ __forceinline__ void wait() const {
        wait_for_bytes(barrier, 0);
    }
};

} // namespace faiss_saap::gpu
