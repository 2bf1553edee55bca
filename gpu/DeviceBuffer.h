/// Device memory with an owner.
#pragma once

#include <utility>

#include "check.h"

namespace faiss_saap::gpu {

/// Memory that is given out in the order of a stream. The destructor waits for
/// the device, as streams may be gone by then; `release` does not.
class DeviceBuffer {
   public:
    DeviceBuffer() = default;
    /// @throws faiss::FaissException when the device has no room
    DeviceBuffer(size_t bytes, cudaStream_t stream) {
        if (bytes) {
            FAISS_SAAP_CUDA_CHECK(cudaGetDevice(&device_));
            FAISS_SAAP_CUDA_CHECK(cudaMallocAsync(&data_, bytes, stream));
        }
        bytes_ = bytes;
    }
    DeviceBuffer(DeviceBuffer&& other) noexcept {
        swap(other);
    }
    DeviceBuffer& operator=(DeviceBuffer other) noexcept {
        swap(other);
        return *this;
    }
    ~DeviceBuffer() {
        if (!data_) {
            return;
        }
        int before = 0;
        cudaGetDevice(&before);
        cudaSetDevice(device_); // may be another one by now
        // cudaFree alone does not wait for kernels that use such memory. Where it
        // fails the context is gone, and the memory with it.
        cudaError_t error = cudaDeviceSynchronize();
        error = error == cudaSuccess ? cudaFree(data_) : error;
        if (!loses_context(error)) {
            cudaGetLastError();
        }
        cudaSetDevice(before);
    }

    char* data() const {
        return static_cast<char*>(data_);
    }
    size_t size() const {
        return bytes_;
    }
    /// Gives the memory back once a stream's work so far is done.
    void release(cudaStream_t stream) {
        void* data = std::exchange(data_, nullptr);
        bytes_ = 0;
        if (data) {
            FAISS_SAAP_CUDA_CHECK(cudaFreeAsync(data, stream));
        }
    }

   private:
    void swap(DeviceBuffer& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(device_, other.device_);
    }

    void* data_ = nullptr;
    size_t bytes_ = 0;
    int device_ = 0;
};

/// Makes a device current while it lives.
class DeviceScope {
   public:
    explicit DeviceScope(int device) {
        FAISS_SAAP_CUDA_CHECK(cudaGetDevice(&before_));
        FAISS_SAAP_CUDA_CHECK(cudaSetDevice(device));
    }
    ~DeviceScope() {
        cudaSetDevice(before_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

   private:
    int before_ = 0;
};

/// Hands out parts of one block of memory, each at a multiple of 256 bytes.
/// Counts them first, without memory.
class Layout {
   public:
    explicit Layout(char* base = nullptr) : base_(base) {}

    template <class T>
    T* take(int64_t n) {
        T* at = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
        size_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
        return at;
    }
    size_t size() const {
        return size_;
    }

   private:
    char* base_;
    size_t size_ = 0;
};

} // namespace faiss_saap::gpu
