/// The best of each row, on the device.
#pragma once

#include <cstdint>

#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// k of a selection is at most this.
constexpr int kMaxSelectK = 2048;

/// Arguments of `select_k`. All pointers are device memory.
struct SelectKParams {
    int64_t rows = 0; ///< below 2^31
    int64_t len = 0;  ///< scores per row, below 2^31
    int k = 0;        ///< 1 to 2,048; may be more than len
    bool largest = true;           ///< the largest scores are best
    const float* scores = nullptr; ///< len contiguous for each row
    int64_t scores_row_stride = 0; ///< in elements
    int32_t* ids = nullptr;  ///< output, size rows * k, best first; -1 where
                             ///< there is none
    float* values = nullptr; ///< output, size rows * k: their scores, the worst
                             ///< infinity where there is none; may be null
};

/// Selects the k best of each row. Of equal scores the lowest id comes first,
/// so the result is determined. NaN and the worst infinity (that of a closed
/// cell) are never selected. Asynchronous; may be captured in a graph.
/// @throws faiss::FaissException for a wrong size or null pointer, or when the
///         kernel cannot be launched
void select_k(const SelectKParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
