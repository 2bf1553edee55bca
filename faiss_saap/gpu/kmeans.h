/// k-means over all heads at once, on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include <faiss_saap/dtype.h>
#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

/// Arguments of `kmeans`. All pointers are device memory, strides count
/// elements.
struct BatchedKMeansParams {
    int nhead = 1;   ///< independent clusterings, 1 to 65,535
    int64_t n = 0;   ///< vectors per head, ncell to 2^31 - 1
    int d = 0;       ///< dimension, any
    int ncell = 0;   ///< cells per head, 1 to 65,536
    int niter = 10;  ///< at least 1
    /// unit-length centroids, vectors assigned by inner product
    bool spherical = false;
    unsigned seed = 1234;
    /// of x, or bfloat16: then d and strides are as assign_bfloat16() has them,
    /// which assigns, with rounded centroids but for the last time
    DType type = DType::float32;
    const void* x = nullptr; ///< vector i of head h: x_head_stride * h +
                             ///< x_row_stride * i elements; finite
    int64_t x_head_stride = 0, x_row_stride = 0;
    float* centroids = nullptr; ///< output, size nhead * ncell * d
    int32_t* cells = nullptr; ///< output, n contiguous for each head: the cell
                              ///< of each vector by these centroids
    int64_t cells_head_stride = 0;
};

/// Bytes of workspace that `kmeans` needs.
/// @throws faiss::FaissException for a wrong size
size_t kmeans_workspace(const BatchedKMeansParams& params);

/// Lloyd's algorithm, as faiss::Clustering with all vectors. It begins with
/// ncell vectors drawn without replacement. An empty cell is split off another:
/// a vector is drawn, so that large cells are split most often, and the empty
/// cell's centroid is set beside that of the vector's cell, a little towards
/// the vector.
///
/// The same input and seed give the same bits on the same kind of device.
/// Asynchronous; may be captured in a graph.
/// @param workspace  device memory, kmeans_workspace(params) bytes
/// @throws faiss::FaissException for a wrong size or null pointer, or when a
///         kernel cannot be launched
void kmeans(
        const BatchedKMeansParams& params,
        void* workspace,
        cudaStream_t stream);

} // namespace faiss_saap::gpu
