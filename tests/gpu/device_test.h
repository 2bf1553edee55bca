/// What tests on the device share.
#pragma once

#include <cuda_runtime_api.h>

#include <faiss_saap/gpu/device.h>

#include "common.h"

namespace faiss_saap::tests {

/// Skips where there is no device, and says so.
class DeviceTest : public ::testing::Test {
   protected:
    void SetUp() override {
        if (gpu::device_count() == 0) {
            GTEST_SKIP() << "this machine has no CUDA device";
        }
        gpu::require_device(0);
    }
};

/// A copy on the device, and back.
template <class T>
struct OnDevice {
    T* data = nullptr;
    size_t size = 0;

    explicit OnDevice(size_t n) : size(n) {
        EXPECT_EQ(
                cudaMalloc(
                        reinterpret_cast<void**>(&data),
                        std::max<size_t>(1, n) * sizeof(T)),
                cudaSuccess);
        EXPECT_EQ(cudaMemset(data, 0xee, n * sizeof(T)), cudaSuccess);
    }
    explicit OnDevice(const std::vector<T>& x) : OnDevice(x.size()) {
        EXPECT_EQ(
                cudaMemcpy(data, x.data(), size * sizeof(T), cudaMemcpyHostToDevice),
                cudaSuccess);
    }
    OnDevice(OnDevice&& other) noexcept {
        std::swap(data, other.data);
        std::swap(size, other.size);
    }
    ~OnDevice() {
        cudaFree(data);
    }
    std::vector<T> host() const {
        std::vector<T> x(size);
        EXPECT_EQ(
                cudaMemcpy(x.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost),
                cudaSuccess);
        return x;
    }
};

} // namespace faiss_saap::tests
