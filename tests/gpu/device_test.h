/// What tests on the device share.
#pragma once

#include <cstdlib>
#include <string>

#include <cuda_runtime_api.h>

#include <faiss_saap/gpu/device.h>

#include "common.h"

namespace faiss_saap::tests {

/// At the end all memory has been given back: compute-sanitizer's leak check
/// looks when the context ends.
class ResetDevice : public ::testing::Environment {
   public:
    void TearDown() override {
        if (gpu::device_count() > 0) {
            cudaDeviceReset();
        }
    }
};
inline ::testing::Environment* const kResetDevice =
        ::testing::AddGlobalTestEnvironment(new ResetDevice);

/// Skips where there is no device, and says so.
class DeviceTest : public ::testing::Test {
   protected:
    void SetUp() override {
        if (gpu::device_count() == 0) {
            GTEST_SKIP() << "this machine has no CUDA device";
        }
        gpu::require_device(0);
    }
    /// No call leaves an error behind for the next one to be blamed for.
    void TearDown() override {
        if (!IsSkipped()) {
            EXPECT_EQ(cudaGetLastError(), cudaSuccess);
        }
    }
};

/// The recorded text that FAISS_SAAP_TRACE names, or the embedded one: a machine with a device
/// need not have the sources where they were built.
inline std::string given_trace() {
    const char* given = std::getenv("FAISS_SAAP_TRACE");
    return given ? given : embedded_trace();
}

/// A copy on the device, and back.
template <class T>
class OnDevice {
   public:
    explicit OnDevice(size_t n) : size_(n) {
        EXPECT_EQ(
                cudaMalloc(
                        reinterpret_cast<void**>(&data_),
                        std::max<size_t>(1, n) * sizeof(T)),
                cudaSuccess);
        EXPECT_EQ(cudaMemset(data_, 0xee, n * sizeof(T)), cudaSuccess);
    }
    explicit OnDevice(const std::vector<T>& x) : OnDevice(x.size()) {
        EXPECT_EQ(
                cudaMemcpy(data_, x.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
                cudaSuccess);
    }
    OnDevice(OnDevice&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    ~OnDevice() {
        cudaFree(data_);
    }
    T* data() const {
        return data_;
    }
    size_t size() const {
        return size_;
    }
    /// After all work on the device.
    std::vector<T> host() const {
        std::vector<T> x(size_);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        EXPECT_EQ(
                cudaMemcpy(x.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost),
                cudaSuccess);
        return x;
    }

   private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

} // namespace faiss_saap::tests
