#include <faiss_saap/gpu/device.h>

#include "check.h"

namespace faiss_saap::gpu {

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError(); // no driver is no fault
        return 0;
    }
    return count;
}

DeviceInfo device_info(int device) {
    const int count = device_count();
    FAISS_THROW_IF_NOT_FMT(
            device >= 0 && device < count,
            "device = %d, this machine has %d CUDA devices",
            device,
            count);
    cudaDeviceProp properties;
    FAISS_SAAP_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    DeviceInfo info;
    info.name = properties.name;
    info.major = properties.major;
    info.minor = properties.minor;
    info.memory = properties.totalGlobalMem;
    return info;
}

void require_device(int device) {
    require_capability(device, device_info(device));
}

void require_capability(int device, const DeviceInfo& info) {
    FAISS_THROW_IF_NOT_FMT(
            info.major >= 8,
            "device = %d (%s) has compute capability %d.%d, faiss_saap needs "
            "8.0",
            device,
            info.name.c_str(),
            info.major,
            info.minor);
}

} // namespace faiss_saap::gpu
