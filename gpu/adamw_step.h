/// The optimiser's step on the device.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include <faiss_saap/AdamWParams.h>

namespace faiss_saap::gpu {

/// One step of AdamW on the parameters of several KV heads.
struct DeviceAdamW {
    AdamWParams adamw;
    int nhead = 0;
    int64_t count = 0;             ///< parameters of each
    const int* active = nullptr;   ///< size nhead; others stay as they are
    const float* gradient = nullptr;
    float *parameters = nullptr, *first = nullptr, *second = nullptr;
};

cudaError_t adamw_step(const DeviceAdamW& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
