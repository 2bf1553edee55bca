/// Kernels that follow each other in a stream without a gap.
#pragma once

#include <atomic>

#include <cuda_runtime.h>

namespace faiss_saap::gpu {

/// Whether kernels run here as they were compiled for compute capability 9.0 on,
/// with clusters and early launches: a newer device may run code of 8.0. All kernels
/// are compiled for the same devices.
inline cudaError_t compiled_for_90(const void* kernel, bool& yes) {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices]; // 0: not yet
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) {
        return error;
    }
    int version = device < kDevices ? known[device].load() : 0;
    if (version == 0) {
        cudaFuncAttributes attributes;
        error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) {
            return error;
        }
        version = attributes.ptxVersion;
        if (device < kDevices) {
            known[device] = version;
        }
    }
    yes = version >= 90;
    return cudaSuccess;
}

/// Launches a kernel that may begin while the one before it in the stream still
/// runs, where the device knows how (compute capability 9.0 on). Before
/// wait_for_previous() the kernel reads only what no kernel of a step writes. One
/// that calls let_next_begin() after it promises more: when the next begins, all
/// that came before this one has ended.
/// @param cluster  blocks of a cluster, along the grid's x; 1 where the device has
///                 no clusters
/// @param along_y  and along its y
template <class Params>
cudaError_t launch(
        void (*kernel)(Params),
        dim3 grid,
        int threads,
        size_t shared,
        cudaStream_t stream,
        const Params& params,
        int cluster = 1,
        int along_y = 1) {
    bool early = false;
    cudaError_t error =
            compiled_for_90(reinterpret_cast<const void*>(kernel), early);
    if (error != cudaSuccess) {
        return error;
    }
    // All kernels of a step divide a processor's memory alike, so that one can
    // begin where another still runs.
    error = cudaFuncSetAttribute(
            kernel,
            cudaFuncAttributePreferredSharedMemoryCarveout,
            cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) {
        return error;
    }
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = along_y;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = !early ? 0 : cluster * along_y > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, params);
}

/// Allows a kernel's launches up to so much dynamic shared memory, and clusters of so
/// many blocks. The same for all launches of a kernel, as threads may launch at once.
template <class Params>
cudaError_t allow(void (*kernel)(Params), size_t shared, int cluster) {
    const cudaError_t error = cudaFuncSetAttribute(
            kernel,
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shared));
    constexpr int kEverywhere = 8; // blocks of a cluster that need no leave
    return error != cudaSuccess || cluster <= kEverywhere
            ? error
            : cudaFuncSetAttribute(
                      kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

/// How many clusters of so many blocks run at once, what they ask for being allowed; 0
/// where there are none of this size.
template <class Params>
int clusters_at_once(
        void (*kernel)(Params),
        int cluster,
        int threads,
        size_t shared) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
        cudaGetLastError(); // the next call begins clean
        return 0;
    }
    return clusters;
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
