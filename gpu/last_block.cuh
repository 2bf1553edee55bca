/// Blocks that share a piece of work, the last of which ends it.
#pragma once

namespace faiss_saap::gpu {

/// Adds `n` to a counter once all threads of the block have come here; by the
/// whole block. What the blocks that came before have written can be read.
/// @return the counter before
__device__ inline int arrive(int* counter, int n) {
    __shared__ int before;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(counter), "r"(n)
                     : "memory");
    }
    __syncthreads();
    return before;
}

} // namespace faiss_saap::gpu
