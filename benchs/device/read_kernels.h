/// Reading without computing: what the memory system gives.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace faiss_saap::benchs {

/// Reads `bytes`, a multiple of 16, from a.
cudaError_t read_all(const void* a, size_t bytes, uint32_t* sink, cudaStream_t);

/// Reads n rows of `bytes` each, a multiple of 16 up to 512, from both arrays, at
/// slots * token_stride + head * head_stride bytes.
struct ReadRowsParams {
    const char *k = nullptr, *v = nullptr;
    const int64_t* offsets = nullptr; ///< bytes, size n
    int64_t n = 0;
    int bytes = 0;
    uint32_t* sink = nullptr;
};
cudaError_t read_rows(const ReadRowsParams& params, cudaStream_t stream);

} // namespace faiss_saap::benchs
