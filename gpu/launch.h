/// Kernels that follow each other in a stream without a gap.
#pragma once

#include <cuda_runtime.h>

namespace faiss_saap::gpu {

/// Launches a kernel that may begin while the one before it in the stream still
/// runs, where the device knows how (compute capability 9.0 on). The kernel calls
/// let_next_begin(), reads what no kernel of a step writes, and then
/// wait_for_previous().
template <class Params>
cudaError_t launch(
        void (*kernel)(Params),
        dim3 grid,
        int threads,
        size_t shared,
        cudaStream_t stream,
        const Params& params) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(
                &major, cudaDevAttrComputeCapabilityMajor, device);
    }
    if (error != cudaSuccess) {
        return error;
    }
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

#ifdef __CUDACC__

/// All that the kernels before have written can be read after this. Every thread
/// of every block calls it, so that kernels end in their order.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Brings a cache line nearer.
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

#endif

} // namespace faiss_saap::gpu
