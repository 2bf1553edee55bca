/// What the blocks of a cluster tell each other. Device code, for compute capability 9.0
/// on.
#pragma once

#include <cstdint>

#include "byte_barrier.cuh"
#include "decode_threads.cuh"
#include "shared_address.cuh"

namespace faiss_saap::gpu {

/// A barrier of all threads of a cluster, after which all see what was written before it.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// Reads what lies at that place in a block of the cluster, and writes it there.
__device__ __forceinline__ float4 load_from_block(const float4* at, unsigned block) {
    float4 x = {};
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address_in_block(shared_address(at), block))
                 : "memory");
#endif
    return x;
}
__device__ __forceinline__ void store_to_block(float* at, unsigned block, float x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(
                         address_in_block(shared_address(at), block)),
                 "f"(x)
                 : "memory");
#endif
}

/// Exchanges between the blocks of a cluster, one after the other. In each, a block
/// writes into the shared memory of all or some, and knows how many bytes it gets itself.
/// A barrier in shared memory counts them, so that nobody waits for what else is on its
/// way, as at a barrier of the cluster, whose fence waits for all loads of the block.
///
/// A block alone, which is no cluster, writes and waits for its threads that choose. What
/// its others write is seen after the block's next barrier.
///
/// A block may be one exchange ahead of another, as it has had what the other sent in the
/// one before: so two barriers take turns, and each block sends to each in every one.
class ClusterExchange {
   public:
    /// Makes the barriers ready and says so; await_begin() follows.
    __device__ __forceinline__ void begin(unsigned long long* words) {
        barriers = shared_address(words);
#if __CUDA_ARCH__ >= 900
        if (gridDim.x == 1) {
            return;
        }
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
        if (gridDim.x > 1) {
            asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
            return;
        }
#endif
        __syncthreads();
    }
    /// Writes a value to where `at` lies in this block, but in that of `block`.
    template <class T>
    __device__ __forceinline__ void send(T* at, unsigned block, T value) const {
        static_assert(sizeof(T) == 4 || sizeof(T) == 8);
        if (gridDim.x == 1) {
            *at = value;
            return;
        }
#if __CUDA_ARCH__ >= 900
        const uint32_t to = address_in_block(shared_address(at), block);
        const uint32_t counter = address_in_block(barrier(), block);
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
    /// The same of 16 bytes, to another block.
    __device__ __forceinline__ void send_four(
            const float4* at,
            unsigned block,
            const float4& value) const {
#if __CUDA_ARCH__ >= 900
        asm volatile(
                "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                        address_in_block(shared_address(at), block)),
                "f"(value.x),
                "f"(value.y),
                "f"(value.z),
                "f"(value.w),
                "r"(address_in_block(barrier(), block))
                : "memory");
#endif
    }

    /// Goes on after so many exchanges, for threads that have not waited for them.
    __device__ __forceinline__ void go_on_after(uint32_t exchanges) {
        number = exchanges;
    }

    /// How many bytes this block gets in this exchange, its own included. By one thread,
    /// at any time before it ends.
    __device__ __forceinline__ void expect(int bytes) const {
        if (gridDim.x > 1) {
            expect_bytes(barrier(), bytes);
        }
    }

    /// Waits until all has come; by all threads that choose.
    __device__ __forceinline__ void wait() {
        if (gridDim.x == 1) {
            sync_choosers();
            return;
        }
        wait_for_bytes(barrier(), number >> 1 & 1);
        number++;
    }

   private:
    uint32_t barriers = 0; ///< address of two words in shared memory
    uint32_t number = 0;   ///< of the exchange

    __device__ __forceinline__ uint32_t barrier() const {
        return barriers + 8 * (number & 1);
    }
};

} // namespace faiss_saap::gpu
