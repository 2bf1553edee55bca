/// Vectors of either type that kernels take as they are.
#pragma once

#include <cuda_bf16.h>

#include <faiss_saap/dtype.h>

namespace faiss_saap::gpu {

/// @param type  float32 or bfloat16
__device__ __forceinline__ float component(DType type, const void* x, int64_t i) {
    return type == DType::float32
            ? static_cast<const float*>(x)[i]
            : __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
}

} // namespace faiss_saap::gpu
