/// The CUDA devices of this machine. Compiles without CUDA.
#pragma once

#include <cstddef>
#include <string>

// As cuda_runtime.h declares it, so that both may be included.
typedef struct CUstream_st* cudaStream_t;

namespace faiss_saap::gpu {

struct DeviceInfo {
    std::string name;
    int major = 0, minor = 0; ///< compute capability
    size_t memory = 0;        ///< bytes
};

/// Number of devices; 0 where there is no driver.
int device_count();

/// @throws faiss::FaissException for a device that is not there
DeviceInfo device_info(int device);

/// @throws faiss::FaissException for a device that is not there or has a
///         compute capability below 8.0
void require_device(int device);
/// The second half: what device_info says is enough.
void require_capability(int device, const DeviceInfo& info);

} // namespace faiss_saap::gpu
