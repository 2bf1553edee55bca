/// Device memory with an owner.
#pragma once

#include <utility>

#include "check.h"

namespace faiss_saap::gpu {

/// Memory that is given out and given back in the order of a stream.
class DeviceBuffer {
   public:
    DeviceBuffer() = default;
    /// @throws faiss::FaissException when the device has no room
    DeviceBuffer(size_t bytes, cudaStream_t stream)
            : bytes_(bytes), stream_(stream) {
        if (bytes) {
            FAISS_SAAP_CUDA_CHECK(cudaMallocAsync(&data_, bytes, stream));
        }
    }
    DeviceBuffer(DeviceBuffer&& other) noexcept {
        swap(other);
    }
    DeviceBuffer& operator=(DeviceBuffer other) noexcept {
        swap(other);
        return *this;
    }
    ~DeviceBuffer() {
        if (data_ && cudaFreeAsync(data_, stream_) != cudaSuccess) {
            cudaGetLastError(); // the context is gone, and the memory with it
        }
    }

    char* data() const {
        return static_cast<char*>(data_);
    }
    size_t size() const {
        return bytes_;
    }
    /// The stream whose work must be done before the memory is used again.
    void used_on(cudaStream_t stream) {
        stream_ = stream;
    }

   private:
    void swap(DeviceBuffer& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(stream_, other.stream_);
    }

    void* data_ = nullptr;
    size_t bytes_ = 0;
    cudaStream_t stream_ = nullptr;
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
