/// A block of threads keeps the best keys of a stream. Device code.
#pragma once

#include <cstdint>

#include <faiss_saap/ordered_float.h>

namespace faiss_saap::gpu {

/// Keys better than the worst kept one are collected in shared memory, which is
/// sorted when it is full. The result does not depend on the order in which
/// threads push.
class BlockTopK {
   public:
    /// Entries that one `reserve` may ask for.
    static constexpr int kMaxReserve = 256;

    /// Keys of shared memory: a power of two, at least k + kMaxReserve.
    static __host__ __device__ int capacity(int k) {
        int size = 2 * kMaxReserve;
        while (size < 2 * k) {
            size *= 2;
        }
        return size;
    }
    static __host__ __device__ size_t shared_bytes(int k) {
        return (size_t(capacity(k)) + 2) * sizeof(uint64_t);
    }

    /// By all threads.
    /// @param shared  shared_bytes(k), aligned to 8 bytes
    __device__ BlockTopK(void* shared, int k)
            : keys_(static_cast<uint64_t*>(shared) + 2),
              worst_(static_cast<uint64_t*>(shared)),
              count_(reinterpret_cast<int*>(static_cast<uint64_t*>(shared) + 1)),
              k_(k),
              capacity_(capacity(k)) {
        if (threadIdx.x == 0) {
            *count_ = 0;
            *worst_ = SelectionKey::kNone;
        }
        __syncthreads();
    }

    /// Makes room for so many keys, pushed by any threads. By all threads, with
    /// the same number.
    __device__ void reserve(int entries) {
        if (bound_ + entries > capacity_) {
            __syncthreads(); // all have pushed
            bound_ = *count_;
            __syncthreads(); // all have read, before one pushes again
            if (bound_ + entries > capacity_) {
                keep_best();
            }
        }
        bound_ += entries;
    }

    /// By any thread.
    __device__ void push(uint64_t key) {
        if (key < *worst_) {
            keys_[atomicAdd(count_, 1)] = key;
        }
    }

    /// Ends the stream. By all threads.
    /// @return  k sorted keys in shared memory, filled up with kNone
    __device__ const uint64_t* finish() {
        __syncthreads();
        bound_ = *count_;
        __syncthreads();
        keep_best();
        return keys_;
    }

   private:
    /// Sorts the first bound_ keys and keeps k.
    __device__ void keep_best() {
        for (int i = bound_ + threadIdx.x; i < capacity_; i += blockDim.x) {
            keys_[i] = SelectionKey::kNone;
        }
        __syncthreads();
        for (int size = 2; size <= capacity_; size *= 2) {
            for (int apart = size / 2; apart > 0; apart /= 2) {
                for (int i = threadIdx.x; i < capacity_ / 2; i += blockDim.x) {
                    const int low = 2 * i - (i & (apart - 1));
                    const int high = low + apart;
                    const uint64_t a = keys_[low], b = keys_[high];
                    if ((a > b) == ((low & size) == 0)) {
                        keys_[low] = b;
                        keys_[high] = a;
                    }
                }
                __syncthreads();
            }
        }
        const bool full = bound_ >= k_;
        bound_ = full ? k_ : bound_;
        if (threadIdx.x == 0) {
            *count_ = bound_;
            *worst_ = full ? keys_[k_ - 1] : SelectionKey::kNone;
        }
        __syncthreads();
    }

    uint64_t* keys_;
    volatile uint64_t* worst_;
    int* count_;
    int k_, capacity_;
    int bound_ = 0; ///< at least *count_, the same in all threads
};

} // namespace faiss_saap::gpu
