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
template <class T>
__device__ __forceinline__ void store_in_block(T* at, unsigned block, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(at));
        asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(block));
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

/// Exchanges between the blocks of a cluster, one after the other, in which each sends to
/// all or some and knows how many bytes it gets. What has come is counted by a barrier in
/// shared memory, so that nobody waits for what else is on its way: the fence of
/// team_sync waits for all loads of the block. Code for compute capability 9.0 on.
///
/// A block may be one exchange ahead of another, as it has had what the other sent in the
/// one before: so two barriers take turns.
struct TeamExchange {
    uint32_t barriers = 0; ///< address of two words in shared memory
    uint32_t number = 0;   ///< of the exchange

    /// Makes the barriers ready and says so; await_begin() follows.
    __device__ __forceinline__ void begin(unsigned long long* words) {
        barriers = static_cast<uint32_t>(__cvta_generic_to_shared(words));
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;\n"
                         "mbarrier.init.shared.b64 [%1], 1;\n"
                         "fence.mbarrier_init.release.cluster;" ::"r"(barriers),
                         "r"(barriers + 8)
                         : "memory");
        }
        // Nothing else is told by this: no fence, which would wait for all loads.
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    /// Waits until all blocks are ready. By all threads.
    __device__ __forceinline__ void await_begin() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ uint32_t barrier() const {
        return barriers + 8 * (number & 1);
    }

    /// Where `at` of this block's shared memory is in that of another one.
    __device__ __forceinline__ static uint32_t address_in(uint32_t at, unsigned block) {
#if __CUDA_ARCH__ >= 900
        asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(block));
#endif
        return at;
    }

    /// Writes a value to where `at` lies in this block, but in that of `block`.
    template <class T>
    __device__ __forceinline__ void send(T* at, unsigned block, T value) const {
        static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if __CUDA_ARCH__ >= 900
        const uint32_t to = address_in(
                static_cast<uint32_t>(__cvta_generic_to_shared(at)), block);
        const uint32_t counter = address_in(barrier(), block);
        if constexpr (sizeof(T) == 4) {
            uint32_t bits;
            memcpy(&bits, &value, 4);
            asm volatile(
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 "
                    "[%0], %1, [%2];" ::"r"(to),
                    "r"(bits),
                    "r"(counter)
                    : "memory");
        } else {
            uint64_t bits;
            memcpy(&bits, &value, 8);
            asm volatile(
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 "
                    "[%0], %1, [%2];" ::"r"(to),
                    "l"(bits),
                    "r"(counter)
                    : "memory");
        }
#endif
    }
    template <class T>
    __device__ __forceinline__ void send_to_all(T* at, T value) const {
#pragma unroll 4
        for (unsigned b = 0; b < gridDim.x; b++) {
            send(at, b, value);
        }
    }

    /// How many bytes this block gets in this exchange, its own included. By one thread,
    /// at any time before it ends.
    __device__ __forceinline__ void expect(int bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier()),
                     "r"(bytes)
                     : "memory");
#endif
    }

    /// Waits until all has come; by every thread.
    __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
        asm volatile(
                "{\n"
                ".reg .pred done;\n"
                "WAIT_%=:\n"
                "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                "@!done bra WAIT_%=;\n"
                "}" ::"r"(barrier()),
                "r"(number >> 1 & 1)
                : "memory");
#endif
        number++;
    }
};

} // namespace faiss_saap::gpu
