/// The best cell of many bfloat16 vectors, on tensor cores.
#pragma once

#include <cstddef>
#include <cstdint>

#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Arguments of `assign_bfloat16`, as AssignCellsParams. Device pointers.
struct AssignBfloat16Params {
    int nhead = 1;   ///< 1 to 65,535
    int64_t n = 0;   ///< vectors per head, below 2^31
    int d = 0;       ///< a multiple of 8, up to 256
    int ncell = 0;   ///< 1 to 65,536
    const void* x = nullptr; ///< bfloat16; at a multiple of 16 bytes, as strides
    int64_t x_head_stride = 0, x_row_stride = 0; ///< in elements
    const float* centroids = nullptr; ///< rows of d, contiguous within a head
    int64_t centroids_head_stride = 0;
    const float* bias = nullptr; ///< size ncell for each head, or null
    int64_t bias_head_stride = 0;
    /// centroids count as rounded to bfloat16, which takes half the time
    bool rounds_centroids = false;
    int32_t* cells = nullptr; ///< output, n contiguous for each head
    int64_t cells_head_stride = 0;
};

/// Bytes of workspace that `assign_bfloat16` needs.
/// @throws faiss::FaissException for a wrong size
size_t assign_bfloat16_workspace(const AssignBfloat16Params& params);

/// Sends each vector to the cell with the largest score x.c + bias[c], of equal
/// ones the lowest. Scores are within 2^-16 |x| |c| of float32's: a vector that is
/// nearer to two cells than that may go to either. The same input gives the same
/// cells, however many vectors come with it. Asynchronous; may be captured in a
/// graph.
/// @param workspace  device memory, assign_bfloat16_workspace(params) bytes
/// @throws faiss::FaissException for a wrong size, pointer or stride, or when a
///         kernel cannot be launched
void assign_bfloat16(
        const AssignBfloat16Params& params,
        void* workspace,
        cudaStream_t stream);

} // namespace faiss_saap::gpu
