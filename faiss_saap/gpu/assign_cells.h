/// Scores of cells and the best cell, for all heads at once, on the device.
#pragma once

#include <cstdint>

#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Arguments of `assign_cells`. All pointers are device memory, strides count
/// elements.
///
/// The score of a vector in cell c is x.c + bias[c]. Without a bias that is the
/// inner product; with bias[c] = -|c|^2 / 2 (see `half_norms`) the largest
/// score is the nearest centroid. A bias of -infinity closes a cell.
struct AssignCellsParams {
    int nhead = 1;   ///< independent problems, 1 to 65,535
    int64_t n = 0;   ///< vectors per head, below 2^31
    int d = 0;       ///< dimension, any
    int ncell = 0;   ///< cells per head, 1 to 65,536
    const float* x = nullptr; ///< vector i of head h: x_head_stride * h +
                              ///< x_row_stride * i, d contiguous components
    int64_t x_head_stride = 0, x_row_stride = 0;
    const float* centroids = nullptr; ///< rows of d, contiguous within a head
    int64_t centroids_head_stride = 0; ///< 0: the heads share them
    const float* bias = nullptr; ///< size ncell for each head, or null
    int64_t bias_head_stride = 0;
    int32_t* cells = nullptr; ///< output, n contiguous for each head: the cell
                              ///< with the largest score, of equal ones the
                              ///< lowest; -1 where no score is above -infinity
                              ///< (as when the vector holds NaN)
    int64_t cells_head_stride = 0;
    float* scores = nullptr; ///< output: the score of that cell, or null;
                             ///< strides as of cells
};

/// Sends each vector to its best cell. Products are summed in float32 in the
/// order of the components, so that the same vector gets the same bits however
/// many come with it. Asynchronous; may be captured in a graph.
/// @throws faiss::FaissException for a wrong size or null pointer, or when the
///         kernel cannot be launched
void assign_cells(const AssignCellsParams& params, cudaStream_t stream);

/// Arguments of `score_cells`: as AssignCellsParams, with all scores as output.
struct ScoreCellsParams {
    int nhead = 1;
    int64_t n = 0;
    int d = 0;
    int ncell = 0;
    const float* x = nullptr;
    int64_t x_head_stride = 0, x_row_stride = 0;
    const float* centroids = nullptr;
    int64_t centroids_head_stride = 0;
    const float* bias = nullptr;
    int64_t bias_head_stride = 0;
    float* scores = nullptr; ///< output, ncell contiguous for each vector
    int64_t scores_head_stride = 0, scores_row_stride = 0;
};

/// Scores of all cells, bit for bit those that `assign_cells` compares.
/// @throws faiss::FaissException as assign_cells
void score_cells(const ScoreCellsParams& params, cudaStream_t stream);

/// Arguments of `half_norms`. All pointers are device memory.
struct HalfNormsParams {
    int64_t n = 0;                    ///< vectors, of all heads together
    int d = 0;                        ///< dimension
    const float* vectors = nullptr;   ///< size n * d
    float* minus_half_norm = nullptr; ///< output, size n: -|v|^2 / 2
};

/// The bias that makes the largest score the nearest centroid.
/// @throws faiss::FaissException as assign_cells
void half_norms(const HalfNormsParams& params, cudaStream_t stream);

} // namespace faiss_saap::gpu
