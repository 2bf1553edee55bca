/// An assigner as plain arrays on the device.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss_saap/CellAssigner.h>
#include <faiss_saap/QueryClassifier.h>

#include "StreamBuffer.h"

namespace faiss_saap::gpu {

/// Knows flat quantizers and classifiers of one query head. A classifier's
/// layers are scores too: of the rows of its matrices, with its biases.
class LoweredAssigner {
   public:
    /// @throws faiss::FaissException for other assigners, or when memory is
    ///         short
    LoweredAssigner(const CellAssigner& assigner, const StreamMemory& memory);

    /// Whether `assign` works.
    bool is_quantizer() const {
        return layers_.empty();
    }
    /// Best cell of each vector. Needs a quantizer.
    /// @param x      device memory, size n * d
    /// @param cells  output, device memory, size n
    void assign(int64_t n, const float* x, int32_t* cells) const;

    /// @param scores  output, device memory, size n * ncell
    void scores(int64_t n, const float* x, float* scores) const;
    /// Floats of temporary memory per vector that `scores` takes.
    int temporary_floats() const;

   private:
    void multiply(
            int64_t n,
            const float* x,
            int cols,
            const float* rows,
            const float* bias,
            int nrow,
            float* y) const;

    StreamMemory memory_;
    int d_, ncell_;
    StreamBuffer<float> weights_; ///< centroids, or all parameters
    StreamBuffer<float> bias_;    ///< of a quantizer for L2
    bool l2_ = false;
    std::vector<ClassifierLayer> layers_;
};

} // namespace faiss_saap::gpu
