/// Means of the vectors of each cell, for all heads at once, on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include <faiss_saap/dtype.h>
#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Arguments of `cell_means`. All pointers are device memory, strides count
/// elements.
struct CellMeansParams {
    int nhead = 1;   ///< independent problems, 1 to 65,535
    int64_t n = 0;   ///< vectors per head, below 2^31
    int d = 0;       ///< dimension, any
    int ncell = 0;   ///< cells per head, 1 to 65,536
    DType type = DType::float32; ///< of x, or bfloat16
    const void* x = nullptr; ///< vector i of head h: x_head_stride * h +
                             ///< x_row_stride * i elements; finite
    int64_t x_head_stride = 0, x_row_stride = 0;
    const int32_t* cells = nullptr; ///< n contiguous for each head; a vector
                                    ///< whose cell is outside 0 .. ncell - 1
                                    ///< is skipped
    int64_t cells_head_stride = 0;
    float* means = nullptr;   ///< output, size nhead * ncell * d; an empty cell
                              ///< keeps what is there
    int32_t* counts = nullptr; ///< output, size nhead * ncell: vectors per cell
    bool same_vectors = false; ///< the workspace has served a call with these x before:
                               ///< their largest component is known
};

/// Bytes of workspace that `cell_means` needs.
/// @throws faiss::FaissException for a wrong size
size_t cell_means_workspace(const CellMeansParams& params);

/// Sums are integers (each component times a power of two, as large as n terms
/// allow, rounded once), so they are exact, and the means are the same bits
/// whatever order the device works in. The rounding is at most 2^-31 of the
/// largest component of the head, and 2^-46 for 65,536 vectors. Asynchronous;
/// may be captured in a graph.
/// @param workspace  device memory, cell_means_workspace(params) bytes
/// @throws faiss::FaissException for a wrong size or null pointer, or when a
///         kernel cannot be launched
void cell_means(
        const CellMeansParams& params,
        void* workspace,
        cudaStream_t stream);

} // namespace faiss_saap::gpu
