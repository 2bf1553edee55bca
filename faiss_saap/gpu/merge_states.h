/// The merge of partial attention results, on the device.
#pragma once

#include <cstdint>

#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Arguments of `merge_states`. All pointers are device memory.
struct MergeStatesParams {
    int64_t n = 0;                   ///< partial results
    int d_v = 0;                     ///< components of each
    float* output = nullptr;         ///< in and out, size n * d_v
    float* lse = nullptr;            ///< in and out, size n
    const float* output_b = nullptr; ///< size n * d_v
    const float* lse_b = nullptr;    ///< size n
};

/// Merges n partial results into n others, as faiss_saap::merge_states does on
/// the host. Asynchronous: errors of the kernel itself show at the stream's
/// next synchronisation.
/// @throws faiss::FaissException for a wrong size or null pointer, or when the
///         kernel cannot be launched
void merge_states(const MergeStatesParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
