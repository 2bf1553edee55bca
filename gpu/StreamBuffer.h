/// Device memory with the life of a scope, ordered on a stream.
#pragma once

#include <cstddef>
#include <utility>

#include "check.h"

namespace faiss_saap::gpu {

/// A failed allocation is no fault of later calls: its error is taken back.
inline void check_allocation(cudaError_t error, size_t bytes) {
    if (error != cudaSuccess) {
        cudaGetLastError();
        FAISS_THROW_FMT(
                "not enough device memory: %zd bytes: %s",
                bytes,
                cudaGetErrorString(error));
    }
}

/// Where buffers come from.
struct StreamMemory {
    cudaMemPool_t pool = nullptr;
    cudaStream_t stream = nullptr;
};

template <class T>
class StreamBuffer {
   public:
    StreamBuffer() = default;
    StreamBuffer(const StreamMemory& memory, size_t size) : memory_(memory) {
        // A buffer of nothing has a pointer nevertheless.
        const size_t bytes = (size ? size : 1) * sizeof(T);
        check_allocation(
                cudaMallocFromPoolAsync(
                        reinterpret_cast<void**>(&data_),
                        bytes,
                        memory.pool,
                        memory.stream),
                bytes);
    }
    StreamBuffer(StreamBuffer&& other) noexcept
            : memory_(other.memory_),
              data_(std::exchange(other.data_, nullptr)) {}
    StreamBuffer& operator=(StreamBuffer&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(data_, other.data_);
        return *this;
    }
    ~StreamBuffer() {
        if (data_) {
            cudaFreeAsync(data_, memory_.stream);
        }
    }
    T* get() const {
        return data_;
    }

   private:
    StreamMemory memory_;
    T* data_ = nullptr;
};

/// Copies in either direction; `to` and `from` may be host or device memory.
template <class T>
void copy_async(T* to, const T* from, size_t size, cudaStream_t stream) {
    if (size > 0) {
        FAISS_SAAP_CUDA_CHECK(cudaMemcpyAsync(
                to, from, size * sizeof(T), cudaMemcpyDefault, stream));
    }
}

} // namespace faiss_saap::gpu
