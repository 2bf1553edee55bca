/// Memory of the device, for programs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include <cuda_runtime_api.h>
#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::benchs {

inline void check(cudaError_t error) {
    FAISS_THROW_IF_NOT_FMT(
            error == cudaSuccess, "CUDA: %s", cudaGetErrorString(error));
}

/// Memory of the device.
class DeviceMemory {
   public:
    explicit DeviceMemory(size_t bytes) {
        check(cudaMalloc(&data_, std::max<size_t>(16, bytes)));
    }
    DeviceMemory(const void* from, size_t bytes) : DeviceMemory(bytes) {
        check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice));
    }
    DeviceMemory(DeviceMemory&& other) noexcept {
        std::swap(data_, other.data_);
    }
    ~DeviceMemory() {
        cudaFree(data_);
    }
    /// Waits for the device.
    void copy_to(void* to, size_t bytes) const {
        check(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost));
    }
    template <class T = char>
    T* as() const {
        return static_cast<T*>(data_);
    }

   private:
    void* data_ = nullptr;
};

} // namespace faiss_saap::benchs
